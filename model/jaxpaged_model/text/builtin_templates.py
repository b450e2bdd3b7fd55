"""Chat templates by the names of llama.cpp's `--chat-template`; none begins with BOS: `add_special` adds it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


def _each_message(body: str, opening: str = "") -> str:
    """A template that writes each message as `body`, and then `opening` before the assistant's answer."""
    loop = "{% for message in messages %}" + body + "{% endfor %}"
    return loop + ("{% if add_generation_prompt %}" + opening + "{% endif %}" if opening else "")


def _by_role(system: str, user: str, assistant: str) -> str:
    return (
        "{% if message.role == 'system' %}" + system + "{% elif message.role == 'user' %}" + user
        + "{% else %}" + assistant + "{% endif %}"
    )  # fmt: skip


def _llama2(system: str, user: str = "CONTENT", again: str = "[INST] ") -> str:
    start = "{% if not turn.open %}{% set turn.open = true %}" + again + "{% endif %}"
    body = start + _by_role(system, user + " [/INST]", user + "</s>{% set turn.open = false %}")
    return "{% set turn = namespace(open=true) %}[INST] " + _each_message(body)


def _mistral(before: str, after: str, answer: str = "CONTENT") -> str:
    start = "{% if not turn.open %}{% set turn.open = true %}" + before + "[INST]" + after + "{% endif %}"
    end = after + answer + "</s>{% set turn.open = false %}"
    body = start + _by_role("CONTENTNLNL", "CONTENT" + before + "[/INST]", end)
    return "{% set turn = namespace(open=false) %}" + _each_message(body)


# Gemma has no system role: its text goes before the next message of the user.
_GEMMA = "{% set system = namespace(text='') %}" + _each_message(
    "{% if message.role == 'system' %}{% set system.text = system.text ~ (message.content | trim) %}{% else %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}NL"
    "{% if system.text and message.role != 'assistant' %}{{ system.text }}NLNL{% set system.text = '' %}"
    "{% endif %}TRIMMED<end_of_turn>NL{% endif %}",
    "<start_of_turn>modelNL",
)
_DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
_VICUNA = "USER: CONTENTNL", "ASSISTANT: CONTENT</s>NL"
_COMMAND_R = "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>"
_COMMAND_R_ROLES = (
    _COMMAND_R.format(name) + "TRIMMED<|END_OF_TURN_TOKEN|>" for name in ("SYSTEM", "USER", "CHATBOT")
)

