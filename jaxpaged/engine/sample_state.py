"""SampleState: what the host knows of one sample of a request, from its arrival to its end."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxpaged.engine.prefix_index import Node
from jaxpaged.engine.request import EngineRequest, FinishReason, RequestTimes
from jaxpaged.engine.swap import SwappedPages


@dataclass(eq=False)
class SampleState:
    """One sequence to be, while it waits, and one of the cache's, while it runs.

    Prompts and decoding are one thing: what is not yet computed of ``tokens`` is what a step may compute, and where
    the last of them is computed, a token is drawn. A sample that was preempted is one that has nothing computed.
    """

    request: EngineRequest
    index: int
    """Which sample of the request."""
    arrival: int
    """Counts requests."""
    limit: int
    """Tokens that it generates at most."""
    root: bytes
    """Where its chain of pages starts in the prefix index."""
    leader: SampleState | None
    """The first sample of the request, whose prompt this one shares; None for the first one."""
    tokens: list[int]
    """The prompt and what was generated, without what a context shift forgot."""
    times: RequestTimes
    slot: int | None = None
    """Its sequence of the cache; None while it waits."""
    num_computed: int = 0
    """Tokens that are in the cache."""
    num_generated: int = 0
    num_forgotten: int = 0
    """Tokens that context shifts forgot."""
    chain: list[Node] = field(default_factory=list)
    """The nodes of its whole pages, from the beginning on."""
    borrowed: Node | None = None
    """The node of a page that it shares in part, until it wrote, and so copied it."""
    copies: bool = False
    """Whether it shares its last page, and the next token copies it."""
    indexed: bool = True
    """Whether its pages lie as the prefix index has them: false after a shift, and after a swap."""
    num_cached: int | None = None
    """Tokens found in the pool when it was first admitted; None = not yet."""
    swapped: SwappedPages | None = None
    """Its pages, while they are in host memory."""
    finish_reason: FinishReason | None = None

    @property
    def order(self) -> tuple[int, int, int]:
        """Who goes first, least first."""
        return self.request.priority, self.arrival, self.index

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute before the next is drawn; 1 while it decodes."""
        return len(self.tokens) - self.num_computed

    @property
    def ready(self) -> bool:
        """Whether it may be admitted: the prompt that it shares is computed, or nobody computes it any more."""
        leader = self.leader
        if leader is None or leader.finish_reason is not None:
            return True
        return leader.slot is not None and leader.num_computed >= leader.prompt_len

    @property
    def position(self) -> int:
        """Of the next token, counted from the beginning of the text."""
        return self.num_forgotten + len(self.tokens)
