"""Arguments, tables, JSON, figures and interleaved measurements of all scripts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax

from jaxpaged.attention.api import IMPLEMENTATIONS, candidates, default_platform, load
from jaxpaged.pages.formats import check_page_size

T = TypeVar("T")

# --- arguments ----------------------------------------------------------------------------------------------


def number(low: float, high: float, unit: float = 1.0) -> Callable[[str], float]:
    """Returns a parser of numbers in ``[low, high]`` that multiplies by ``unit``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}, got {text!r}")
        return value * unit

    return parse


def natural(text: str) -> int:
    """Parses an integer from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a non-negative integer, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """Parses an integer from 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def page_size(text: str) -> int:
    """Parses a number of tokens that a page can have."""
    size = positive(text)
    try:
        check_page_size(size)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return size


def known(kind: str, names: Mapping[str, Any]) -> Callable[[str], str]:
    """Returns a parser of one name out of ``names``."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown {kind} {text!r}; known are {', '.join(names)}")
        return text

    return parse


def each(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Returns a parser of comma-separated lists, such as "1,4,8"."""
    return lambda text: [parse(part) for part in text.split(",")]


_SHARED: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "batch": ("-b --batch", "numbers of sequences", each(positive)),
    "implementation": (
        "--implementation",
        "attention implementations, such as xla,cpu_numba (default: all that this platform tries, "
        "except the reference)",
        each(known("implementation", IMPLEMENTATIONS)),
    ),
    "json": ("--json", "write every measurement to this JSON file", Path),
    "memory": ("--memory", "MiB to use (default: what is free; half of it on a CPU)", positive),
    "model_file": ("-m --model", "GGUF file or Hugging Face folder", Path),
    "page_size": ("--page-size", "tokens per page", page_size),
    "plot": ("--plot", "draw the results to this .svg or .png file", Path),
    "repeat": ("-r --repeat", "rounds; tables show medians", positive),
}
"""Options of several scripts: flags, help, parser."""


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an error in one line and exits with status 2."""

    def __init__(self, description: str | None, **shared: Any) -> None:
        """Declares options of ``_SHARED``, given by name, with these defaults."""
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(program(), description=description, formatter_class=formatter)
        self._group: Any = self
        for name, default in shared.items():
            self.add(*_SHARED[name], default)

    def group(self, title: str) -> None:
        """Starts a group of options in the help text."""
        self._group = self.add_argument_group(title)

    def add(
        self, flags: str, help: str, type: Callable[[str], Any] = str, default: Any = None, **options: Any
    ) -> None:
        """Declares an option; ``flags`` are separated by spaces. The help text ends with the default."""
        if default is not None and default != "":
            help += f" (default: {_shown(default)})"
        options = {"metavar": None if "choices" in options else _metavar(flags)} | options
        self._group.add_argument(*flags.split(), help=help, type=type, default=default, **options)

    def flag(self, flags: str, help: str) -> None:
        """Declares an option without a value."""
        self._group.add_argument(*flags.split(), help=help, action="store_true")

    def add_fields(self, kind: type) -> None:
        """Declares the options of a dataclass: its fields made by ``option``."""
        for field in dataclasses.fields(kind):
            if field.metadata:
                self.add(**field.metadata, dest=field.name)

    def parse(self) -> argparse.Namespace:
        """Parses the command line, and checks that files can be written before anything is measured."""
        args = self.parse_args()
        for path in (getattr(args, name, None) for name in ("json", "plot", "output")):
            if isinstance(path, Path) and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
                self.error(f"cannot write {path}: {path.parent} is not a writable folder")
        if getattr(args, "plot", None) and find_spec("matplotlib") is None:
            self.error("--plot needs matplotlib: pip install matplotlib")
        return args

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def option(flags: str, help: str, type: Callable[[str], Any], default: str) -> Any:
    """Dataclass field that is an option; ``default`` as on the command line."""
    about = {"flags": flags, "help": help, "type": type, "default": default}
    return dataclasses.field(default=type(default), metadata=about)


def from_options(kind: type[T], args: argparse.Namespace, **others: Any) -> T:
    """Creates a dataclass from the options of its fields."""
    names = [field.name for field in dataclasses.fields(kind) if field.metadata]
    return kind(**{name: getattr(args, name) for name in names}, **others)


def _metavar(flags: str) -> str:
    """Placeholder of an option's value in the help text: its longest flag in capitals."""
    return flags.split()[-1].lstrip("-").upper()


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_shown, value))
    if isinstance(value, Path):
        return value.name
    return f"{value:g}" if isinstance(value, float) else str(value)


