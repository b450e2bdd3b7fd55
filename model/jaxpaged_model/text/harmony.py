"""Answers of gpt-oss: messages in channels (OpenAI's Harmony format)."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpaged_model.text.answer_parser import AnswerDelta, AnswerParser, ToolCallDelta, split_at

_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_BODY = "<|message|>"


class HarmonyParser(AnswerParser):
    """Parses one answer: analysis is thoughts, a message to a function is a call, all else is content.

    Args:
        reasoning: False: thoughts are content.
    """

    def __init__(self, *, reasoning: bool) -> None:
        self._reasoning = reasoning
        self._text = ""
        self._kind: str | None = None
        """Kind of the message whose text arrives; None = its header does."""
        self._num_calls = 0

    def push(self, text: str) -> AnswerDelta:
        self._text += text
        delta = AnswerDelta()
        while True:
            if self._kind is None:
                header, is_whole, rest = self._text.partition(_BODY)
                if not is_whole:
                    return delta
                self._text = rest
                delta += self._begin(header)
            body, found, self._text = split_at(self._text, _ENDS)
            delta += self._of(body)
            if not found:
                return delta
            self._kind = None

    def finish(self) -> AnswerDelta:
        text, self._text = self._text, ""
        if self._kind is None:  # no header: text of a model that does not keep to the format
            text = re.sub(r"<\|\w+\|>", "", text) if text.startswith("<|") else text
            return AnswerDelta(content=text)
        return self._of(text)

    def _begin(self, header: str) -> AnswerDelta:
        recipient = re.search(r"to=(?:functions\.)?([\w.:-]+)", header)
        channel = re.search(r"<\|channel\|>\s*(\w+)", header)
        if recipient is not None:
            self._kind = "call"
            self._num_calls += 1
            call_id = f"call_{secrets.token_hex(12)}"
            return AnswerDelta(tool_calls=(ToolCallDelta(self._num_calls - 1, call_id, recipient[1], ""),))
        is_analysis = channel is not None and channel[1] == "analysis"
        self._kind = "reasoning" if is_analysis and self._reasoning else "content"
        return AnswerDelta()

    def _of(self, text: str) -> AnswerDelta:
        if not text:
            return AnswerDelta()
        if self._kind == "call":
            return AnswerDelta(tool_calls=(ToolCallDelta(self._num_calls - 1, None, None, text),))
        return AnswerDelta(reasoning=text) if self._kind == "reasoning" else AnswerDelta(content=text)


def harmony_grammar(
    tools: Sequence[Mapping[str, Any]], special: Mapping[str, int], *, strict: bool = True
) -> str:
    """The grammar of an answer that calls one of some tools, in llguidance's dialect of Lark.

    Args:
        tools: OpenAI's form.
        special: special tokens of the vocabulary, by their text.
        strict: False: arguments may be any object.
    """

    def token(text: str) -> str:
        return f"<[{special[text]}]>" if text in special else json.dumps(text)

    rules = []
    for i, tool in enumerate(tools):
        schema = (tool["function"].get("parameters") if strict else None) or {"type": "object"}
        to = json.dumps(f"commentary to=functions.{tool['function']['name']} ")
        head = f'{token("<|channel|>")} {to} {token("<|constrain|>")} "json" {token("<|message|>")}'
        rules += [f"call{i}: {head} arguments{i}", f"arguments{i}: %json {json.dumps(schema)}"]
    analysis = (
        f'{token("<|channel|>")} "analysis" {token("<|message|>")} /(.|\\n)*/ '
        f'{token("<|end|>")} {token("<|start|>")} "assistant"'
    )
    calls = " | ".join(f"call{i}" for i in range(len(tools)))
    return "\n".join([f"start: analysis? ({calls})", f"analysis: {analysis}", *rules]) + "\n"
