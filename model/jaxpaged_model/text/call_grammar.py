"""Grammar of tool calls in a model's own format, in llguidance's dialect of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpaged_model.text.call_format import ID, INDEX, KEY, MARKER, NAME, CallFormat

_ANY = {"type": "object"}
_PLACEHOLDER = re.compile(f"([{ID}{INDEX}])")


class CallGrammar:
    """Writes the grammar of the calls of some tools.

    Args:
        calls: the format.
        tools: OpenAI's form.
        special: special tokens of the vocabulary, by their text: they are written as tokens, not as text.
        stops: texts of tokens that end an answer, which are no part of a call.
        strict: False: arguments may be any object.
    """

    def __init__(
        self,
        calls: CallFormat,
        tools: Sequence[Mapping[str, Any]],
        *,
        special: Mapping[str, int],
        stops: Sequence[str],
        strict: bool = True,
    ) -> None:
        self._calls, self._special, self._stops = calls, special, stops
        self._schemas: dict[str, dict[str, Any]] = {
            tool["function"]["name"]: (tool["function"].get("parameters") or _ANY) if strict else _ANY
            for tool in tools
        }
        self._rules: list[str] = []
        marks = sorted(special, key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks))) if marks else None

    def write(self, *, parallel: bool) -> str:
        """The grammar of one call, or of one or more.

        Args:
            parallel: True if there may be several.
        """
        calls = self._calls
        many = parallel and calls.parallel
        if calls.style == "list":
            each = {
                "anyOf": [self._object(name, f"/items/anyOf/{i}") for i, name in enumerate(self._schemas)]
            }
            schema = {"type": "array", "items": each, "minItems": 1, **({} if many else {"maxItems": 1})}
            body = self._json(schema)
        else:
            names = [f"call{i}" for i in range(len(self._schemas))]
            for rule, name in zip(names, self._schemas, strict=True):
                self._rules.append(f"{rule}: {self._call(name)}")
            self._rules.append("call: " + " | ".join(names))
            body = f"call ({self._text(calls.separator)} call)*" if many else "call"
        start = f"start: {self._text(calls.section_open)} {body} {self._text(self._end(calls.section_close))}"
        return "\n".join([start, *self._rules]) + "\n"

    def _end(self, text: str) -> str:
        """A text up to a token that ends the answer."""
        places = [text.find(stop) for stop in self._stops if stop and stop in text]
        return text[: min(places)] if places else text

    def _text(self, text: str, *, name: str = "", key: str = "") -> str:
        """A text of the format: strings, special tokens and placeholders."""
        parts = []
        for piece in _PLACEHOLDER.split(text.replace(NAME, name).replace(KEY, key)):
            if piece == ID:
                parts.append("/[A-Za-z0-9]{9}/")
            elif piece == INDEX:
                parts.append("/[0-9]{1,3}/")
            else:
                parts += self._pieces(piece)
        return " ".join(parts) or '""'

    def _pieces(self, text: str) -> list[str]:
        pieces, at = [], 0
        for match in self._marks.finditer(text) if self._marks else ():
            pieces += [json.dumps(text[at : match.start()])] if match.start() > at else []
            pieces.append(f"<[{self._special[match[0]]}]>")
            at = match.end()
        return pieces + ([json.dumps(text[at:])] if at < len(text) else [])

    @staticmethod
    def _json(schema: Any) -> str:
        return f"%json {json.dumps(schema)}"

    def _rule(self, body: str) -> str:
        """A rule of its own, for bodies that may only stand alone."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def _object(self, name: str, pointer: str = "") -> dict[str, Any]:
        """JSON schema of a call's object, which stands at a JSON pointer."""
        properties: dict[str, Any] = {}
        place = pointer + "".join(f"/properties/{step}" for step in self._calls.arguments_path)
        for path, schema in (
            (self._calls.name_path, {"const": name}),
            (self._calls.arguments_path, _moved(self._schemas[name], place)),
            (self._calls.id_path, {"type": "string", "pattern": "^[A-Za-z0-9]{9}$"}),
        ):
            inner = properties
            for step in path[:-1]:
                inner = inner.setdefault(step, {})
            if path:
                inner[path[-1]] = _Leaf(schema)
        return _as_schema(properties)

    def _call(self, name: str) -> str:
        calls = self._calls
        before, behind = (
            self._text(calls.call_open, name=name),
            self._text(self._end(calls.call_close), name=name),
        )
        if calls.style == "json":
            return f"{before} {self._rule(self._json(self._object(name)))} {behind}"
        header = f"{before} {json.dumps(name)} {self._text(calls.before_arguments, name=name)}"
        if calls.style == "named":
            return f"{header} {self._rule(self._json(self._schemas[name]))} {behind}"
        return f"{header} {self._arguments(name)} {behind}"

    def _arguments(self, name: str) -> str:
        """Arguments between tags, in the order of their schema."""
        schema = self._schemas[name]
        properties: Mapping[str, Any] = schema.get("properties") or {}
        required = set(schema.get("required") or ())
        separator = self._text(self._calls.value_separator)
        first, later = '""', '""'
        # From the last argument to the first: what may follow where none stands before, and where one does.
        for key, kind in reversed(list(properties.items())):
            argument = self._argument(key, kind if isinstance(kind, dict) else {}, schema)
            with_it = self._rule(f"{argument} {later}")
            after = self._rule(f"{separator} {argument} {later}")
            if key in required:
                first, later = with_it, after
            else:
                first, later = self._rule(f"{with_it} | {first}"), self._rule(f"{after} | {later}")
        return first

    def _argument(self, key: str, kind: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        calls = self._calls
        opening = self._text(calls.key_open + key + calls.key_close, key=key)
        close = calls.value_close.replace(KEY, key)
        is_string = kind.get("type") == "string"
        value_schema = {**kind, **{name: root[name] for name in ("$defs", "definitions") if name in root}}
        if calls.string_close and is_string:
            return f"{opening} {self._literal(kind)} {self._text(close)}"
        if not is_string:
            value = self._rule(self._json(value_schema))
            return f"{opening} {self._text(calls.other_open)} {value} {self._text(close)}"
        if "enum" in kind or "const" in kind:
            texts = kind.get("enum") or [kind["const"]]
            value = self._rule(" | ".join(json.dumps(str(text)) for text in texts))
            return f"{opening} {self._text(calls.string_open)} {value} {self._text(close)}"
        return f"{opening} {self._text(calls.string_open)} {self._raw(close)}"

    def _raw(self, close: str) -> str:
        """Text up to a marker."""
        pieces = self._pieces(close)
        if pieces and pieces[0].startswith('"') and json.loads(pieces[0]).strip():
            name = f"t{len(self._rules)}"  # of lower case: a suffix is an attribute of rules
            self._rules.append(f"{name}[suffix={pieces[0]}]: /(.|\\n)*/")
            return " ".join([name, *pieces[1:]])
        if pieces and pieces[0].startswith('"'):  # white space, which the text may have, too
            pieces = pieces[1:]
        return " ".join(["/(.|\\n)*/", *pieces])

    def _literal(self, kind: Mapping[str, Any]) -> str:
        """A quoted string."""
        opening, closing = self._calls.string_open, self._calls.string_close
        if opening == '"':
            return self._rule(self._json(kind))
        if "enum" in kind:
            texts = " | ".join(json.dumps(str(text)) for text in kind["enum"])
            return f"{self._text(opening)} ({texts}) {self._text(closing)}"
        if opening == "'":
            return "/'([^'\\\\\\n]|\\\\.)*'/"
        if MARKER.fullmatch(closing) and closing in self._special:
            return f"{self._text(opening)} /(.|\\n)*/ {self._text(closing)}"
        return f"{self._text(opening)} {self._raw(closing)}"


class _Leaf:
    """A schema within the nested properties of a call's object."""

    def __init__(self, schema: Any) -> None:
        self.schema = schema


def _moved(schema: Any, pointer: str) -> Any:
    """A schema whose references to itself hold where it stands at a JSON pointer."""
    if isinstance(schema, list):
        return [_moved(inner, pointer) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: f"#{pointer}{value[1:]}"
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, pointer)
        for key, value in schema.items()
    }


def _as_schema(properties: Any) -> dict[str, Any]:
    if isinstance(properties, _Leaf):
        return properties.schema
    return {
        "type": "object",
        "properties": {name: _as_schema(inner) for name, inner in properties.items()},
        "required": list(properties),
        "additionalProperties": False,
    }
