"""Tokens of DRY's sequence breakers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from jaxpaged_model.text.tokenizer import Tokenizer

_MAX_BYTES = 40
"""Bytes of a breaker that count, as in llama.cpp."""


def breaker_tokens(texts: Iterable[str], tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens whose text contains one of ``texts``.

    A breaker that only several tokens make up together is not found, unlike in llama.cpp.
    """
    data, ends = _all_tokens(tokenizer)
    found: set[int] = set()
    for text in texts:
        wanted = text.encode()[:_MAX_BYTES]
        at = data.find(wanted) if wanted else -1
        while at >= 0:
            token = int(np.searchsorted(ends, at, side="right"))
            if at + len(wanted) <= ends[token]:
                found.add(token)
            at = data.find(wanted, at + 1)
    return frozenset(found)


@lru_cache(maxsize=4)
def _all_tokens(tokenizer: Tokenizer) -> tuple[bytes, np.ndarray]:
    """``(bytes of all tokens, index of the end of each)``"""
    pieces = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    return b"".join(pieces), np.cumsum([len(piece) for piece in pieces])