def program() -> str:
    """Command that starts this script, such as "python -m tpu_scripts.bench.generate"."""
    parts = Path(sys.argv[0]).with_suffix("").parts
    names = parts[parts.index("tpu_scripts") :] if "tpu_scripts" in parts else parts[-1:]
    return f"python -m {'.'.join(names).removesuffix('.__main__')}"


def choose_implementations(parser: Parser, names: Sequence[str] | None) -> list[str]:
    """Implementations of attention to measure: those named, or all that this platform prefers.

    A named one that is not available ends the program; others are left out with a line on stderr.
    """
    if names is None:
        try:
            tried = list(candidates())
        except ValueError as error:
            parser.error(str(error))
    found = []
    for name in names or [name for name in tried if name != "reference"] or tried:
        try:
            load(name)
        except NotImplementedError as reason:
            if names is not None:
                parser.error(f"{name}: {reason}")
            note(f"left out: {name}: {reason}")
            continue
        found.append(name)
    return found


# --- output -------------------------------------------------------------------------------------------------


def note(line: str) -> None:
    """Prints a line to stderr; tables go to stdout."""
    print(line, file=sys.stderr, flush=True)


def progress(text: str) -> None:
    """Overwrites the current line of a terminal on stderr; "" clears it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def device() -> str:
    """Device and version of jax."""
    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}"


def on_cpu() -> bool:
    return default_platform() == "cpu"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.1f}" if count < 100 << 20 else f"{count / 2**20:,.0f}"


def row(*cells: Any) -> str:
    """Row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(*names: str, left: Sequence[str] | None = None) -> str:
    """Head of a Markdown table; columns in ``left`` (default: the first) are aligned left, others right."""
    left = names[:1] if left is None else left
    return f"{row(*names)}\n|{'|'.join('---' if name in left else '---:' for name in names)}|"


def write_json(path: Path | None, values: Mapping[str, Any], *, measured: bool = True) -> None:
    """Writes ``values`` behind the command, the version of jax and, if ``measured``, the device."""
    if path is not None:
        about = {"command": " ".join([program(), *sys.argv[1:]]), "jax": jax.__version__}
        about |= {"device": jax.devices()[0].device_kind} if measured else {}
        path.write_text(json.dumps(about | dict(values), indent=1) + "\n")


COLOURS = ("#2f6fb0", "#c8552b", "#3c8c5a", "#7a4fa3", "#b08a2f", "#444444")


@contextmanager
def figure(path: Path, title: str, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Yields ``(figure, axes[rows, columns])`` of ``pyplot.subplots(**options)`` to draw into, then saves it."""
    from matplotlib import pyplot

    style = {"svg.hashsalt": "jaxpaged", "font.size": 9, "font.family": "sans-serif"}
    style |= {"axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.titlesize": 9}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        drawn, axes = pyplot.subplots(squeeze=False, layout="constrained", **options)
        yield drawn, axes
        drawn.suptitle(title, fontsize=9)
        drawn.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)
        pyplot.close(drawn)


def legend_below(figure: Any, axis: Any, columns: int | None = None) -> None:
    """Adds the legend of one axis below all of them."""
    handles, labels = axis.get_legend_handles_labels()
    options = {"frameon": False, "fontsize": 8, "ncols": columns or len(labels)}
    figure.legend(handles, labels, loc="outside lower center", **options)


# --- measuring ----------------------------------------------------------------------------------------------


def in_turns(
    measures: Mapping[str, Callable[[], T]], repeat: int, progress: Callable[[str], None] = lambda _: None
) -> dict[str, list[T]]:
    """Runs each measure ``repeat`` times, interleaved, so that a machine's changing speed affects all alike.

    Each round starts one measure further, so that none always runs in the heat of the same other one.
    """
    results: dict[str, list[T]] = {name: [] for name in measures}
    names = list(measures)
    for turn in range(repeat):
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            progress(f"{turn + 1} of {repeat}, {name}")
            results[name].append(measures[name]())
    return results


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios of each round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
