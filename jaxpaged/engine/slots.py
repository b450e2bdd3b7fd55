"""SlotTable: parameters of the running sequences, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxpaged.engine.programs import SlotParams
from jaxpaged.engine.request import MAX_LOGIT_BIAS, MAX_STOP_IDS, EngineRequest
from jaxpaged.generation.sampling_params import NEUTRAL, RANGES, SamplingParams, pack_tokens

_NO_TOKEN = np.iinfo(np.int32).max


class SlotTable:
    """Parameters of S sequences; row i belongs to sequence i of the cache."""

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        sampling = jax.tree.map(np.array, SamplingParams.greedy(num_slots))
        self.params = SlotParams(
            sampling=replace(sampling, dry_breakers=np.zeros((num_slots, -(-vocab_size // 32)), np.int32)),
            stop_ids=np.full((num_slots, MAX_STOP_IDS), -1, np.int32),
            bias_ids=np.full((num_slots, MAX_LOGIT_BIAS), _NO_TOKEN, np.int32),
            bias=np.zeros((num_slots, MAX_LOGIT_BIAS), np.float32),
            wants_logprobs=np.zeros(num_slots, bool),
        )
        self.changed = True
        """True if the parameters changed since the last ``take``."""

    def take(self) -> SlotParams:
        """A copy of the parameters, for the device: on a CPU its arrays may share the host's memory."""
        self.changed = False
        return jax.tree.map(np.copy, self.params)

    def set(self, slot: int, request: EngineRequest, index: int) -> None:
        """Sets a slot's parameters to those of sample ``index`` of a request."""
        params, sampling = self.params, self.params.sampling
        for name in RANGES:
            getattr(sampling, name)[slot] = getattr(request, name)
        if request.dry_multiplier:
            table: Any = sampling.dry_breakers
            _fill(table, slot, pack_tokens(request.dry_breakers)[: table.shape[1]], 0)
        sampling.seed[slot] = (request.seed + index) % 2**32
        _fill(params.stop_ids, slot, list(request.stop_ids), -1)
        _fill(params.bias_ids, slot, list(request.logit_bias), _NO_TOKEN)
        _fill(params.bias, slot, list(request.logit_bias.values()), 0)
        params.wants_logprobs[slot] = request.num_logprobs is not None
        self.changed = True

    def clear(self, slot: int) -> None:
        """Switches off what costs a step time: sampling, penalties, biases, log-probabilities."""
        params, sampling = self.params, self.params.sampling
        params.wants_logprobs[slot] = False
        params.bias_ids[slot] = _NO_TOKEN
        for name, off in NEUTRAL.items():
            getattr(sampling, name)[slot] = off
        self.changed = True


def _fill(table: np.ndarray, slot: int, values: Sequence[float] | np.ndarray, padding: float) -> None:
    table[slot] = padding
    table[slot, : len(values)] = values