_TEMPLATES = {
    "chatml": _each_message("<|im_start|>ROLENLCONTENT<|im_end|>NL", "<|im_start|>assistantNL"),
    "llama2": _llama2("CONTENTNL"),
    "llama2-sys": _llama2("<<SYS>>NLCONTENTNL<</SYS>>NLNL"),
    "llama2-sys-bos": _llama2("<<SYS>>NLCONTENTNL<</SYS>>NLNL", again="<s>[INST] "),
    "llama2-sys-strip": _llama2("<<SYS>>NLTRIMMEDNL<</SYS>>NLNL", "TRIMMED"),
    "llama3": _each_message(
        "<|start_header_id|>ROLE<|end_header_id|>NLNLTRIMMED<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>NLNL",
    ),
    "llama4": _each_message(
        "<|header_start|>ROLE<|header_end|>NLNLTRIMMED<|eot|>",
        "<|header_start|>assistant<|header_end|>NLNL",
    ),
    "mistral-v1": _mistral(" ", " "),
    "mistral-v3": _mistral("", " ", "TRIMMED"),
    "mistral-v3-tekken": _mistral("", ""),
    "mistral-v7": _each_message(
        _by_role("[SYSTEM_PROMPT] CONTENT[/SYSTEM_PROMPT]", "[INST] CONTENT[/INST]", " CONTENT</s>")
    ),
    "mistral-v7-tekken": _each_message(
        _by_role("[SYSTEM_PROMPT]CONTENT[/SYSTEM_PROMPT]", "[INST]CONTENT[/INST]", "CONTENT</s>")
    ),
    "phi3": _each_message("<|ROLE|>NLCONTENT<|end|>NL", "<|assistant|>NL"),
    "phi4": _each_message("<|im_start|>ROLE<|im_sep|>CONTENT<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
    "zephyr": _each_message("<|ROLE|>NLCONTENT<|endoftext|>NL", "<|assistant|>NL"),
    "falcon3": _each_message("<|ROLE|>NLCONTENTNL", "<|assistant|>NL"),
    "chatglm4": "[gMASK]<sop>" + _each_message("<|ROLE|>NLCONTENT", "<|assistant|>NL"),
    "glmedge": _each_message("<|ROLE|>NLCONTENT", "<|assistant|>"),
    "gemma": _GEMMA,
    "vicuna": _each_message(_by_role("CONTENTNLNL", *_VICUNA), "ASSISTANT:"),
    "vicuna-orca": _each_message(_by_role("SYSTEM: CONTENTNL", *_VICUNA), "ASSISTANT:"),
    "deepseek": _each_message(
        _by_role("CONTENT", "### Instruction:NLCONTENTNL", "### Response:NLCONTENTNL<|EOT|>NL"),
        "### Response:NL",
    ),
    "deepseek2": _each_message(
        _by_role("CONTENTNLNL", "User: CONTENTNLNL", "Assistant: CONTENT" + _DEEPSEEK_END), "Assistant:"
    ),
    "deepseek3": _each_message(
        _by_role(
            "CONTENTNLNL", "<\uff5cUser\uff5c>CONTENT", "<\uff5cAssistant\uff5c>CONTENT" + _DEEPSEEK_END
        ),
        "<\uff5cAssistant\uff5c>",
    ),
    "command-r": _each_message(_by_role(*_COMMAND_R_ROLES), _COMMAND_R.format("CHATBOT")),
    "exaone3": _each_message(
        _by_role(
            "[|system|]TRIMMED[|endofturn|]NL", "[|user|]TRIMMEDNL", "[|assistant|]TRIMMED[|endofturn|]NL"
        ),
        "[|assistant|]",
    ),
    "granite": _each_message(
        "<|start_of_role|>ROLE<|end_of_role|>CONTENT<|end_of_text|>NL",
        "<|start_of_role|>assistant<|end_of_role|>",
    ),
    "openchat": _each_message(
        "{% if message.role == 'system' %}CONTENT{% else %}"
        "GPT4 Correct {{ message.role | capitalize }}: CONTENT{% endif %}<|end_of_turn|>",
        "GPT4 Correct Assistant:",
    ),
    "megrez": _each_message(
        "<|role_start|>ROLE<|role_end|>CONTENT<|turn_end|>", "<|role_start|>assistant<|role_end|>"
    ),
    "monarch": _each_message("{{ '' if loop.first else '<s>' }}ROLENLCONTENT</s>NL", "<s>assistantNL"),
    "smolvlm": "<|im_start|>"
    + _each_message(
        _by_role(
            "CONTENTNLNL", "User: CONTENT<end_of_utterance>NL", "Assistant: CONTENT<end_of_utterance>NL"
        ),
        "Assistant:",
    ),
}


def _source(template: str) -> str:
    """Jinja source; newlines become expressions, because Jinja drops one that follows a block tag."""
    for word, code in (
        ("CONTENT", "{{ message.content }}"),
        ("TRIMMED", "{{ message.content | trim }}"),
        ("ROLE", "{{ message.role }}"),
        ("NL", "{{ '\\n' }}"),
    ):
        template = template.replace(word, code)
    return template


BUILTIN_TEMPLATES: Mapping[str, str] = MappingProxyType(
    {name: _source(template) for name, template in _TEMPLATES.items()}
)
