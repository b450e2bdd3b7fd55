"""Strict JSON in, plain JSON out.

Python's parser accepts NaN, repeated keys and lone surrogates, and recurses until the stack ends.
Requests must follow RFC 8259 and stay within a depth.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 64
"""Nesting of arrays and objects; JSON schemas of tools have 20 levels."""
MAX_DIGITS = 20
"""Digits of an integer; 2**64 has 20."""

# A string, possibly unterminated, or a bracket. Possessive quantifiers: no backtracking.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class JsonError(ValueError):
    """Invalid JSON, or JSON beyond a limit; the message names the problem."""


def parse_json(body: bytes) -> Any:
    """Parses a JSON text; lone surrogates in it become U+FFFD, as in ``bytes.decode``.

    Raises:
      JsonError: bad UTF-8, bad JSON, a repeated key, a number that is not finite or too long, too
        many levels.
    """
    _check_depth(body)
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JsonError(f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except json.JSONDecodeError as error:
        raise JsonError(
            f"the body is not JSON: {error.msg}, line {error.lineno} column {error.colno}"
        ) from None
    return _without_surrogates(value) if _SURROGATE_ESCAPE.search(body) else value


def dump_json(value: Any) -> bytes:
    """Compact JSON. A number that is not finite raises ValueError."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def _check_depth(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _TOKEN.finditer(body):
        first = match[0][:1]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise JsonError(f"the body has more than {MAX_DEPTH} levels of arrays and objects")
        elif first in b"]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in result if names.count(name) > 1)
        raise JsonError(f"the key {repeated[:100]!r} stands twice in one object")
    return result


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise JsonError(f"a whole number has more than {MAX_DIGITS} digits")
    return int(digits)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise JsonError(f"{text[:30]} is beyond the largest number")
    return number


def _no_constant(name: str) -> Any:
    raise JsonError(f"{name} is no JSON number")


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(name): _without_surrogates(item) for name, item in value.items()}
    return value
