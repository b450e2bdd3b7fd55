"""Rows of a table that are measured in turns: what a batch and depth ask for, and the order of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol


class Failure(Exception):
    """A program that cannot be measured; one line."""


@dataclass(frozen=True)
class Cell:
    """One batch and depth: two tests, or one where ``prompt`` or ``steps`` is 0."""

    batch: int
    depth: int
    prompt: int
    steps: int

    @property
    def read(self) -> tuple[int, int]:
        """Of the prompt's test: tokens that lie in each sequence already, and tokens that are read into it."""
        return (self.depth, self.prompt) if self.batch == 1 else (0, self.depth or self.prompt)

    @property
    def behind(self) -> int:
        """Tokens that lie in each sequence when generation starts."""
        return max(self.depth, 1)

    @property
    def longest(self) -> int:
        """The tokens that a sequence must have room for."""
        prompt = sum(self.read) if self.prompt else 0
        return max(prompt, self.behind + self.steps if self.steps else 0)

    @property
    def tokens(self) -> dict[str, int]:
        """Tests, and the tokens that each computes in all sequences."""
        found = {"prompt": self.batch * self.read[1] if self.prompt else 0}
        found["generation"] = self.batch * self.steps
        return {test: count for test, count in found.items() if count}

    def name(self, test: str) -> str:
        """As llama-bench would call it, such as "pp712 @ d4000"; "8 x pp4000" for eight sequences."""
        start, count = self.read
        text, depth = (f"pp{count}", start) if test == "prompt" else (f"tg{self.steps}", self.depth)
        text += f" @ d{depth}" if depth else ""
        return text if self.batch == 1 else f"{self.batch} x {text}"


def turns(count: int, repeat: int) -> list[list[int]]:
    """The order of ``count`` rows in each repetition: each starts one further, so that none always follows another's
    heat."""
    return [[(turn + i) % count for i in range(count)] for turn in range(repeat)]


class Side(Protocol):
    """A row of the table."""

    name: str

    def prepare(self, cell: Cell) -> str | None:
        """What is done once before a cell's repetitions; why the cell cannot be measured, or None."""

    def measure(self, cell: Cell) -> dict[str, float]:
        """One repetition: seconds of each of the cell's tests."""


def measure(
    sides: Sequence[Side], cell: Cell, repeat: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """One batch and depth: seconds of each test by row, and why a row has none."""
    missing: dict[str, str] = {}
    for side in sides:
        progress(f"{side.name}, getting ready")
        if reason := side.prepare(cell):
            missing[side.name] = reason
    served = [side for side in sides if side.name not in missing]
    seconds: dict[str, dict[str, list[float]]] = {
        test: {side.name: [] for side in served} for test in cell.tokens
    }
    for turn, order in enumerate(turns(len(served), repeat), 1):
        for side in (served[i] for i in order):
            progress(f"{turn} of {repeat}, {side.name}")
            found = side.measure(cell)
            for test, by_side in seconds.items():
                by_side[side.name].append(found[test])
    return {**asdict(cell), "tokens": cell.tokens, "seconds": seconds, "missing": missing}
