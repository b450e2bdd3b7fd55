"""Chat templates: from a list of messages to the text that a model was trained to continue.

A template is a program that came with a file from a stranger, so it runs in Jinja's immutable sandbox and on
a budget: so many loop steps, so much text. It may use the names that Hugging Face transformers gives it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import jinja2
from jinja2 import ext, nodes, parser
from jinja2.filters import do_format
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

__all__ = ["BUILTIN_TEMPLATES", "ChatTemplateError", "render_chat"]

MAX_STEPS = 200_000
"""Loop rounds and macro calls that one rendering may take."""
MAX_SECONDS = 10.0
"""Time that one rendering may take, looked at on every step."""
MAX_CHARACTERS = 32 * 1024 * 1024
"""Length of the longest text that a template may make, at the end or on the way."""


class ChatTemplateError(ValueError):
    """A template that is wrong, refuses the messages, leaves its sandbox or runs away, in one line."""


def render_chat(
    template: str,
    messages: list[dict[str, str]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
    **extra: Any,
) -> str:
    """The prompt for a conversation.

    Tokenize it with `parse_special=True`, and with `add_special=False` if it begins with BOS already.

    Args:
        template: Jinja source, from the model's file or from `BUILTIN_TEMPLATES`.
        messages: `{"role": ..., "content": ...}` in order.
        bos_token, eos_token: their text, "" where the vocabulary has none.
        add_generation_prompt: end with the opening of the assistant's answer.
        extra: more variables for the template, such as `tools` or `enable_thinking`.

    Raises:
        ChatTemplateError: a syntax error, an error raised by the template, or a limit that it ran into.

    Example:
        >>> hello = [{"role": "user", "content": "Hello"}]
        >>> render_chat(BUILTIN_TEMPLATES["chatml"], hello, bos_token="", eos_token="")
        '<|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n'
    """
    variables = {
        "messages": messages,
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
        **extra,
    }
    token = _budget.set(_Budget(MAX_STEPS, time.monotonic() + MAX_SECONDS))
    try:
        text = "".join(_bounded_parts(_compile(template).generate(variables)))
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(f"chat template, line {error.lineno}: {error.message}") from error
    except jinja2.TemplateError as error:
        raise ChatTemplateError(f"chat template: {error.message or type(error).__name__}") from error
    except (RecursionError, MemoryError) as error:
        raise ChatTemplateError(f"chat template ran away: {type(error).__name__}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ChatTemplateError(f"chat template: {type(error).__name__}: {error}") from error
    finally:
        _budget.reset(token)
    return text


@dataclass
class _Budget:
    steps: int
    deadline: float


_budget: ContextVar[_Budget] = ContextVar("chat_template_budget")


class _Runaway(jinja2.TemplateRuntimeError):
    """A limit that the template ran into."""


def _check_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise _Runaway(f"makes more than {MAX_CHARACTERS} characters")


def _check_widths(*values: Any) -> None:
    """Numbers, and numbers written in format strings, that may be the width of a text."""
    for value in values:
        if isinstance(value, int):
            _check_length(value)
        elif isinstance(value, str):
            for digits in re.findall(r"\d{8,}", value):
                _check_length(int(digits[:10]))


def _bounded_parts(parts: Iterable[str]) -> Iterator[str]:
    length = 0
    for part in parts:
        length += len(part)
        _check_length(length)
        yield part


class _Meter(NodeTransformer):
    """Puts a step count into every loop and macro, and a bound on the text that `~` makes."""

    def _metered(self, node: Any) -> Any:
        self.generic_visit(node)
        count = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(count).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _metered

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        join = nodes.EnvironmentAttribute("join_bounded")
        return nodes.Call(join, list(node.nodes), [], None, None).set_lineno(node.lineno)


class _GenerationTag(ext.Extension):
    """`{% generation %}`: marks the assistant's words for training; in a prompt it changes nothing."""

    # To Jinja an instance variable, so it cannot be annotated as one of the class.
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _ChatEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with limits.

    The limits stop what takes a template a few characters: loops in loops, text that doubles, huge widths.
    """

    intercepted_binops = frozenset(("+", "*", "%", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, _GenerationTag])
        self.filters["tojson"] = _to_json
        for name in ("center", "indent"):
            self.filters[name] = _with_bounded_widths(self.filters[name])
        self.filters["format"] = _format
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Meter().visit(super()._parse(source, name, filename))

    def count_step(self) -> None:
        """Called from every loop and macro."""
        budget = _budget.get()
        budget.steps -= 1
        if budget.steps < 0:
            raise _Runaway(f"takes more than {MAX_STEPS} steps")
        if time.monotonic() > budget.deadline:
            raise _Runaway(f"takes more than {MAX_SECONDS:g} seconds")

    def join_bounded(self, *parts: Any) -> str:
        """The `~` operator."""
        texts = [str(part) for part in parts]
        _check_length(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        match operator:
            case "+" if isinstance(left, str) and isinstance(right, str):
                _check_length(len(left) + len(right))
            case "*":
                _check_length(_size(left) * _size(right))
            case "%" if isinstance(left, str):
                _check_widths(left)
            case "**" if isinstance(left, int) and isinstance(right, int):
                _check_length(left.bit_length() * right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The odd names are Jinja's: they leave every keyword to the template.
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_widths(*(value for value in (*args, *kwargs.values()) if isinstance(value, int)))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        _check_widths(value.__self__)
        return _with_bounded_widths(wrapped)


def _size(value: Any) -> int:
    """How much a factor of a product can make of it: an integer's value times a sequence's length."""
    if isinstance(value, str | list | tuple):
        return len(value)
    return max(value, 0) if isinstance(value, int) else 1


def _with_bounded_widths(filter_function: Callable[..., Any]) -> Callable[..., Any]:
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_widths(*(value for value in (*args, *kwargs.values()) if isinstance(value, int)))
        return filter_function(*args, **kwargs)

    # Jinja marks filters that want the environment as an argument with an attribute on the function.
    bounded.__dict__.update(filter_function.__dict__)
    return bounded


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML and sorts keys; models were trained on plain JSON.
    _check_widths(indent)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    _check_widths(str(value))
    return do_format(value, *args, **kwargs)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateRuntimeError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


_environment = _ChatEnvironment()


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    return _environment.from_string(template)


def _turns(turn: str, opening: str = "") -> str:
    """A template that writes each message as `turn` and then opens the assistant's."""
    end = "{% if add_generation_prompt %}" + opening + "{% endif %}" if opening else ""
    return "{% for message in messages %}" + turn + "{% endfor %}" + end


