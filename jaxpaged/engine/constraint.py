"""Constraint: restricts which tokens may come next in a sample, such as a grammar.

    request = EngineRequest("a", prompt, constraint=grammar.matcher())

The engine asks on the host after each token, and applies the answer inside the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np


class Constraint(Protocol):
    """State of one sample's constraint. A ``ValueError`` of a method ends the sample, and no other.

    A sample begins with a ``copy`` of that of its request.
    """

    @property
    def is_active(self) -> bool:
        """False while every token may come next; a step may then sample several before it asks again."""

    @property
    def is_finished(self) -> bool:
        """True if only the end of the text may come next."""

    def allowed(self, out: np.ndarray) -> None:
        """Writes a packed mask of the tokens that may come next.

        Args:
          out: i32[ceil(V / 32)], zeros; bit i of word w stands for token 32 w + i.
        """

    def accept(self, tokens: Sequence[int]) -> None:
        """Advances by sampled or forced tokens, without the stop token that ends a sample."""

    def forced(self) -> list[int]:
        """Tokens that alone may come next, in order; there may be none."""

    def copy(self) -> Self:
        """An independent constraint in the same state."""
