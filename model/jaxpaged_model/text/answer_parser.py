"""Parses an answer as it arrives: thoughts, content and tool calls between markers."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpaged_model.text.call_format import ID, MARKER, WORD, CallFormat, lenient
from jaxpaged_model.text.call_reader import CallText, JsonReader, Reader, TagReader

_LONGEST_HEAD = 512
"""Characters of a call before its arguments, at most; a longer text is no call."""


@dataclass(frozen=True)
class ToolCallDelta:
    """New text of a tool call."""

    index: int
    """Number of the call in the answer."""
    id: str | None
    """In the first delta of a call."""
    name: str | None
    """In the first delta of a call."""
    arguments: str
    """A fragment of JSON; all fragments of a complete call are an object."""


@dataclass(frozen=True)
class AnswerDelta:
    """New text of an answer."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __add__(self, other: AnswerDelta) -> AnswerDelta:
        return AnswerDelta(
            self.reasoning + other.reasoning, self.content + other.content, self.tool_calls + other.tool_calls
        )


class AnswerParser:
    """Parses one answer. Text is returned as soon as it is certain what it is."""

    def push(self, text: str) -> AnswerDelta:
        """Adds text."""
        raise NotImplementedError

    def finish(self) -> AnswerDelta:
        """Ends the answer; returns what was held back."""
        raise NotImplementedError


