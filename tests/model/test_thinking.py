"""Thoughts end at their marker or their budget, and what constrains the answer begins behind them."""

from __future__ import annotations

import numpy as np
import pytest
from jaxpaged_model.text.thinking import Thinking

OPEN, CLOSE = (1, 2), (3, 4)
PIECES = {1: b"<th", 2: b"ink>", 3: b"</th", 4: b"ink>", 5: b"hm", 6: b"</think>\n", 7: b"7", 8: b"8"}


class Only:
    """Allows the tokens of a text, one after the other."""

    def __init__(self, tokens):
        self.tokens = list(tokens)

    @property
    def is_active(self):
        return True

    @property
    def is_finished(self):
        return not self.tokens

    def allowed(self, out):
        out[:] = 0
        if self.tokens:
            out[0] = 1 << self.tokens[0]

    def accept(self, tokens):
        for token in tokens:
            assert token == self.tokens.pop(0)

    def forced(self):
        return self.tokens[:1]

    def copy(self):
        return Only(self.tokens)


def make(thinks=False, budget=None, answer=(7, 8), opening=OPEN, stops=()):
    answer = None if answer is None else Only(answer)
    return Thinking(opening, CLOSE, b"</think>", PIECES.__getitem__, thinks, budget, answer, stops)


def allowed(constraint):
    mask = np.zeros(1, np.int32)
    constraint.allowed(mask)
    return {token for token in range(32) if mask[0] & np.int32(1 << token if token < 31 else -(2**31))}


def test_an_answer_may_begin_with_thoughts_or_without():
    constraint = make()
    assert constraint.is_active and allowed(constraint) == {1, 7} and constraint.forced() == []
    constraint.accept([7])
    assert allowed(constraint) == {8} and constraint.forced() == [8] and not constraint.is_finished
    constraint.accept([8])
    assert constraint.is_finished


@pytest.mark.parametrize("end", [(3, 4), (6,)])
def test_thoughts_are_free_up_to_their_marker_however_it_is_written(end):
    constraint = make()
    constraint.accept([1])
    assert constraint.is_active and allowed(constraint) == {2} and constraint.forced() == [2]
    constraint.accept([2, 5, 5])
    assert constraint.is_active, "else a round trip could go on from thoughts into an answer unseen"
    assert len(allowed(constraint)) == 32 and not constraint.is_finished
    constraint.accept(end)
    assert constraint.is_active and allowed(constraint) == {7}
    constraint.accept([7, 8])
    assert constraint.is_finished


def test_thoughts_do_not_end_an_answer_that_must_follow():
    constraint = make(thinks=True, stops=(0, 31))
    constraint.accept([5])
    assert constraint.is_active and allowed(constraint) == set(range(32)) - {0, 31}
    copy = constraint.copy()
    copy.accept(CLOSE)
    assert allowed(copy) == {7} and allowed(constraint) == set(range(32)) - {0, 31}


def test_thoughts_beyond_their_budget_are_ended():
    constraint = make(thinks=True, budget=2)
    constraint.accept([5])
    assert constraint.forced() == []
    other = constraint.copy()
    constraint.accept([5])
    assert constraint.is_active and constraint.forced() == [3, 4] and allowed(constraint) == {3}
    constraint.accept([3])
    assert constraint.forced() == [4] and other.forced() == []
    constraint.accept([4, 7])
    assert allowed(constraint) == {8}
    assert make(thinks=True, budget=0).forced() == [3, 4]


def test_a_budget_needs_no_constraint_of_the_answer():
    constraint = make(thinks=True, budget=1, answer=None)
    constraint.accept([5, 3, 4])
    assert not constraint.is_active and not constraint.is_finished and len(allowed(constraint)) == 32