def _by_role(system: str, user: str, assistant: str) -> str:
    return (
        "{% if message.role == 'system' %}" + system + "{% elif message.role == 'user' %}" + user
        + "{% else %}" + assistant + "{% endif %}"
    )  # fmt: skip


_TEXT = "{{ message.content }}"
_TRIMMED = "{{ message.content | trim }}"
_ROLE = "{{ message.role }}"
# Jinja drops a newline after a block tag, so newlines are written as expressions.
_NEWLINE = "{{ '\\n' }}"
_BLANK_LINE = "{{ '\\n\\n' }}"


def _llama2(*, system: str, again: str = "[INST] ", content: str = _TEXT) -> str:
    turn = (
        "{% if not turn.open %}{% set turn.open = true %}" + again + "{% endif %}"
        + _by_role(system, content + " [/INST]", content + "</s>{% set turn.open = false %}")
    )  # fmt: skip
    return "{% set turn = namespace(open=true) %}[INST] " + _turns(turn)


def _llama2_system(content: str = _TEXT) -> str:
    return "<<SYS>>" + _NEWLINE + content + _NEWLINE + "<</SYS>>" + _BLANK_LINE


def _mistral(*, before: str, after: str, answer: str = _TEXT) -> str:
    turn = (
        "{% if not turn.open %}{% set turn.open = true %}" + before + "[INST]" + after + "{% endif %}"
        + _by_role(
            _TEXT + _BLANK_LINE,
            _TEXT + before + "[/INST]",
            after + answer + "</s>{% set turn.open = false %}",
        )
    )  # fmt: skip
    return "{% set turn = namespace(open=false) %}" + _turns(turn)


def _mistral_v7(space: str) -> str:
    return _turns(
        _by_role(
            f"[SYSTEM_PROMPT]{space}{_TEXT}[/SYSTEM_PROMPT]",
            f"[INST]{space}{_TEXT}[/INST]",
            f"{space}{_TEXT}</s>",
        )
    )


def _gemma() -> str:
    # Gemma has no system role: what it says goes before the next words of the user.
    turn = (
        "{% if message.role == 'system' %}{% set system.text = system.text ~ (message.content | trim) %}"
        "{% else %}"
        "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}" + _NEWLINE
        + "{% if system.text and message.role != 'assistant' %}{{ system.text }}" + _BLANK_LINE
        + "{% set system.text = '' %}{% endif %}" + _TRIMMED + "<end_of_turn>" + _NEWLINE + "{% endif %}"
    )  # fmt: skip
    return "{% set system = namespace(text='') %}" + _turns(turn, "<start_of_turn>model" + _NEWLINE)


def _vicuna(system: str) -> str:
    turn = _by_role(system, "USER: " + _TEXT + _NEWLINE, "ASSISTANT: " + _TEXT + "</s>" + _NEWLINE)
    return _turns(turn, "ASSISTANT:")


def _exaone3() -> str:
    turn = _by_role(
        "[|system|]" + _TRIMMED + "[|endofturn|]" + _NEWLINE,
        "[|user|]" + _TRIMMED + _NEWLINE,
        "[|assistant|]" + _TRIMMED + "[|endofturn|]" + _NEWLINE,
    )
    return _turns(turn, "[|assistant|]")


def _command_r() -> str:
    def turn(name: str) -> str:
        return f"<|START_OF_TURN_TOKEN|><|{name}_TOKEN|>{_TRIMMED}<|END_OF_TURN_TOKEN|>"

    opening = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    return _turns(_by_role(turn("SYSTEM"), turn("USER"), turn("CHATBOT")), opening)