class MarkerParser(AnswerParser):
    """Parses answers whose parts are between markers.

    Args:
        reasoning: markers around thoughts; None = they are part of the content.
        thinks: True if the prompt has begun the thoughts.
        calls: format of tool calls; None = they are part of the content.
        tools: OpenAI's form; their schemas give arguments a type where the format has none.
    """

    def __init__(
        self,
        *,
        reasoning: tuple[str, str] | None,
        thinks: bool,
        calls: CallFormat | None,
        tools: Sequence[Mapping[str, Any]],
    ) -> None:
        self._opening, self._closing = (marker.strip() for marker in reasoning or ("", ""))
        self._calls = calls
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        self._text = ""
        self._space = ""
        """White space at the end of the content, which is dropped before a call."""
        self._num_calls = 0
        self._ended = False
        self._reader: Reader | None = None
        self._head = ""
        """Text of a call before its arguments."""
        self._state: Callable[[], AnswerDelta | None] = self._begin
        """Reads the next part of the text; None = it needs more."""
        if thinks and reasoning is not None:
            self._state = self._thoughts_begin
        self._content_open = self._content_close = ""
        self._trigger: str | None = None
        self._is_bare = False
        if calls is not None:
            self._content_open = calls.content_open.strip()
            close = calls.content_close.strip()
            self._content_close = close if MARKER.match(close) else ""
            self._trigger = trigger_of(calls)
            self._is_bare = self._trigger is None
            if self._is_bare and self._content_open:  # answers to several recipients
                self._trigger = calls.separator.strip() or None
            self._first, self._next = _head(calls, first=True), _head(calls, first=False)

    def push(self, text: str) -> AnswerDelta:
        self._text += text
        total = AnswerDelta()
        while (delta := self._state()) is not None:
            total += delta
        return total

    def finish(self) -> AnswerDelta:
        self._ended = True
        delta = self.push("")
        if self._reader is not None and self._state == self._arguments:
            rest = self._reader.finish()
            self._text = (self._head + rest if rest and not self._reader.done else rest) + self._text
            delta += self._deltas(self._reader)
        rest, self._text = self._text, ""
        if self._state in (self._thoughts, self._thoughts_begin):
            return delta + AnswerDelta(reasoning=rest.rstrip())
        delta += self._content_of(rest)
        return delta if self._num_calls else delta + AnswerDelta(content=self._space)

    def _begin(self) -> AnswerDelta | None:
        """Before the content."""
        text = self._text.lstrip()
        # The closing marker alone: the prompt has the thoughts that are none.
        for marker, state in (
            (self._opening, self._thoughts_begin),
            (self._closing if self._opening else "", self._after_thoughts),
            (self._content_open, self._content),
        ):
            if marker and text.startswith(marker):
                self._text, self._state = text[len(marker) :], state
                self._opening = self._opening if marker == self._content_open else ""
                return AnswerDelta()
            if marker.startswith(text) and marker and not self._ended:
                return None
        if not text and not self._ended:
            return None
        if self._begins_bare(text):
            self._text, self._state = text, self._call_head
            return AnswerDelta()
        self._state = self._content
        return AnswerDelta()

    def _begins_bare(self, text: str) -> bool:
        """True for a call without a marker: an object, or a name that is no recipient of content."""
        if not (self._is_bare and self._schemas and self._calls is not None):
            return False
        return text.startswith("{") if self._calls.style == "json" else bool(self._content_open)

    def _thoughts_begin(self) -> AnswerDelta | None:
        self._text = self._text.lstrip()
        if not self._text:
            return None
        self._state = self._thoughts
        return AnswerDelta()

    def _thoughts(self) -> AnswerDelta | None:
        text, found, self._text = split_at(self._text, (self._closing,), is_whole=self._ended)
        if found is not None:
            self._state = self._after_thoughts
            return AnswerDelta(reasoning=text.rstrip())
        kept = text.rstrip()  # white space may be that before the marker
        self._text = text[len(kept) :] + self._text
        return AnswerDelta(reasoning=kept) if kept else None

    def _after_thoughts(self) -> AnswerDelta | None:
        self._text = self._text.lstrip()
        if not self._text:
            return None
        self._state = self._begin
        return AnswerDelta()

    def _content(self) -> AnswerDelta | None:
        markers = self._trigger or "", self._content_close
        text, found, self._text = split_at(self._text, markers, is_whole=self._ended)
        if found is None:
            return self._content_of(text) if text else None
        if found == self._trigger:
            self._text = found + self._text
            self._state = self._call_head
        return self._content_of(text)

    def _content_of(self, text: str) -> AnswerDelta:
        kept = (self._space + text).rstrip()
        self._space = (self._space + text)[len(kept) :]
        return AnswerDelta(content=kept)

    def _call_head(self) -> AnswerDelta | None:
        """At the beginning of the first call."""
        text = self._text.removeprefix(self._trigger or "") if self._is_bare else self._text
        match = self._first.match(text)
        if match is not None and self._begin_call(match, text):
            return AnswerDelta()
        if match is None and not self._ended and len(self._text) <= _LONGEST_HEAD:
            return None
        return self._no_call(self._text)

    def _no_call(self, text: str) -> AnswerDelta:
        """Text that looked like a call is content."""
        skipped = len(self._trigger or "") or 1
        self._text, self._state = text[skipped:], self._content
        return self._content_of(text[:skipped])

    def _begin_call(self, match: re.Match[str], text: str) -> bool:
        """Begins to read arguments; False if the function is unknown, and nothing marks this as a call."""
        assert self._calls is not None
        known = self._schemas.keys() if self._is_bare else None
        groups = match.groupdict()
        call = CallText(groups.get("name"), groups.get("id") or groups.get("id_before"))
        if call.name is not None and known is not None and call.name not in known:
            return False
        if self._calls.style == "tags":
            schema = self._schemas.get(call.name or "", {})
            self._reader = TagReader(self._calls, call, schema)
        else:
            self._reader = JsonReader(self._calls, call, known)
        self._head = text[: match.end()]
        self._text, self._state = text[match.end() :], self._arguments
        return True

    def _arguments(self) -> AnswerDelta | None:
        assert self._reader is not None
        reader, text = self._reader, self._text
        if not text and not self._ended:
            return None
        self._text = reader.feed(text)
        delta = self._deltas(reader)
        if reader.failed:
            return delta + self._no_call(self._head + self._text)
        if reader.done:
            self._space = ""
            self._state = self._call_close
            return delta
        return delta if delta.tool_calls else None

    def _deltas(self, reader: Reader) -> AnswerDelta:
        deltas = []
        for call, text in reader.take():
            if call is not None:
                self._num_calls += 1
                call_id = call.id or f"call_{secrets.token_hex(12)}"
                deltas.append(ToolCallDelta(self._num_calls - 1, call_id, call.name, ""))
            if text:
                deltas.append(ToolCallDelta(self._num_calls - 1, None, None, text))
        return AnswerDelta(tool_calls=tuple(deltas))

    def _call_close(self) -> AnswerDelta | None:
        """Behind the arguments."""
        assert self._calls is not None
        if self._calls.style != "list" and not self._skip(self._calls.call_close):
            return None
        self._state = self._next_call
        return AnswerDelta()

    def _next_call(self) -> AnswerDelta | None:
        """Behind a call: another one, or the end of all."""
        assert self._calls is not None
        calls = self._calls
        if calls.parallel and calls.style != "list":
            match = self._next.match(self._text)
            if match is not None and self._begin_call(match, self._text):
                return AnswerDelta()
            begins = {_squeezed(calls.separator + calls.call_open), _squeezed(calls.call_open)} - {""}
            text = _squeezed(self._text)
            if (
                not self._ended
                and len(text) <= _LONGEST_HEAD
                and (not text or any(begin.startswith(text) or text.startswith(begin) for begin in begins))
            ):
                return None
        if not self._skip(calls.section_close):
            return None
        self._text = self._text.lstrip()
        self._state = self._content
        return AnswerDelta()

    def _skip(self, marker: str) -> bool:
        """Takes a marker, if there is one; False if more text must tell."""
        match = re.match(lenient(marker), self._text)
        if match is not None:
            self._text = self._text[match.end() :]
        elif not self._ended and _squeezed(marker).startswith(_squeezed(self._text)):
            return False
        return True


