"""Format of tool calls, derived from how a chat template renders them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Render = Callable[[dict[str, Any], list[dict[str, Any]] | None], str | None]
Path = tuple[str, ...]

ID, INDEX, KEY, NAME = "\ue000", "\ue001", "\ue002", "\ue003"
"""Stand in a marker for the call's id, for its number, for an argument's key, and for the function's name."""
MARKER = re.compile(r"\]<\]\w+\[>\[|</?[^<>\s]{1,60}>|\[/?[A-Z_]{2,30}\]")
"""A word that may be a special token, and is compared as a whole."""
WORD = r"[A-Za-z0-9_.:-]+"
"""Regular expression of a function's name."""
_ID = r'[^\s<>\[\]"]{1,64}?'
_UNIT = re.compile(MARKER.pattern + "|.", re.DOTALL)
_NAMES = ("zq_first", "zq_second")
_KEYS = ("zq_key_a", "zq_key_b")
_VALUES = ("zq value a", "zq value b")
_NUMBERS = (48213, 59624)
_IDS = ("zqid00001", "zqid00002")
_TEXT = "Zq text Zq"


@dataclass(frozen=True)
class CallFormat:
    """Texts around and inside of tool calls, in the order of an answer."""

    style: Literal["json", "list", "named", "tags"]
    """json: an object with name and arguments; list: a JSON list of those; named: a name, text, and the
    arguments as JSON; tags: a name, and each argument between texts."""
    section_open: str
    """Text before all calls."""
    call_open: str
    """Text before each call; in styles named and tags, before its name."""
    call_close: str
    """Text behind each call."""
    separator: str
    """Text between calls."""
    section_close: str
    """Text behind all calls."""
    parallel: bool
    """True if an answer may have several calls."""
    arguments_as_text: bool
    """True: the template takes arguments as JSON text, not as an object."""
    content_open: str = ""
    """Text before the content of an answer."""
    content_close: str = ""
    """Text behind it."""
    name_path: Path = ()
    """Keys to the name in a call's object; styles json and list."""
    arguments_path: Path = ()
    """Keys to the arguments."""
    id_path: Path = ()
    """Keys to the call's id; empty = it has none."""
    before_arguments: str = ""
    """Text between name and arguments; styles named and tags."""
    key_open: str = ""
    """Style tags: text before an argument's key."""
    key_close: str = ""
    """Text between key and value."""
    string_open: str = ""
    """Text before a value that is a string, behind ``key_close``."""
    string_close: str = ""
    """Text behind such a value; if there is any, all values are literals, else they are raw text."""
    other_open: str = ""
    """Text before a value that is no string, behind ``key_close``."""
    value_close: str = ""
    """Text behind a value."""
    value_separator: str = ""
    """Text between arguments."""
    arguments_close: str = ""
    """Text behind the last argument."""

    @property
    def markers(self) -> tuple[str, ...]:
        """All texts that may hold special tokens."""
        return tuple(value for value in vars(self).values() if isinstance(value, str))

    @property
    def opening(self) -> str:
        """The text that begins the calls of an answer."""
        return self.section_open + self.call_open


def lenient(marker: str, id_group: str | None = None) -> str:
    """Regular expression of a marker, with any white space in place of its own."""
    # White space is matched possessively: neighbouring patterns would else divide it in all ways.
    pattern = r"\s*+".join(re.escape(word) for word in marker.split())
    if id_group:
        pattern = pattern.replace(ID, f"(?P<{id_group}>{_ID})", 1)
    for placeholder, expression in {ID: _ID, INDEX: r"\d+", NAME: WORD, KEY: r"[^<>]*?"}.items():
        pattern = pattern.replace(placeholder, expression)
    return rf"\s*+{pattern}\s*+"


