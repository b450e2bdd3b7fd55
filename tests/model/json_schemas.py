"""JSON schemas of many kinds, for tests of structured output."""

from __future__ import annotations

from typing import Any


def _object(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


_TEXT: dict[str, Any] = {"type": "string", "maxLength": 12}
_INT: dict[str, Any] = {"type": "integer", "minimum": -100, "maximum": 1000}

SCHEMAS: dict[str, dict[str, Any]] = {
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "integer": {"type": "integer", "minimum": 0, "maximum": 255},
    "negative": {"type": "integer", "exclusiveMinimum": -50, "exclusiveMaximum": -3},
    "number": {"type": "number", "minimum": -1.5, "maximum": 2.25},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500},
    "string": {"type": "string", "minLength": 2, "maxLength": 8},
    "enum": {"enum": ["red", "green", "blue", 7, None, True, {"a": [1]}]},
    "const": {"const": {"kind": "point", "at": [0, -1.5]}},
    "unicode_enum": {"enum": ["grün", "日本", "e\u0301", "👩‍👩‍👧", '"', "\\", "\n", "\u0000"]},
    "unicode_names": _object(größe=_INT, 名前=_TEXT),
    "quoted_names": _object(**{'a"b': _INT, "c\\d": _INT, "e/f": _INT, "": _INT}),
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "pattern_choice": {"type": "string", "pattern": "^(yes|no|may(be)?)$"},
    "pattern_inside": {"type": "string", "pattern": "b[aeiou]d", "maxLength": 10},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "date_time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "email": {"type": "string", "format": "email"},
    "object": _object(name=_TEXT, age=_INT),
    "optional": _object(["b"], a=_INT, b=_INT, c=_INT, d=_INT),
    "all_optional": _object([], a=_TEXT, b=_INT),
    "nested": _object(outer=_object(inner=_object(deep={"type": "boolean"})), n=_INT),
    "array": {"type": "array", "items": _INT, "minItems": 2, "maxItems": 4},
    "empty_array": {"type": "array", "items": _INT, "maxItems": 0},
    "tuple": {
        "type": "array", "prefixItems": [_INT, _TEXT, {"type": "boolean"}], "items": False, "minItems": 3,
    },
    "tuple_and_rest": {"type": "array", "prefixItems": [_TEXT], "items": _INT, "minItems": 1, "maxItems": 3},
    "matrix": {
        "type": "array", "minItems": 2, "maxItems": 2,
        "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
    },
    "objects": {"type": "array", "items": _object(id=_INT, tag={"enum": ["x", "y"]}), "maxItems": 3},
    "any_of": {"anyOf": [_INT, {"type": "boolean"}, _object(a=_INT)]},
    "any_of_fields": _object(v={"anyOf": [{"type": "null"}, _TEXT, {"type": "array", "items": _INT, "maxItems": 2}]}),
    "one_of": {"oneOf": [_object(kind={"const": "a"}, n=_INT), _object(kind={"const": "b"}, s=_TEXT)]},
    "all_of": {"allOf": [
        {"type": "object", "properties": {"a": _INT}, "required": ["a"]},
        {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
    ]},
    "types": {"type": ["integer", "boolean", "null"], "minimum": 0, "maximum": 9},
    "ref": {"$defs": {"p": _object(x=_INT, y=_INT)}, "type": "array", "items": {"$ref": "#/$defs/p"}, "maxItems": 2},
    "recursive": {
        "$defs": {"node": _object(["value"], value=_INT, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})},
        "$ref": "#/$defs/node",
    },
    "additional": {
        "type": "object", "properties": {"a": _INT}, "required": ["a"], "additionalProperties": {"type": "boolean"},
    },
    "pattern_properties": {
        "type": "object", "patternProperties": {"^n_[a-z]{1,4}$": _INT}, "additionalProperties": False,
    },
    "any_object": {"type": "object"},
    "tool_call": _object(
        name={"enum": ["get_weather", "search"]},
        arguments={"anyOf": [_object(city=_TEXT, unit={"enum": ["C", "F"]}), _object(query=_TEXT)]},
    ),
}  # fmt: skip
"""By name; llguidance enforces each of them wholly."""