_TAGGED_LINE = "<|" + _ROLE + "|>" + _NEWLINE + _TEXT

BUILTIN_TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        "chatml": _turns(
            "<|im_start|>" + _ROLE + _NEWLINE + _TEXT + "<|im_end|>" + _NEWLINE,
            "<|im_start|>assistant" + _NEWLINE,
        ),
        "llama2": _llama2(system=_TEXT + _NEWLINE),
        "llama2-sys": _llama2(system=_llama2_system()),
        "llama2-sys-bos": _llama2(system=_llama2_system(), again="<s>[INST] "),
        "llama2-sys-strip": _llama2(system=_llama2_system(_TRIMMED), content=_TRIMMED),
        "llama3": _turns(
            "<|start_header_id|>" + _ROLE + "<|end_header_id|>" + _BLANK_LINE + _TRIMMED + "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>" + _BLANK_LINE,
        ),
        "llama4": _turns(
            "<|header_start|>" + _ROLE + "<|header_end|>" + _BLANK_LINE + _TRIMMED + "<|eot|>",
            "<|header_start|>assistant<|header_end|>" + _BLANK_LINE,
        ),
        "mistral-v1": _mistral(before=" ", after=" "),
        "mistral-v3": _mistral(before="", after=" ", answer=_TRIMMED),
        "mistral-v3-tekken": _mistral(before="", after=""),
        "mistral-v7": _mistral_v7(" "),
        "mistral-v7-tekken": _mistral_v7(""),
        "phi3": _turns(_TAGGED_LINE + "<|end|>" + _NEWLINE, "<|assistant|>" + _NEWLINE),
        "phi4": _turns(
            "<|im_start|>" + _ROLE + "<|im_sep|>" + _TEXT + "<|im_end|>", "<|im_start|>assistant<|im_sep|>"
        ),
        "zephyr": _turns(_TAGGED_LINE + "<|endoftext|>" + _NEWLINE, "<|assistant|>" + _NEWLINE),
        "falcon3": _turns(_TAGGED_LINE + _NEWLINE, "<|assistant|>" + _NEWLINE),
        "chatglm4": "[gMASK]<sop>" + _turns(_TAGGED_LINE, "<|assistant|>" + _NEWLINE),
        "glmedge": _turns(_TAGGED_LINE, "<|assistant|>"),
        "gemma": _gemma(),
        "vicuna": _vicuna(_TEXT + _BLANK_LINE),
        "vicuna-orca": _vicuna("SYSTEM: " + _TEXT + _NEWLINE),
        "deepseek": _turns(
            _by_role(
                _TEXT,
                "### Instruction:" + _NEWLINE + _TEXT + _NEWLINE,
                "### Response:" + _NEWLINE + _TEXT + _NEWLINE + "<|EOT|>" + _NEWLINE,
            ),
            "### Response:" + _NEWLINE,
        ),
        "deepseek2": _turns(
            _by_role(
                _TEXT + _BLANK_LINE,
                "User: " + _TEXT + _BLANK_LINE,
                "Assistant: " + _TEXT + "<\uff5cend\u2581of\u2581sentence\uff5c>",
            ),
            "Assistant:",
        ),
        "deepseek3": _turns(
            _by_role(
                _TEXT + _BLANK_LINE,
                "<\uff5cUser\uff5c>" + _TEXT,
                "<\uff5cAssistant\uff5c>" + _TEXT + "<\uff5cend\u2581of\u2581sentence\uff5c>",
            ),
            "<\uff5cAssistant\uff5c>",
        ),
        "command-r": _command_r(),
        "exaone3": _exaone3(),
        "granite": _turns(
            "<|start_of_role|>" + _ROLE + "<|end_of_role|>" + _TEXT + "<|end_of_text|>" + _NEWLINE,
            "<|start_of_role|>assistant<|end_of_role|>",
        ),
        "openchat": _turns(
            "{% if message.role == 'system' %}"
            + _TEXT
            + "{% else %}GPT4 Correct {{ message.role | capitalize }}: "
            + _TEXT
            + "{% endif %}<|end_of_turn|>",
            "GPT4 Correct Assistant:",
        ),
        "megrez": _turns(
            "<|role_start|>" + _ROLE + "<|role_end|>" + _TEXT + "<|turn_end|>",
            "<|role_start|>assistant<|role_end|>",
        ),
        "monarch": _turns(
            "{{ '' if loop.first else '<s>' }}" + _ROLE + _NEWLINE + _TEXT + "</s>" + _NEWLINE,
            "<s>assistant" + _NEWLINE,
        ),
        "smolvlm": "<|im_start|>"
        + _turns(
            _by_role(
                _TEXT + _BLANK_LINE,
                "User: " + _TEXT + "<end_of_utterance>" + _NEWLINE,
                "Assistant: " + _TEXT + "<end_of_utterance>" + _NEWLINE,
            ),
            "Assistant:",
        ),
    }
)
"""Templates by the names of llama.cpp's `--chat-template`; none begins with BOS: `add_special` adds it."""