def split_at(text: str, markers: Sequence[str], *, is_whole: bool = False) -> tuple[str, str | None, str]:
    """Divides a text at its first marker: ``(text before it, marker, rest)``.

    Without a marker, the rest is what may be the beginning of one.

    Args:
        markers: empty ones do not count.
        is_whole: True: no more text comes, so nothing is the beginning of a marker.
    """
    found = [(text.find(marker), marker) for marker in markers if marker and marker in text]
    if found:
        at, marker = min(found)
        return text[:at], marker, text[at + len(marker) :]
    held = 0 if is_whole else max((_overlap(text, marker) for marker in markers), default=0)
    cut = len(text) - held
    return text[:cut], None, text[cut:]


def trigger_of(calls: CallFormat) -> str | None:
    """The text that begins calls; None if they begin without any."""
    opening = calls.opening.strip().split(ID)[0]
    marker = MARKER.match(opening)
    return marker[0] if marker else opening or None


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of a text that is the beginning of a marker."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0


def _squeezed(text: str) -> str:
    """A text without white space, up to an id."""
    return re.sub(r"\s+", "", text).split(ID)[0]


def _head(calls: CallFormat, *, first: bool) -> re.Pattern[str]:
    """Regular expression of a call up to its arguments; the first one has the section's marker."""
    if first:
        before = lenient(calls.section_open)
    else:
        separator = lenient(calls.separator)
        before = separator if not calls.call_open.strip() else f"(?:{separator})?"
    before += lenient(calls.call_open, "id_before")
    if calls.style in ("json", "list"):
        return re.compile(before + r"(?=[\[{])")
    header = lenient(calls.before_arguments, "id")
    if calls.style == "named":
        follows = r"\{"
    elif calls.before_arguments.strip():  # what follows cannot be taken for a part of the name
        follows = ""
    else:
        follows = "|".join(lenient(text) for text in (calls.key_open, calls.call_close) if text.strip())
    return re.compile(rf"{before}(?P<name>{WORD}?){header}(?={follows})")