def _tool(name: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": "An argument."} for key in _KEYS}
    parameters = {"type": "object", "properties": properties, "required": list(_KEYS)}
    function = {"name": name, "description": "A function.", "parameters": parameters}
    return {"type": "function", "function": function}


_TOOLS = [_tool(name) for name in _NAMES]
_STRINGS = dict(zip(_KEYS, _VALUES, strict=True))


def derive_calls(render: Render, end: str = "") -> CallFormat | None:
    """The format of the calls that a template renders; None if it renders none that can be read back.

    Args:
        render: text of a conversation with an assistant's message and tools; None if it is refused.
        end: the token behind an answer.
    """
    for as_text in (False, True):
        for content in ("", None):
            for ids in (_IDS, tuple(f"functions.{name}:{i}" for i, name in enumerate(_NAMES))):
                probe = _Probe(render, as_text, content, ids, end)
                found = (
                    probe.json_calls() or probe.named_calls() or (None if as_text else probe.tagged_calls())
                )
                if found is not None:
                    return found
    return None


class _Probe:
    """Renderings of calls by one template."""

    def __init__(
        self, render: Render, as_text: bool, content: str | None, ids: Sequence[str], end: str
    ) -> None:
        self._render, self._as_text, self._content, self._ids, self._end = render, as_text, content, ids, end
        self._plain = render({"role": "assistant", "content": _TEXT}, _TOOLS) or ""
        self._around: dict[str, Any] = {"content_open": "", "content_close": ""}
        self.one = self._region([_STRINGS]) if _TEXT in self._plain else None
        self.two = self._region([_STRINGS, _STRINGS]) if self.one else None
        if self.two is not None and _NAMES[1] not in self.two:
            self.two = None

    def _region(self, all_arguments: Sequence[Mapping[str, Any]]) -> str | None:
        """The text of calls, without the text around an answer."""
        calls = []
        for i, arguments in enumerate(all_arguments):
            given = json.dumps(arguments) if self._as_text else dict(arguments)
            function = {"name": _NAMES[i], "arguments": given}
            calls.append({"type": "function", "id": self._ids[i], "function": function})
        text = self._render({"role": "assistant", "content": self._content, "tool_calls": calls}, _TOOLS)
        if text is None:
            return None
        begin = len(common_prefix(text, self._plain[: self._plain.rindex(_TEXT)]))
        end = len(common_suffix(text[begin:], self._plain[self._plain.rindex(_TEXT) + len(_TEXT) :]))
        region = text[begin : len(text) - end]
        if self._end and self._end in region:
            region = region[: region.index(self._end)]
        if _NAMES[0] not in region:
            return None
        if len(all_arguments) == 1:
            at = self._plain.rindex(_TEXT)
            self._around = {
                "content_open": self._plain[begin:at],
                "content_close": self._plain[at + len(_TEXT) : len(self._plain) - end],
            }
        if self._ids is _IDS:
            for given_id in _IDS:
                region = region.replace(given_id, ID)
        return region

    def _format(self, style: Any, before: str, between: str | None, behind: str, **fields: Any) -> CallFormat:
        texts = _split(before, between, behind)
        return CallFormat(style, **texts, **self._around, arguments_as_text=self._as_text, **fields)

    def json_calls(self) -> CallFormat | None:
        """Calls that are JSON objects, or a list of them."""
        if self.one is None:
            return None
        for at, end, value in _json_values(self.one):
            in_list = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)
            call = value[0] if in_list else value
            name = _path_of(call, _NAMES[0])
            arguments = _path_of(call, _STRINGS) or _path_of(call, json.dumps(_STRINGS))
            if not name or not arguments:
                continue
            before, behind, between = self.one[:at], self.one[end:], None
            if in_list:
                between = "" if self.two is not None else None
            elif self.two is not None:
                spans = [
                    (a, e)
                    for a, e, v in _json_values(self.two)
                    if _path_of(v, _NAMES[0]) or _path_of(v, _NAMES[1])
                ]
                between = self.two[spans[0][1] : spans[1][0]] if len(spans) == 2 else None
            paths = {"name_path": name, "arguments_path": arguments, "id_path": _path_of(call, ID) or ()}
            return self._format("list" if in_list else "json", before, between, behind, **paths)
        return None

    def named_calls(self) -> CallFormat | None:
        """Calls that are a name and a JSON object of arguments."""
        if self.one is None:
            return None
        found = _json_equal(self.one, _STRINGS, self.one.find(_NAMES[0]))
        if found is None:
            return None
        name = self.one.find(_NAMES[0])
        header = self.one[name + len(_NAMES[0]) : found[0]].replace(_NAMES[0], NAME)
        between = None
        if self.two is not None:
            first = _json_equal(self.two, _STRINGS, self.two.find(_NAMES[0]))
            second = _behind(self.two, _NAMES[1], _NAMES[0])
            last = _json_equal(self.two, _STRINGS, second)
            if first is not None and last is not None and first[1] <= second:
                between = self.two[first[1] : second]
                header = _with_index(
                    header, self.two[second + len(_NAMES[1]) : last[0]].replace(_NAMES[1], NAME)
                )
        return self._format("named", self.one[:name], between, self.one[found[1] :], before_arguments=header)

    def tagged_calls(self) -> CallFormat | None:
        """Calls that are a name, and keys and values between texts."""
        numbers = self._region([dict(zip(_KEYS, _NUMBERS, strict=True))]) if self.one else None
        if self.one is None or numbers is None:
            return None
        strings, others = _tags(self.one, _VALUES), _tags(numbers, tuple(map(str, _NUMBERS)))
        if strings is None or others is None:
            return None
        key_close = common_prefix(strings.key_close, others.key_close)
        string_open, other_open = strings.key_close[len(key_close) :], others.key_close[len(key_close) :]
        value_close = strings.value_close
        string_close = ""
        if string_open and not other_open:
            string_close = value_close.removesuffix(others.value_close)
            value_close = others.value_close
        tail = strings.tail
        if string_close and not strings.value_close:  # the closing quote is behind the last value alone, too
            return None
        between = None
        if self.two is not None:
            second = _behind(self.two, _NAMES[1], _NAMES[0])
            end = self.two.find(_VALUES[1]) + len(_VALUES[1] + strings.value_close.replace(KEY, _KEYS[1]))
            between = self.two[end:second] if end <= second else None
        return self._format(
            "tags",
            self.one[: strings.name],
            between,
            tail,
            before_arguments=strings.header,
            key_open=strings.key_open,
            key_close=key_close,
            string_open=string_open,
            string_close=string_close,
            other_open=other_open,
            value_close=value_close,
            value_separator=strings.separator,
        )


