"""Flags as fields of dataclasses: a field has the names, the type, the default and the help of its flag."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
T = TypeVar("T")
AT_LEAST_0, AT_LEAST_1, AT_LEAST_MINUS_1 = (click.IntRange(min=low) for low in (0, 1, -1))
CONTEXT_SIZE = click.IntRange(0, 2**24)
FILE = click.Path(path_type=Path)


def flag(title: str, names: str, help: str, default: Any = None, type: Any = None, **more: Any) -> Any:
    """A field of a dataclass that is also a flag of a command.

    Args:
      title: heading in ``--help``.
      names: such as "-np, --parallel" or "--webui/--no-webui".
      help: one or two sentences.
      default: of the field and the flag; shown in the help unless it is None, False or empty.
      type: of ``click.option``; None = text, or a switch if the default is a bool.
      more: further arguments of ``click.option``.
    """
    return dataclasses.field(
        default=default, metadata={"flag": (title, names.split(", "), {"help": help, "type": type, **more})}
    )


def flags_of(*classes: type) -> Decorator:
    """Decorator that gives a command all flags of dataclasses, in the order of their fields."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for cls in reversed(classes):
            for field in reversed(dataclasses.fields(cls)):
                if "flag" in field.metadata:
                    title, names, arguments = field.metadata["flag"]
                    arguments = _completed(field.default, names, arguments)
                    function = click.option(*names, field.name, cls=Flag, group=title, **arguments)(function)
        return function

    return decorate


def take(cls: type[T], values: dict[str, Any]) -> T:
    """An instance of a dataclass made of its flags' ``values``, which are removed from the dictionary."""
    return cls(**{f.name: values.pop(f.name) for f in dataclasses.fields(cls)})  # type: ignore[arg-type]


def _completed(default: Any, names: list[str], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``click.option``: what is not given follows from the default and the type."""
    more: dict[str, Any] = {"default": default}
    if isinstance(default, bool):
        more["is_flag"] = True
        if any("/" in name for name in names):
            more["show_default"] = "on" if default else "off"
    elif default not in (None, (), ""):
        more["show_default"] = True
    if isinstance(arguments["type"], click.IntRange):
        more["metavar"] = "N"
    elif isinstance(arguments["type"], click.Path):
        more["metavar"] = "FILE"
    return more | arguments


class Flag(click.Option):
    """An option with its heading in ``--help``."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class FiniteFloat(click.ParamType):
    """A finite float from ``low`` to ``high``; ``above`` excludes the lower end."""

    name = "number"

    def __init__(self, low: float | None = None, high: float | None = None, *, above: bool = False) -> None:
        self.low, self.high, self.above = low, high, above

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = click.FLOAT.convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        if self.low is not None and (number < self.low or (self.above and number == self.low)):
            self.fail(f"{value} is not {'above' if self.above else 'at least'} {self.low:g}.", param, ctx)
        if self.high is not None and number > self.high:
            self.fail(f"{value} is above {self.high:g}.", param, ctx)
        return number


class Parsed(click.ParamType):
    """A type parsed by a function, which raises ValueError for bad input; values that are no text stay."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


def count_list(minimum: int) -> click.ParamType:
    """Integers of at least ``minimum``, separated by commas; repeated ones count once."""

    def parse(text: str) -> tuple[int, ...]:
        try:
            counts = [int(word) for word in text.split(",")]
        except ValueError:
            raise ValueError(f"{text!r} is not a list of integers such as 1,8") from None
        if small := [count for count in counts if count < minimum]:
            raise ValueError(f"{small[0]} in {text!r} is below {minimum}")
        return tuple(dict.fromkeys(counts))

    return Parsed("n,n,...", parse)


def name_list(names: tuple[str, ...]) -> click.ParamType:
    """Some of ``names``, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        if unknown := [name for name in chosen if name not in names]:
            raise ValueError(f"{unknown[0]!r} is not one of {', '.join(map(repr, names))}")
        return chosen

    return Parsed("name,name,...", parse)
