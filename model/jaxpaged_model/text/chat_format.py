"""Format of a model's answers: markers of thoughts and tool calls, derived from its chat template.

The template is rendered with and without thoughts, with one call and with two, and the texts are compared, so
that models nobody here has seen are served, too. (llama.cpp's idea, docs/autoparser.md.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from jaxpaged_model.text.answer_parser import AnswerParser, MarkerParser, trigger_of
from jaxpaged_model.text.call_format import MARKER, CallFormat, common_prefix, derive_calls
from jaxpaged_model.text.call_grammar import CallGrammar
from jaxpaged_model.text.chat import ChatTemplateError, render_chat
from jaxpaged_model.text.harmony import HarmonyParser, harmony_grammar
from jaxpaged_model.text.known_formats import calls_as_content, is_known, known_calls

_TEXT, _THOUGHTS = "Zq text Zq", "Zq thoughts Zq"
_QUESTION = {"role": "user", "content": "Zq question Zq"}
_KNOWN_THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""Markers of thoughts that templates take out of a conversation, and so do not render."""
HARMONY = "<|channel|>"
"""Marker of gpt-oss's format, which stands for itself."""


@dataclass(frozen=True)
class ChatFormat:
    """Markers of a model's answers."""

    reasoning: tuple[str, str] | None
    """Markers before and behind thoughts; None = the model has none."""
    calls: CallFormat | None
    """Tool calls; None = the template knows none."""
    is_harmony: bool = False
    """True: gpt-oss's channels."""
    thinking_ends: tuple[str, ...] = ()
    """Ends of prompts in which thoughts have begun."""

    @staticmethod
    def derive(template: str, *, bos_token: str = "", eos_token: str = "") -> ChatFormat:
        """The format of a chat template; one without markers for a template that cannot be rendered."""
        return _derive(template, bos_token, eos_token)

    @property
    def special_markers(self) -> tuple[str, ...]:
        """Texts that are markers; those that are special tokens must be written out for the parser."""
        if self.is_harmony:
            return ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>")
        texts = [*(self.reasoning or ()), *(self.calls.markers if self.calls else ())]
        return tuple(dict.fromkeys(word for text in texts for word in MARKER.findall(text)))

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages as the template wants them: arguments of calls as objects, or as JSON text."""
        if self.calls is not None and is_known(self.calls):
            return [calls_as_content(message, self.calls) for message in messages]
        if self.calls is None or not self.calls.arguments_as_text:
            return [dict(message) for message in messages]
        return [_arguments_as_text(message) for message in messages]

    def thinks(self, prompt: str) -> bool:
        """True if a prompt ends with thoughts that have begun."""
        return any(prompt.endswith(end) for end in self.thinking_ends)

    def parser(
        self, *, tools: Sequence[Mapping[str, Any]], prompt: str, reasoning: bool = True
    ) -> AnswerParser:
        """A parser of one answer.

        Args:
            tools: OpenAI's form; without any, calls are content.
            prompt: the rendered conversation.
            reasoning: False: thoughts are content.
        """
        if self.is_harmony:
            return HarmonyParser(reasoning=reasoning)
        return MarkerParser(
            reasoning=self.reasoning if reasoning else None,
            thinks=self.thinks(prompt),
            calls=self.calls if tools else None,
            tools=tools,
        )

    def call_grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        parallel: bool,
        special: Mapping[str, int],
        stops: Sequence[str] = (),
        strict: bool = True,
    ) -> str:
        """The grammar of an answer that calls tools, see `CallGrammar`."""
        if self.is_harmony:
            return harmony_grammar(tools, special, strict=strict)
        assert self.calls is not None
        return CallGrammar(self.calls, tools, special=special, stops=stops, strict=strict).write(
            parallel=parallel
        )

    @property
    def trigger(self) -> str | None:
        """The text that begins calls within an answer; None if nothing does."""
        return HARMONY if self.is_harmony else trigger_of(self.calls) if self.calls else None


def _arguments_as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as JSON text."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": text}})
    return {**message, "tool_calls": calls}


@lru_cache(maxsize=64)
def _derive(template: str, bos_token: str, eos_token: str) -> ChatFormat:
    def render(
        answer: dict[str, Any] | None, tools: list[dict[str, Any]] | None = None, **variables: Any
    ) -> str | None:
        """The text of a conversation with an answer, or that asks for one; None if the template refuses."""
        messages = [_QUESTION] if answer is None else [_QUESTION, answer]
        extra: dict[str, Any] = {"tools": tools} if tools else {}
        extra |= variables
        try:
            return render_chat(
                template,
                messages,
                bos_token=bos_token,
                eos_token=eos_token,
                add_generation_prompt=answer is None,
                **extra,
            )
        except ChatTemplateError:
            return None

    if HARMONY in template and "<|message|>" in template:
        return ChatFormat(None, None, is_harmony=True)
    reasoning = _derive_reasoning(template, render)
    calls = derive_calls(render, eos_token) or known_calls(template)
    if calls is not None and reasoning is not None:
        # Thoughts that stand before every answer, empty ones too, are no part of a call.
        calls = replace(calls, section_open=_without_thoughts(calls.section_open, reasoning))
    if calls is not None and reasoning is not None and calls.content_open.strip():
        opening, closing = reasoning
        reasoning = opening, closing.removesuffix(calls.content_open) or closing
    ends = [] if reasoning is None else _thinking_ends(reasoning, render)
    return ChatFormat(reasoning, calls, thinking_ends=tuple(ends))


def _thinking_ends(reasoning: tuple[str, str], render: Any) -> list[str]:
    opening, closing = (marker.strip() for marker in reasoning)
    ends = []
    for variables in (
        {},
        {"enable_thinking": True, "thinking": True},
        {"enable_thinking": False, "thinking": False},
    ):
        text = render(None, **variables) or ""
        at = text.rfind(opening, text.rfind(_QUESTION["content"]))
        if opening and at >= 0 and closing not in text[at:] and text[at:] not in ends:
            ends.append(text[at:])
    return ends


def _without_thoughts(text: str, reasoning: tuple[str, str]) -> str:
    opening, closing = (marker.strip() for marker in reasoning)
    return re.sub(rf"^\s*{re.escape(opening)}\s*{re.escape(closing)}\s*", "", text)


def _derive_reasoning(template: str, render: Any) -> tuple[str, str] | None:
    plain = render({"role": "assistant", "content": _TEXT})
    for name in ("reasoning_content", "reasoning", "thinking"):
        if name not in template:
            continue
        text = render({"role": "assistant", "content": _TEXT, name: _THOUGHTS})
        if plain is None or text is None or _THOUGHTS not in text or _TEXT not in text:
            continue
        begin, end = text.index(_THOUGHTS), text.index(_THOUGHTS) + len(_THOUGHTS)
        if text.find(_TEXT, end) < 0:
            continue
        start = len(common_prefix(plain, text))
        # The marker's beginning may equal that of the plain answer, as in an empty pair of markers.
        opening = text[min(start, begin) : begin]
        closing = text[end : text.index(_TEXT, end)]
        if not opening.strip() or not opening.lstrip().startswith(("<", "[")):
            opening = _last_marker(text[:begin])
        if opening.strip() and closing.strip():
            return opening, closing
    for opening, closing in _KNOWN_THOUGHTS:
        if closing in template:
            return opening, closing
    return None


def _last_marker(text: str) -> str:
    """The marker at the end of a text."""
    found = re.search(rf"(?:{MARKER.pattern})\s*\Z", text)
    return found[0] if found else ""
