"""Thoughts before an answer: they end at their marker or at their budget, and what constrains the answer
begins behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass
class Thinking:
    """A constraint of an engine, see `jaxpaged.engine.constraint`.

    An answer may begin with thoughts, which are free; those that are longer than the budget are ended.
    Behind them, or without any, another constraint holds.
    """

    opening: tuple[int, ...]
    """Tokens of the marker before thoughts; empty = none."""
    closing: tuple[int, ...]
    """Tokens of the marker behind thoughts."""
    close: bytes
    """That marker; a model may write it with other tokens."""
    token_bytes: Callable[[int], bytes]
    thinks: bool
    """True: the thoughts have begun."""
    budget: int | None
    """Tokens of thoughts, at most; None = any number."""
    answer: Any | None
    """Constraint of the answer; None = none."""
    stops: tuple[int, ...] = ()
    """Tokens that would end generation; thoughts may not contain them, since an answer must follow."""
    _begins: bool = True
    _opened: int = 0
    """Tokens of the opening marker that were sampled."""
    _num_tokens: int = 0
    _tail: bytes = b""
    _closing: list[int] = field(default_factory=list)
    """Tokens of the closing marker that must follow."""

    def __post_init__(self) -> None:
        self._begins = not self.thinks and bool(self.opening)
        self._close_if_spent()

    @property
    def is_active(self) -> bool:
        """True if something constrains the next token."""
        # Also within thoughts: the tokens of one round trip may not go on from them into an answer.
        return bool(self._closing or self._opened) or (self.answer is not None and self.answer.is_active)

    @property
    def is_finished(self) -> bool:
        """True if nothing may follow."""
        return not self.thinks and self.answer is not None and self.answer.is_finished

    def allowed(self, out: np.ndarray) -> None:
        """Sets the bits of tokens that may come next; `out i32[ceil(V / 32)]`."""
        forced = self._forced_marker()
        if forced:
            out[:] = 0
            _set(out, forced[:1], True)
        elif self.thinks or self.answer is None:
            out[:] = -1
            if self.thinks:
                _set(out, self.stops, False)
        else:
            self.answer.allowed(out)
            if self._begins:
                _set(out, self.opening[:1], True)

    def forced(self) -> list[int]:
        """Tokens that are the only continuation."""
        marker = self._forced_marker()
        if marker or self.thinks or self._begins or self.answer is None:
            return marker
        return list(self.answer.forced())

    def accept(self, tokens: Sequence[int]) -> None:
        """Takes sampled tokens."""
        for i, token in enumerate(tokens):
            if self.thinks:
                self._think(token)
            elif self._begins and token == self.opening[self._opened]:
                self._opened += 1
                if self._opened == len(self.opening):
                    self._begins, self._opened, self.thinks = False, 0, True
                    self._close_if_spent()
            else:
                self._begins = False
                if self.answer is not None:
                    self.answer.accept(tokens[i:])
                return

    def copy(self) -> Thinking:
        """An independent constraint in the same state."""
        answer = None if self.answer is None else self.answer.copy()
        return replace(self, answer=answer, _closing=list(self._closing))

    def _forced_marker(self) -> list[int]:
        return (
            list(self._closing) if self.thinks else list(self.opening[self._opened :]) if self._opened else []
        )

    def _think(self, token: int) -> None:
        self._num_tokens += 1
        self._tail = (self._tail + self.token_bytes(token))[-2 * len(self.close) - 256 :]
        if self._closing and token == self._closing[0]:
            del self._closing[0]
        if self.close in self._tail:
            self.thinks, self._closing = False, []
        else:
            self._close_if_spent()

    def _close_if_spent(self) -> None:
        if self.thinks and self.budget is not None and not self._closing and self._num_tokens >= self.budget:
            self._closing = list(self.closing)


def _set(mask: np.ndarray, tokens: Sequence[int], allow: bool) -> None:
    words = mask.view(np.uint32)
    for token in tokens:
        bit = np.uint32(1 << token % 32)
        words[token // 32] = words[token // 32] | bit if allow else words[token // 32] & ~bit
