"""``run`` inside the caller's own ``shard_map``."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from toy_transformer import VOCAB, paged, toy, toy_params

from jaxpaged import Request, generate, run

NEW = 9


def test_run_under_shard_map() -> None:
    """Each device generates for its own part of the prompts, in a cache of its own."""
    params = toy_params()
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    texts = np.random.default_rng(3).integers(0, VOCAB, (4, 7)).astype(np.int32)
    expected, _ = generate(toy, params, paged(4, 40), texts, max_new_tokens=NEW)

    def local(texts: Any) -> Any:
        cache = paged(2, 20)
        return run(toy, params, cache, Request.create(cache, texts, max_new_tokens=NEW))[0].tokens

    spec = PartitionSpec("data")
    tokens = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(texts)
    np.testing.assert_array_equal(tokens[:, :NEW], np.asarray(expected.tokens)[:, :NEW])
