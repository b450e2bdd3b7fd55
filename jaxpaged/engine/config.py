"""EngineConfig: sizes and options of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpaged.engine.request import EngineRequest

_SHIFT_PAGES = 2
"""Pages that a shifted context may take beyond those that its tokens fill."""


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and options of an engine; on a mesh, of each data shard."""

    n_ctx: int
    """Tokens of a sequence, at most."""
    vocab_size: int
    max_batch_tokens: int = 512
    """Token budget of a step."""
    decode_steps: int = 8
    """Decode steps per round trip to the host, at most."""
    max_waiting: int = 256
    """Waiting requests, at most, of all data shards together."""
    prefix_cache: bool = True
    context_shift: bool = False
    """True: a full context drops its oldest tokens and continues. False: the text ends there."""
    swap_bytes: int = 2**30
    """Host memory for preempted sequences; 0 = always recompute them."""
    fingerprint: str = ""
    """Identifies the model in slot files."""
    skips_padding: bool = False
    """True if the model's products skip rows of padding: one program then serves steps of all sizes."""
    lockstep: bool = False
    """True: no decision depends on time, so that several processes make the same ones."""

    def __post_init__(self) -> None:
        for name in ("n_ctx", "vocab_size", "max_batch_tokens", "decode_steps", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.swap_bytes < 0:
            raise ValueError(f"swap_bytes must not be negative, got {self.swap_bytes}")

    @property
    def spare_pages(self) -> int:
        """Pages of a sequence beyond those that its tokens fill, at most."""
        return _SHIFT_PAGES if self.context_shift else 0

    def limit_of(self, request: EngineRequest) -> int:
        """Tokens that a request may generate, at most."""
        room = self.n_ctx - len(request.prompt)
        if request.max_new_tokens is None:
            return room
        return request.max_new_tokens if self.context_shift else min(request.max_new_tokens, room)
