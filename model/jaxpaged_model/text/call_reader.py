"""Readers of the arguments of a tool call, as JSON while they arrive."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from jaxpaged_model.text.call_format import KEY, CallFormat, lenient
from jaxpaged_model.text.json_cursor import Incomplete, JsonCursor, LiteralReader, decoded


@dataclass
class CallText:
    """A call whose arguments arrive."""

    name: str | None
    id: str | None


class Reader:
    """Reads the arguments of one call, or of a list of calls."""

    def __init__(self) -> None:
        self.done = self.failed = False
        self._new: list[tuple[CallText | None, str]] = []

    def feed(self, text: str) -> str:
        """Adds text; returns what stands behind the call, or all of it if it is none."""
        raise NotImplementedError

    def finish(self) -> str:
        """Ends the text within the arguments; returns what never became a call."""
        raise NotImplementedError

    def take(self) -> list[tuple[CallText | None, str]]:
        """New calls, and new text of the arguments of the last one."""
        new, self._new = self._new, []
        return new


class JsonReader(Reader):
    """Reads arguments that are JSON, within an object with the name or on their own.

    Args:
        known: names of functions, if text without one of them is no call; None = any name.
    """

    def __init__(self, calls: CallFormat, call: CallText, known: Collection[str] | None) -> None:
        super().__init__()
        self._calls, self._call, self._known = calls, call, known
        self._alone = calls.style == "named"
        self._path = [] if self._alone else list(calls.arguments_path)
        self._cursor = JsonCursor()
        self._base: int | None = 0 if self._alone else None
        self._inside = self._quoted = self._shown = False
        self._held = ""
        """Arguments whose function is not known yet."""
        self._raw = ""
        """All text, until the call is certain."""

    def feed(self, text: str) -> str:
        start = 0
        for i, character in enumerate(text):
            if not self._shown:
                self._raw += character
            if self._base is None and not character.isspace():
                self._base = 1 if character == "[" else 0  # models write a list where one call was meant
            begins = self._begins(character)
            if begins:
                self._inside, self._quoted, start = True, character == '"', i
            string = self._cursor.push(character)
            if string is not None and not self._inside:
                self._note(string)
            if self._inside and not begins and self._ends(character):
                self._add(text[start : i + 1], end=True)
                self._inside = False
                if self._alone:
                    self.done = True
                    return text[i + 1 :]
            elif not self._inside and not self._cursor.in_string and character in "}]":
                if len(self._cursor.path) == self._base and character == "}":
                    self._end_call()
                if self.failed:
                    return self._raw + text[i + 1 :]
                if self._cursor.done:
                    self.done = True
                    return text[i + 1 :]
        if self._inside:
            self._add(text[start:])
        return ""

    def finish(self) -> str:
        return "" if self._shown else self._raw

    def _begins(self, character: str) -> bool:
        cursor = self._cursor
        return (
            not self._inside
            and not cursor.in_string
            and character in '{["'
            and cursor.path[self._base :] == self._path
            and len(cursor.path) == (self._base or 0) + len(self._path)
        )

    def _ends(self, character: str) -> bool:
        cursor = self._cursor
        ends = character == '"' if self._quoted else character in "}]"
        return ends and not cursor.in_string and cursor.path[self._base :] == self._path

    def _note(self, string: str) -> None:
        """Takes a string that may be the call's name or id."""
        path = tuple(self._cursor.path[self._base :])
        if path == self._calls.name_path:
            self._call.name = string
        elif self._calls.id_path and path == self._calls.id_path:
            self._call.id = string

    def _add(self, text: str, *, end: bool = False) -> None:
        self._held += text
        name = self._call.name
        if (
            name is None
            or (self._known is not None and name not in self._known)
            or (self._quoted and not end)
        ):
            return
        if self._quoted:
            self._held = decoded(self._held)
        call = None if self._shown else self._call
        self._new.append((call, self._held))
        self._held, self._shown, self._raw = "", True, ""

    def _end_call(self) -> None:
        """Ends a call's object."""
        if not self._shown:
            self._add("" if self._held else "{}", end=True)
        self.failed = not self._shown
        self._call = CallText(None, None)
        self._shown = False


