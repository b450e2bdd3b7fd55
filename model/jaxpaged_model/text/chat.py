"""Chat templates: from a list of messages to the text that a model was trained to continue.

Templates are untrusted programs: they run in Jinja's immutable sandbox, with a limit on loop steps,
time and text. They may use the names that Hugging Face transformers provides.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import ext, nodes, parser
from jinja2.filters import do_format
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from jaxpaged_model.text.builtin_templates import BUILTIN_TEMPLATES as BUILTIN_TEMPLATES

MAX_STEPS = 200_000
"""Limit of loop iterations and macro calls in one rendering."""
MAX_SECONDS = 10.0
"""Limit of the time of one rendering, checked at every step."""
MAX_CHARACTERS = 32 * 1024 * 1024
"""Limit of the length of the result and of every intermediate text."""


class ChatTemplateError(ValueError):
    """A template that is invalid, rejects the messages, leaves its sandbox or exceeds a limit; one line."""


def render_chat(
    template: str,
    messages: list[dict[str, str]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
    **extra: Any,
) -> str:
    """Renders the prompt for a conversation.

    Tokenize it with `parse_special=True`, and with `add_special=False` if it begins with BOS already.

    Args:
        template: Jinja source, from the model's file or from `BUILTIN_TEMPLATES`.
        messages: `{"role": ..., "content": ...}` in order.
        bos_token, eos_token: their text, "" if the vocabulary has none.
        add_generation_prompt: True to end with the beginning of the assistant's message.
        extra: more variables for the template, such as `tools` or `enable_thinking`.

    Raises:
        ChatTemplateError: a syntax error, an error raised by the template, or an exceeded limit.

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
        raise ChatTemplateError(f"chat template exceeds a limit: {type(error).__name__}") from error
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


class _LimitExceeded(jinja2.TemplateRuntimeError):
    """A limit that a template exceeded."""


def _check_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise _LimitExceeded(f"makes more than {MAX_CHARACTERS} characters")


def _check_widths(*values: Any) -> None:
    """Checks integers, and numbers in format strings, that may be the width of a text."""
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
    """Adds a step count to every loop and macro, and a limit to the text that `~` makes."""

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
    """`{% generation %}`: marks the assistant's text for training; a prompt is the same without it."""

    # Jinja declares it as an instance variable, so it cannot be annotated as a class variable.
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _ChatEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as transformers configures it for chat templates, with limits.

    The limits stop what a few characters of a template can do: nested loops, text that doubles, huge widths.
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
        """Counts a step and checks the time; called from every loop and macro."""
        budget = _budget.get()
        budget.steps -= 1
        if budget.steps < 0:
            raise _LimitExceeded(f"takes more than {MAX_STEPS} steps")
        if time.monotonic() > budget.deadline:
            raise _LimitExceeded(f"takes more than {MAX_SECONDS:g} seconds")

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
        # Jinja's parameter names, which leave every keyword to the template.
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
    """Size of one factor of a product: an integer's value or a sequence's length, 1 for other types."""
    if isinstance(value, str | list | tuple):
        return len(value)
    return max(value, 0) if isinstance(value, int) else 1


def _with_bounded_widths(filter_function: Callable[..., Any]) -> Callable[..., Any]:
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_widths(*(value for value in (*args, *kwargs.values()) if isinstance(value, int)))
        return filter_function(*args, **kwargs)

    # Jinja marks filters that take the environment with an attribute of the function.
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
    if isinstance(value, Iterator):  # of a filter, such as map
        value = list(value)
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
    return _environment.from_string(template.removeprefix("\ufeff"))
