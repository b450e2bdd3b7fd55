"""SentencePiece BPE: adjacent symbols are merged by score; a symbol that is no token becomes bytes.

The rule is SentencePiece's (`bpe_model.cc`), which llama.cpp follows: of all adjacent symbols that form
a token together, the pair with the highest score is merged first, the leftmost of equal ones, until no
pair is left.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from functools import lru_cache

SPACE_MARK = "\u2581"
"""SentencePiece's visible spelling of a space."""


class ScoreMerger:
    """Encodes text in which spaces are already spelled `SPACE_MARK`.

    Args:
        ids: ids of the tokens that text may become (no control, unknown or byte tokens).
        scores: score of every token, by id.
        byte_ids: ids of the byte tokens, by byte; bytes without a token are absent.
        unknown_id: token for a byte without a token; None drops it.
    """

    def __init__(
        self, ids: Mapping[str, int], scores: list[float], byte_ids: Mapping[int, int], unknown_id: int | None
    ) -> None:
        self._ids = ids
        self._scores = scores
        self._byte_ids = byte_ids
        self._unknown_id = unknown_id
        # A space merges to its left only after a character that precedes a space inside some token. The text
        # is split before all other spaces, so that words can be cached; the result is the same.
        self._joins_space = frozenset(
            text[i - 1]
            for text in ids
            if SPACE_MARK in text
            for i in range(1, len(text))
            if text[i] == SPACE_MARK
        )
        self._encode_word = lru_cache(maxsize=1 << 14)(self._merge)

    def encode(self, text: str) -> list[int]:
        """The ids of the text's tokens."""
        ids: list[int] = []
        start = 0
        cut = text.find(SPACE_MARK, 1)
        while cut != -1:
            if text[cut - 1] not in self._joins_space:
                ids.extend(self._encode_word(text[start:cut]))
                start = cut
            cut = text.find(SPACE_MARK, cut + 1)
        ids.extend(self._encode_word(text[start:]))
        return ids

    def _merge(self, word: str) -> tuple[int, ...]:
        # A linked list of symbols: `next_` and `previous` are positions, a symbol merged into another is empty.
        symbols = list(word)
        count = len(symbols)
        previous = list(range(-1, count - 1))
        next_ = [*range(1, count), -1]
        queue: list[tuple[float, int, int, str]] = []

        def enqueue(left: int, right: int) -> None:
            joined = symbols[left] + symbols[right]
            token = self._ids.get(joined)
            if token is not None:
                heapq.heappush(queue, (-self._scores[token], left, right, joined))

        for left in range(count - 1):
            enqueue(left, left + 1)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            # Symbols only grow: if the lengths no longer fit, another merge has changed one of the two.
            if (
                not symbols[left]
                or not symbols[right]
                or len(symbols[left]) + len(symbols[right]) != len(joined)
            ):
                continue
            symbols[left], symbols[right] = joined, ""
            next_[left] = next_[right]
            if next_[right] != -1:
                previous[next_[right]] = left
            if previous[left] != -1:
                enqueue(previous[left], left)
            if next_[left] != -1:
                enqueue(left, next_[left])
        return tuple(token for symbol in symbols if symbol for token in self._tokens_of(symbol))

    def _tokens_of(self, symbol: str) -> list[int]:
        token = self._ids.get(symbol)
        if token is not None:
            return [token]
        tokens = [self._byte_ids.get(byte, self._unknown_id) for byte in symbol.encode()]
        return [token for token in tokens if token is not None]