class TagReader(Reader):
    """Reads arguments whose keys and values stand between texts.

    Args:
        schema: JSON schema of the arguments.
    """

    def __init__(self, calls: CallFormat, call: CallText, schema: Mapping[str, Any]) -> None:
        super().__init__()
        self._calls, self._schema = calls, schema
        self._text = ""
        self._num = 0
        self._new.append((call, ""))
        key = rf"{lenient(calls.key_open)}(?P<key>[^\s<>=:/\"'][^\s<>=:\"']*){_behind_key(calls)}"
        separated = f"(?:{lenient(calls.value_separator)})?{key}"
        self._keys = re.compile(key), re.compile(separated)
        self._string_open = _opening(calls.string_open)
        self._other_open = _opening(calls.other_open)
        self._close = re.compile(lenient(calls.call_close)) if calls.call_close.strip() else None

    def feed(self, text: str) -> str:
        self._text += text
        while True:
            if self._close is not None and self._close.match(self._text):
                self._end()
                return self._text
            match = self._keys[self._num > 0].match(self._text)
            value = None if match is None else self._value(match["key"], self._text[match.end() :])
            if match is None or value is None:
                return ""
            argument, self._text = value
            self._argument(match["key"], argument)

    def finish(self) -> str:
        """An argument without an end is lost to the call; what stands there instead of one is content."""
        match = self._keys[self._num > 0].match(self._text)
        if match is not None:
            self._argument(match["key"], self._typed(match["key"], self._text[match.end() :]))
        self._end()
        return "" if match is not None else self._text

    def _argument(self, key: str, value: Any) -> None:
        text = f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}"
        self._new.append((None, (", " if self._num else "{") + text))
        self._num += 1

    def _end(self) -> None:
        self._new.append((None, "}" if self._num else "{}"))
        self.done = True

    def _value(self, key: str, text: str) -> tuple[Any, str] | None:
        """A value, and the text behind it; None if it is not complete."""
        calls = self._calls
        if calls.string_close:
            reader = LiteralReader(text, 0, (calls.string_open, calls.string_close))
            try:
                value = reader.value()
            except Incomplete:
                return None
            except (ValueError, RecursionError):  # no literal: text up to the call's end
                end = text.find(calls.call_close.strip())
                return None if end < 0 else (text[:end].strip(), text[end:])
            rest = text[reader.at :]
            close = calls.value_close.strip()
            return value, rest.lstrip().removeprefix(close) if close and rest.lstrip().startswith(
                close
            ) else rest
        kind = None
        for opening, is_string in ((self._string_open, True), (self._other_open, False)):
            match = opening.match(text) if opening is not None else None
            if match is not None:
                text, kind = text[match.end() :], is_string
                break
        close = calls.value_close.replace(KEY, key)
        mark = close.strip() or close
        at = text.find(mark)
        if at >= 0:
            raw, rest = text[:at].removesuffix(close[: close.index(mark)]), text[at + len(mark) :]
            return (raw if kind else self._typed(key, raw, is_other=kind is False)), rest
        return None

    def _typed(self, key: str, raw: str, *, is_other: bool = False) -> Any:
        """A raw value: text if its schema says so, else JSON if it is that."""
        if raw.startswith("<![CDATA[") and raw.endswith("]]>"):
            raw = raw[9:-3]
        schema = {} if is_other else self._schema.get("properties", {}).get(key, {})
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        if kind == "string" or (isinstance(kind, list) and "string" in kind):
            return raw
        for read in (json.loads, _python_literal):  # some templates write Python's literals
            try:
                value = read(raw.strip())
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            return value
        return raw


def _python_literal(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of escapes that are none
        return ast.literal_eval(text)


def _behind_key(calls: CallFormat) -> str:
    """Regular expression of the text between key and value; white space of a raw value is its own."""
    if calls.string_close:
        return lenient(calls.key_close)
    mark = calls.key_close.rstrip()
    return lenient(mark).removesuffix(r"\s*+") + f"(?:{re.escape(calls.key_close[len(mark) :])})?"


def _opening(text: str) -> re.Pattern[str] | None:
    """Regular expression of the text before a value; a type in it may be another one."""
    if not text.strip():
        return None
    return re.compile(r"\s*" + re.sub(r"number|integer", r"\\w+", re.escape(text.strip())))
