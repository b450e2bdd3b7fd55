"""Laws of packing a step's tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.pages.batch import Batch, pack

S, T = 5, 16
jit_pack = jax.jit(pack, static_argnames="num_tokens")


@settings(max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=S, max_size=S).filter(lambda counts: sum(counts) <= T))
def test_tokens_are_packed_in_order_of_sequence(counts: list[int]) -> None:
    sequence, offset, cu_q_lens = jit_pack(jnp.asarray(counts), num_tokens=T)
    expected = [(seq, i) for seq, count in enumerate(counts) for i in range(count)]
    expected += [(S, 0)] * (T - len(expected))
    assert list(zip(sequence.tolist(), offset.tolist(), strict=True)) == expected
    assert cu_q_lens.tolist() == [0, *np.cumsum(counts).tolist()]

    nothing = jnp.zeros(T, jnp.int32)
    batch = Batch(sequence, nothing, nothing, nothing, nothing, cu_q_lens)
    assert (batch.num_tokens, batch.max_seqs) == (T, S)
    assert batch.q_lens.tolist() == counts
    assert batch.valid.tolist() == [seq < S for seq, _ in expected]
    for seq, count in enumerate(counts):
        row = int(batch.last_rows[seq])
        assert 0 <= row < T
        if count:
            assert expected[row] == (seq, count - 1)


@pytest.mark.parametrize("num_tokens", [1, 3, 6])
def test_a_full_batch_has_no_padding(num_tokens: int) -> None:
    counts = jnp.asarray([0, num_tokens, 0])
    sequence, offset, _ = pack(counts, num_tokens)
    assert sequence.tolist() == [1] * num_tokens and offset.tolist() == list(range(num_tokens))
