"""Answers as templates render them, and what parsers make of them."""

from __future__ import annotations

import json
import re
from typing import Any

from jaxpaged_model.text.call_format import common_prefix, common_suffix
from jaxpaged_model.text.chat import render_chat
from jaxpaged_model.text.chat_format import ChatFormat

PROPERTIES = {
    "city": {"type": "string", "description": "A city"},
    "days": {"type": "integer", "description": "Days"},
    "exact": {"type": "boolean", "description": "Exactly"},
    "place": {"type": "object", "description": "A place"},
    "names": {"type": "array", "description": "Names"},
}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["city"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "description": "A function", "parameters": PARAMETERS}}
    for name in ("get_weather", "find_place")
]
ARGUMENTS: list[dict[str, Any]] = [
    {
        "city": 'São "Paulo" <b>',
        "days": 3,
        "exact": True,
        "place": {"a": [1, 2.5, None], "b": {"c": "d } ]"}},
        "names": ["x", "y, z"],
    },
    {"city": "Rome\nsecond line", "days": -1},
]
QUESTION = [{"role": "user", "content": "Question?"}]
_PLAIN = "Zz plain zZ"


def call(i: int) -> dict[str, Any]:
    """A call of the i-th tool; its id is one that every template accepts."""
    function = {"name": TOOLS[i]["function"]["name"], "arguments": ARGUMENTS[i]}
    return {"type": "function", "id": f"abcdef{i:03d}", "function": function}


def end_of(template: str) -> str:
    """The end-of-text token of a template."""
    return "<｜end▁of▁sentence｜>" if "<｜end▁of▁sentence｜>" in template else "</s>"


def derive(template: str) -> ChatFormat:
    return ChatFormat.derive(template, bos_token="<s>", eos_token=end_of(template))


def render_answer(template: str, message: dict[str, Any]) -> tuple[str, str]:
    """``(prompt, answer)``: the text that a model would have generated for a message."""
    chat_format = derive(template)
    variables: dict[str, Any] = {"bos_token": "<s>", "eos_token": end_of(template), "tools": TOOLS}

    def whole(answer: dict[str, Any]) -> str:
        messages = chat_format.messages([*QUESTION, answer])
        return render_chat(template, messages, add_generation_prompt=False, **variables)

    prompt, text = render_chat(template, QUESTION, **variables), whole(message)
    begin = common_prefix(prompt, text)
    opening = chat_format.reasoning[0].strip() if chat_format.reasoning else ""
    if opening and not chat_format.thinks(prompt) and begin.rstrip().endswith(opening):
        begin = begin[: begin.rindex(opening)]
    plain = whole({"role": "assistant", "content": _PLAIN})
    end = common_suffix(text, plain[plain.rindex(_PLAIN) + len(_PLAIN) :])
    answer = text[len(begin) : len(text) - len(end)]
    return begin, re.split(r"</s>|<｜end▁of▁sentence｜>|<\|eot_id\|>|<\|eom_id\|>", answer)[0]


def parse(chat_format: ChatFormat, prompt: str, answer: str, step: int) -> tuple[str, str, list[Any]]:
    """``(thoughts, content, calls)`` of an answer that arrives in pieces of ``step`` characters."""
    parser = chat_format.parser(tools=TOOLS, prompt=prompt)
    deltas = [parser.push(answer[i : i + step]) for i in range(0, len(answer), step)] + [parser.finish()]
    calls: dict[int, list[str]] = {}
    for delta in deltas:
        for new in delta.tool_calls:
            if new.name is not None:
                assert new.id and new.index == len(calls)
                calls[new.index] = [new.name, ""]
            calls[new.index][1] += new.arguments
    parsed = [(name, json.loads(arguments)) for name, arguments in calls.values()]
    return "".join(d.reasoning for d in deltas), "".join(d.content for d in deltas), parsed
