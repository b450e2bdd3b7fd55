"""Formats of calls that no template renders: the model was trained to write them, its template only lists the tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxpaged_model.text.call_format import CallFormat

_LFM2 = CallFormat(
    "tags", section_open="<|tool_call_start|>[", call_open="", call_close=")", separator=", ",
    section_close="]<|tool_call_end|>", parallel=True, arguments_as_text=False, before_arguments="(",
    key_close="=", string_open='"', string_close='"', value_separator=", ",
)  # fmt: skip
_GRANITE = CallFormat(
    "list", section_open="<|tool_call|>", call_open="", call_close="", separator="", section_close="",
    parallel=True, arguments_as_text=False, name_path=("name",), arguments_path=("arguments",),
)  # fmt: skip
KNOWN_FORMATS: tuple[tuple[tuple[str, ...], CallFormat], ...] = (
    (("List of tools: <|tool_list_start|>[",), _LFM2),
    (("List of tools: [", "<|im_start|>", "keep_past_thinking"), _LFM2),
    (("<|tool_call|>", "<|start_of_role|>", "available_tools"), _GRANITE),
)
"""Texts of a template, all of which stand in it, and the format of its model's calls."""


def known_calls(template: str) -> CallFormat | None:
    """The format of the calls of a known model; None if the template is of no such model."""
    return next((calls for texts, calls in KNOWN_FORMATS if all(text in template for text in texts)), None)


def is_known(calls: CallFormat) -> bool:
    """True if a format is one of the table, so that calls must be written as content."""
    return any(calls is known for _, known in KNOWN_FORMATS)


def calls_as_content(message: Mapping[str, Any], calls: CallFormat) -> dict[str, Any]:
    """A message whose calls are a part of its content, for templates that would leave them out.

    Args:
        message: as `render_chat` takes it; arguments of calls are objects.
        calls: a format of `KNOWN_FORMATS`.
    """
    if not message.get("tool_calls"):
        return dict(message)
    functions = [call["function"] for call in message["tool_calls"]]
    if calls.style == "list":
        body = _json([{"name": each["name"], "arguments": each["arguments"]} for each in functions])
    else:
        body = calls.separator.join(_tagged(each, calls) for each in functions)
    text = f"{message.get('content') or ''}{calls.section_open}{body}{calls.section_close}"
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": text}


def _tagged(function: Mapping[str, Any], calls: CallFormat) -> str:
    arguments = calls.value_separator.join(
        key + calls.key_close + _json(value) for key, value in function["arguments"].items()
    )
    return function["name"] + calls.before_arguments + arguments + calls.call_close


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
