"""Follows a JSON text character by character: where its values begin and end."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

_CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}


@dataclass
class JsonCursor:
    """A place in a JSON text that arrives in parts.

    Example:
        >>> cursor = JsonCursor()
        >>> [cursor.push(c) or tuple(cursor.path) for c in '{"a": 1}'][3:5], cursor.done
        ([('a',), ('a',)], True)
    """

    path: list[str | None] = field(default_factory=list)
    """Keys to the place; None for an element of a list."""
    done: bool = False
    """True behind the end of the outermost object or list."""
    in_string: bool = False
    _string: list[str] = field(default_factory=list)
    _escaped: bool = False
    _key_next: bool = False

    def push(self, character: str) -> str | None:
        """Takes a character; returns the string that it ends, if that is a value."""
        if self.in_string:
            self._string.append(character)
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self.in_string = False
                text = decoded("".join(self._string))
                if not self._key_next:
                    return text
                self.path[-1], self._key_next = text, False
            return None
        match character:
            case '"':
                self.in_string, self._string = True, ['"']
            case "{":
                self.path.append("")
                self._key_next = True
            case "[":
                self.path.append(None)
                self._key_next = False
            case "}" | "]":
                if self.path:
                    self.path.pop()
                self._key_next = False
                self.done = not self.path
            case "," if self.path and self.path[-1] is not None:
                self.path[-1], self._key_next = "", True
        return None


def decoded(literal: str) -> str:
    """The text of a JSON string; what stands between the quotes if it is none."""
    try:
        return str(json.loads(literal, strict=False))
    except ValueError:
        return literal[1:-1]


class Incomplete(ValueError):
    """A literal whose end has not arrived."""


@dataclass
class LiteralReader:
    """Reads values that look like Python's or JSON's, with other quotes perhaps and keys without any."""

    text: str
    at: int
    quotes: tuple[str, str]
    """The texts before and behind a string, beside quotation marks."""

    def value(self) -> Any:
        """The value at the place.

        Raises:
          Incomplete: the text ends inside of it.
          ValueError: there is none.
        """
        self._space()
        if self.at >= len(self.text):
            raise Incomplete
        opening, closing = self.quotes
        if len(opening) > 1 and self.text.startswith(opening, self.at):
            end = self.text.find(closing, self.at + len(opening))
            if end < 0:
                raise Incomplete
            start, self.at = self.at + len(opening), end + len(closing)
            return self.text[start:end]
        match self.text[self.at]:
            case "'" | '"' as mark:
                return self._quoted(mark)
            case "{":
                return dict(self._items("}"))
            case "[":
                return [value for _, value in self._items("]")]
        match = re.compile(r"[-+\w.]+").match(self.text, self.at)
        if match is None:
            if opening.startswith(self.text[self.at :]):
                raise Incomplete
            raise ValueError("no literal")
        if match.end() == len(self.text):
            raise Incomplete
        self.at = match.end()
        word = match[0]
        return _CONSTANTS[word] if word in _CONSTANTS else json.loads(word)

    def _items(self, close: str) -> list[tuple[Any, Any]]:
        self.at += 1
        items: list[tuple[Any, Any]] = []
        while True:
            self._space(",")
            if self.at >= len(self.text):
                raise Incomplete
            if self.text[self.at] == close:
                self.at += 1
                return items
            key = None
            if close == "}":
                key = self._key()
                self._space()
                if self.at >= len(self.text):
                    raise Incomplete
                if self.text[self.at] != ":":
                    raise ValueError("no colon")
                self.at += 1
            items.append((key, self.value()))

    def _key(self) -> str:
        match = re.compile(r"[\w.$-]+").match(self.text, self.at)
        if match is None:
            return str(self.value())
        if match.end() == len(self.text):
            raise Incomplete
        self.at = match.end()
        return match[0]

    def _quoted(self, mark: str) -> str:
        match = re.compile(rf"{mark}((?:[^{mark}\\]|\\.)*+){mark}", re.DOTALL).match(self.text, self.at)
        if match is None:
            raise Incomplete
        self.at = match.end()
        inner = match[1]
        if mark == "'":
            inner = inner.replace("\\'", "'").replace('"', '\\"')
        return decoded(f'"{inner}"')

    def _space(self, more: str = "") -> None:
        while self.at < len(self.text) and (self.text[self.at].isspace() or self.text[self.at] in more):
            self.at += 1
