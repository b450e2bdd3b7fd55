"""SampleState: host-side state of one sample of a request, from arrival to finish."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from jaxpaged.engine.constraint import Constraint
from jaxpaged.engine.prefix_index import Node
from jaxpaged.engine.request import EngineRequest, FinishReason, RequestTimes
from jaxpaged.engine.swap import SwappedSequence


@dataclass(eq=False)
class SampleState:
    """A waiting or running sample.

    Prefill and decoding are the same: a step computes some of ``tokens[num_computed:]``, and
    samples a token after the last one. A preempted sample has ``num_computed`` = 0.
    """

    request: EngineRequest
    index: int
    """Index of the sample within the request."""
    arrival: int
    """Sequence number of the request."""
    limit: int
    """Tokens to generate, at most."""
    root: bytes
    """Root key of its chain in the prefix index."""
    leader: SampleState | None
    """First sample of the request, which computes the shared prompt; None for that one itself."""
    tokens: list[int]
    """Prompt and generated tokens, without those dropped by context shifts."""
    times: RequestTimes
    slot: int | None = None
    """Sequence of the cache; None while waiting."""
    num_computed: int = 0
    """Tokens in the cache."""
    num_generated: int = 0
    num_forgotten: int = 0
    """Tokens dropped by context shifts."""
    chain: list[Node] = field(default_factory=list)
    """Index nodes of its full pages, in order."""
    windows: list[deque[tuple[int, Node]]] = field(default_factory=list)
    """For each further layer group, nodes of its chain whose pages there it uses, with their index."""
    saved_prompt: bool = False
    """True if the windows at the end of its prompt were kept."""
    borrowed: Node | None = None
    """Index node of a partially shared page, until the first write copies it."""
    copies: bool = False
    """True if its last page is shared, so that the next token copies it."""
    indexed: bool = True
    """True if its pages can go into the prefix index: not after a shift or a swap."""
    num_cached: int | None = None
    """Cached tokens found at its first admission; None before that."""
    swapped: SwappedSequence | None = None
    """Its pages in host memory, if swapped out."""
    finish_reason: FinishReason | None = None
    mu: float | None = None
    """State of Mirostat; None before the first token."""
    constraint: Constraint | None = None
    """Its constraint, which has accepted all generated tokens."""
    mask: np.ndarray | None = None
    """i32[W]: tokens that may come next, see ``Constraint.allowed``; None = all."""

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key of scheduling; smallest first."""
        return self.request.priority, self.arrival, self.index

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute before the next one is sampled; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def ready(self) -> bool:
        """True if it can be admitted: its leader has computed the prompt, or is finished."""
        leader = self.leader
        if leader is None or leader.finish_reason is not None:
            return True
        return leader.slot is not None and leader.num_computed >= leader.prompt_len

    @property
    def position(self) -> int:
        """Position of the next token in the whole text, dropped tokens included."""
        return self.num_forgotten + len(self.tokens)

    def update_mask(self, num_words: int) -> None:
        """Computes the mask of its next token.

        Raises:
          ValueError: no token may come next.
        """
        self.mask = None
        if self.constraint is not None and self.constraint.is_active:
            self.mask = np.zeros(num_words, np.int32)
            self.constraint.allowed(self.mask)
            if not self.mask.any():
                raise ValueError("no token may come next")
