"""A constraint decides what a sample may hold, and changes nothing for its neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from engine_kit import FEW_PAGES, N_CTX, alone, collect, finish, greedy, make_engine, prompt
from toy_transformer import VOCAB

from jaxpaged.engine import EngineRequest, RefusedError


class Script:
    """Allows the tokens of ``sets`` in order, then the end; sets of one token are forced if ``force``."""

    def __init__(self, sets, *, force=False, wakes=0, fails_at=None, stop=VOCAB - 1):
        self.sets, self.force, self.wakes, self.fails_at, self.stop = sets, force, wakes, fails_at, stop
        self.accepted: list[int] = []

    @property
    def _place(self):
        return len(self.accepted) - self.wakes

    @property
    def is_active(self):
        return self._place >= 0

    @property
    def is_finished(self):
        return self._place >= len(self.sets)

    def allowed(self, out):
        if self._place == self.fails_at:
            raise ValueError("too complex")
        for token in (self.stop,) if self.is_finished else self.sets[self._place]:
            out[token >> 5] |= np.int64(1 << (token & 31)).astype(np.int32)

    def accept(self, tokens):
        for token in tokens:
            if self.is_active and token not in self.sets[self._place]:
                raise ValueError(f"{token} does not belong here")
            self.accepted.append(token)

    def forced(self):
        found, place = [], self._place
        while self.force and 0 <= place < len(self.sets) and len(self.sets[place]) == 1:
            found += self.sets[place]
            place += 1
        return found

    def copy(self):
        return Script(self.sets, force=self.force, wakes=self.wakes, fails_at=self.fails_at, stop=self.stop)


def sets(seed: int, count: int, most: int = 4):
    rng = np.random.default_rng(seed)
    return [rng.choice(VOCAB - 1, int(rng.integers(1, most)), replace=False).tolist() for _ in range(count)]


def follows(tokens, allowed) -> bool:
    return all(token in some for token, some in zip(tokens, allowed, strict=False))


def test_a_constrained_sample_holds_exactly_what_is_allowed(engine):
    script = [[t] for t in (7, 3, 3, 96, 31, 32, 64, 0)]
    result = finish(engine, greedy("c", prompt(1, 9), 40, constraint=Script(script)))["c", 0]
    assert (result.tokens, result.finish_reason) == ([7, 3, 3, 96, 31, 32, 64, 0], "stop")
    assert engine.stats().compiled_late == 0


def test_neighbours_get_the_text_that_they_get_alone(engine):
    allowed = sets(2, 12)
    requests = [
        greedy("c0", prompt(1, 9), 40, constraint=Script(allowed)),
        greedy("f0", prompt(2, 13), 14),
        EngineRequest(
            "c1", prompt(3, 5), max_new_tokens=40, temperature=1.5, constraint=Script(allowed, force=True)
        ),
        greedy("f1", prompt(4, 21), 11),
        greedy("f2", prompt(5, 3), 9),
    ]
    results = finish(engine, *requests)
    for request in requests:
        result = results[request.request_id, 0]
        if request.constraint is None:
            assert result.tokens == alone(request.prompt, request.max_new_tokens)
        else:
            assert len(result.tokens) == 12 and follows(result.tokens, allowed)
            assert result.finish_reason == "stop"


def test_forced_tokens_are_appended_in_one_step(engine):
    script = [[t] for t in range(10, 30)]
    before = engine.stats().steps
    result = finish(engine, greedy("f", prompt(1, 9), 40, constraint=Script(script, force=True)))["f", 0]
    assert result.tokens == list(range(10, 30))
    assert engine.stats().steps - before == 1
    # What follows them is computed from all of them.
    free = [*script, list(range(VOCAB - 1))]
    text = prompt(1, 9)
    result = finish(engine, greedy("g", text, 40, constraint=Script(free, force=True)))["g", 0]
    assert result.tokens[-1] == alone((*text, *range(10, 30)), 1)[0]


def test_forced_tokens_stop_at_the_limit(engine):
    script = [[t] for t in range(10, 30)]
    result = finish(engine, greedy("f", prompt(1, 9), 7, constraint=Script(script, force=True)))["f", 0]
    assert (result.tokens, result.finish_reason) == (list(range(10, 17)), "length")


def test_each_token_has_log_probabilities_of_the_model_where_they_are_wanted(engine):
    script = [[t] for t in (7, 3, 5)]
    request = greedy("l", prompt(1, 9), 9, num_logprobs=2, constraint=Script(script, force=True))
    result = finish(engine, request)["l", 0]
    rows = [row for output in result.outputs for row in output.logprobs or ()]
    assert [row.token for row in rows] == result.tokens == [7, 3, 5]
    # They are the model's own: the likeliest token is the one that it would have chosen.
    assert rows[0].top[0][0] == alone(prompt(1, 9), 1)[0]


def test_samples_of_a_request_have_a_constraint_each(engine):
    allowed = sets(3, 10)
    request = EngineRequest(
        "n", prompt(1, 21), max_new_tokens=30, n=3, temperature=2.0, top_k=0, top_p=1.0, min_p=0.0,
        constraint=Script(allowed),
    )  # fmt: skip
    results = finish(engine, request)
    texts = [results["n", i].tokens for i in range(3)]
    assert all(len(text) == 10 and follows(text, allowed) for text in texts)
    assert len(set(map(tuple, texts))) > 1
    assert not request.constraint.accepted


def test_preempted_samples_go_on_where_they_were():
    engine = make_engine(num_pages=FEW_PAGES)
    allowed = [sets(i, 34) for i in range(4)]
    requests = [
        EngineRequest(
            f"p{i}", prompt(i, 9), max_new_tokens=40, temperature=1.0, seed=i, constraint=Script(allowed[i])
        )
        for i in range(4)
    ]
    together = finish(engine, *requests)
    assert engine.stats().preemptions > 0
    for i, request in enumerate(requests):
        tokens = together[request.request_id, 0].tokens
        assert len(tokens) == 34 and follows(tokens, allowed[i])
        assert tokens == finish(engine, request)[request.request_id, 0].tokens


def test_a_shifted_context_keeps_its_place_in_the_script():
    engine = make_engine(context_shift=True)
    allowed = sets(4, N_CTX + 30)
    for force in (False, True):
        request = greedy("s", prompt(1, 20), N_CTX + 60, constraint=Script(allowed, force=force))
        result = finish(engine, request)["s", 0]
        assert len(result.tokens) == len(allowed) and follows(result.tokens, allowed)
        assert result.outputs[-1].truncated


def test_an_inactive_constraint_allows_everything():
    engine, text = make_engine(decode_steps=1), prompt(6, 9)
    result = finish(engine, greedy("w", text, 40, constraint=Script([[5], [6]], wakes=6)))["w", 0]
    assert result.tokens == [*alone(text, 6), 5, 6]


@pytest.mark.parametrize("constraint", [None, Script([[5]], wakes=100)])
def test_decode_steps_go_on_in_one_program_without_constraints(engine, constraint):
    engine.add_request(greedy("a", prompt(1, 9), 9, constraint=constraint))
    engine.step()
    assert len(engine.step()[0].tokens) == engine.config.decode_steps
    finish(engine)


def test_a_failing_constraint_ends_its_own_sample(engine):
    text = prompt(2, 13)
    results = finish(
        engine,
        greedy("bad", prompt(1, 9), 40, constraint=Script(sets(1, 9), fails_at=3)),
        greedy("stuck", prompt(3, 9), 40, constraint=Script([[1], [], [2]])),
        greedy("good", text, 12),
    )
    assert results["bad", 0].finish_reason == results["stuck", 0].finish_reason == "constraint"
    assert len(results["bad", 0].tokens) == 3
    assert results["good", 0].tokens == alone(text, 12)


def test_a_constraint_that_cannot_begin_is_refused_and_nothing_is_queued(engine):
    with pytest.raises(RefusedError, match="the constraint cannot begin: no token may come next"):
        engine.add_request(greedy("r", prompt(1, 9), 4, n=2, constraint=Script([[]])))
    assert not engine.has_work


def test_an_aborted_sample_leaves_the_others(engine):
    allowed = sets(5, 20)
    for name in ("a", "b"):
        engine.add_request(greedy(name, prompt(1, 9), 40, constraint=Script(allowed)))
    results: dict = {}
    collect(results, engine.step())
    collect(results, engine.step())
    engine.abort("a")
    while engine.has_work:
        collect(results, engine.step())
        engine.check_state()
    assert len(results["b", 0].tokens) == 20 and len(results["a", 0].tokens) < 20


def test_a_bias_and_a_constraint_hold_together(engine):
    allowed = [[1, 2, 3]] * 6
    request = greedy("b", prompt(1, 9), 9, logit_bias={2: 1e6, 50: 1e9}, constraint=Script(allowed))
    assert finish(engine, request)["b", 0].tokens == [2] * 6