@dataclass(frozen=True)
class _Tags:
    """Texts of a call with tags."""

    name: int
    header: str
    key_open: str
    key_close: str
    value_close: str
    separator: str
    tail: str


def _tags(text: str, values: Sequence[str]) -> _Tags | None:
    places = [text.find(_NAMES[0])]
    for word in (_KEYS[0], values[0], _KEYS[1], values[1]):
        places.append(text.find(word, max(places[-1], 0)))
    if min(places) < 0:
        return None
    name, key_a, value_a, key_b, value_b = places
    header = text[name + len(_NAMES[0]) : key_a].replace(_NAMES[0], NAME)
    key_close = text[key_a + len(_KEYS[0]) : value_a]
    middle = text[value_a + len(values[0]) : key_b].replace(_KEYS[0], KEY)
    tail = text[value_b + len(values[1]) :].replace(_KEYS[1], KEY)
    if text[key_b + len(_KEYS[1]) : value_b] != key_close:
        return None
    key_open = common_suffix(header, middle)
    rest = middle[: len(middle) - len(key_open)]
    value_close = common_prefix(rest, tail)
    separator, tail = rest[len(value_close) :], tail[len(value_close) :]
    return _Tags(
        name, header[: len(header) - len(key_open)], key_open, key_close, value_close, separator, tail
    )


def _behind(text: str, word: str, other: str) -> int:
    """Place of the first ``word`` behind the first ``other``."""
    return text.find(word, text.find(other))


def common_prefix(a: str, b: str) -> str:
    """The beginning that two texts share; markers are not cut."""
    return "".join(_shared(_UNIT.findall(a), _UNIT.findall(b)))


def common_suffix(a: str, b: str) -> str:
    """The end that two texts share; markers are not cut."""
    return "".join(_shared(_UNIT.findall(a)[::-1], _UNIT.findall(b)[::-1])[::-1])


def _shared(a: list[str], b: list[str]) -> list[str]:
    length = next(
        (i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b))
    )
    return a[:length]


def _with_index(header: str, other: str) -> str:
    """A header with its number marked, if it differs from another call's in that alone."""
    numbers = re.findall(r"\d+", header)
    if header != other and numbers and len(numbers) == len(re.findall(r"\d+", other)):
        return re.sub(r"\d+", INDEX, header, count=1)
    return header


def _json_values(text: str) -> list[tuple[int, int, Any]]:
    """The outermost JSON objects and lists of a text: ``(begin, end, value)``."""
    found, at = [], 0
    while (match := re.compile(r"[\[{]").search(text, at)) is not None:
        try:
            value, at = json.JSONDecoder().raw_decode(text, match.start())
        except ValueError:
            at = match.start() + 1
        else:
            found.append((match.start(), at, value))
    return found


def _json_equal(text: str, wanted: Any, start: int) -> tuple[int, int] | None:
    """``(begin, end)`` of the first JSON object that equals ``wanted``."""
    for match in re.compile("{").finditer(text, max(start, 0)):
        try:
            value, end = json.JSONDecoder().raw_decode(text, match.start())
        except ValueError:
            continue
        if value == wanted:
            return match.start(), end
    return None


def _path_of(value: Any, wanted: Any) -> Path | None:
    """Keys to a value inside of nested objects."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if inner == wanted:
                return (key,)
            if (path := _path_of(inner, wanted)) is not None:
                return (key, *path)
    return None


def _split(before: str, between: str | None, behind: str) -> dict[str, Any]:
    """The texts around calls, from those before one, between two, and behind one."""
    if between is None:
        return {
            "section_open": "", "call_open": before, "call_close": behind, "separator": "",
            "section_close": "", "parallel": False,
        }  # fmt: skip
    call_open = common_suffix(before, between)
    rest = between[: len(between) - len(call_open)]
    call_close = common_prefix(rest, behind)
    return {
        "section_open": before[: len(before) - len(call_open)],
        "call_open": call_open,
        "call_close": call_close,
        "separator": rest[len(call_close) :],
        "section_close": behind[len(call_close) :],
        "parallel": True,
    }
