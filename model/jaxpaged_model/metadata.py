"""Typed look-ups in what model files say of themselves: GGUF metadata and JSON files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LARGEST = 2**31 - 1
REQUIRED: Any = object()
_KINDS = {str: "strings", int: "integers", float: "numbers", bool: "booleans"}


class ModelError(ValueError):
    """A model file that cannot be used; the message is one line that names what is wrong and what is allowed."""


class Metadata:
    """A mapping from keys to plain values, read with a check of each value's type.

    A value of None counts as absent. Every method raises ModelError, which names the key, where a required key is
    missing or its value has another type.

    Args:
      values: the mapping.
      prefix: put before every key, such as ``"llama."``.
      file: name of the file, put before the key in messages; empty if the caller adds it.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "", *, file: str = "") -> None:
        self.values, self.prefix, self._file = values, prefix, file

    def error(self, key: str, problem: str) -> ModelError:
        """The error for a key: ``problem`` follows its name."""
        return ModelError(f"{self._file}{': ' if self._file else ''}{self.prefix}{key} {problem}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands, of any type."""
        value = self.values.get(self.prefix + key)
        if value is None and default is REQUIRED:
            raise self.error(key, "is missing")
        return default if value is None else value

    def wrong(self, key: str, needed: str) -> ModelError:
        """The error for a value that is not what is needed."""
        return self.error(key, f"must be {needed}, got {repr(self.get(key))[:60]}")

    def _typed(self, key: str, default: Any, kind: type, noun: str) -> Any:
        value = self.get(key, default)
        if value is not default and not _is(value, kind):
            raise self.wrong(key, noun)
        return value

    def integer(self, key: str, default: Any = REQUIRED, *, least: int | None = 1) -> Any:
        """An integer from ``least`` to 2**31 - 1, or any if that is None."""
        value = self._typed(key, default, int, "an integer")
        if value is not default and least is not None and not least <= value <= LARGEST:
            raise self.error(key, f"must be from {least} to {LARGEST}, got {value}")
        return value

    def number(self, key: str, default: Any = REQUIRED, *, above: float = 0.0) -> Any:
        """A finite float above ``above``."""
        value = self._typed(key, default, float, "a number")
        if value is default:
            return value
        if not math.isfinite(value) or value <= above:
            needed = {0.0: "positive", -math.inf: "finite"}.get(above, f"above {above:g}")
            raise self.error(key, f"must be {needed}, got {value}")
        return float(value)

    def boolean(self, key: str, default: Any = REQUIRED) -> Any:
        """True or False."""
        return self._typed(key, default, bool, "true or false")

    def text(self, key: str, default: Any = REQUIRED) -> Any:
        """A str."""
        return self._typed(key, default, str, "a string")

    def array(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """A list whose elements are all of ``kind``: str, int, float or bool."""
        needed = f"a list of {_KINDS[kind]}"
        value = self._typed(key, default, list, needed)
        if value is not default:
            for i, element in enumerate(value):
                if not _is(element, kind):
                    raise self.error(key, f"must be {needed}, element {i} is {repr(element)[:60]}")
        return value


def _is(value: Any, kind: type) -> bool:
    """True if ``value`` is of ``kind``; integers are floats too, booleans are no numbers."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file in UTF-8, with or without a byte order mark.

    Raises:
      ModelError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value
