"""SentencePiece BPE: merge neighbours, best score first; what is no token is spelled in bytes.

The rule is SentencePiece's (`bpe_model.cc`), which llama.cpp follows: of all neighbouring pieces whose joined
text is a token, the pair with the highest score merges first, the leftmost of equals, until none is left.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from functools import lru_cache

SPACE_MARK = "\u2581"
"""SentencePiece's visible spelling of a space."""


class ScoreMerger:
    """Encodes text whose spaces are already spelled `SPACE_MARK`.

    Args:
        ids: id of every token that text may become (no control, unknown or byte tokens).
        scores: score of every token, by id.
        byte_ids: id of the token of each byte; bytes that have none are missing.
        unknown_id: stands for a byte that has no token; None drops it.
    """

    def __init__(
        self, ids: Mapping[str, int], scores: list[float], byte_ids: Mapping[int, int], unknown_id: int | None
    ) -> None:
        self._ids = ids
        self._scores = scores
        self._byte_ids = byte_ids
        self._unknown_id = unknown_id
        # A space merges to its left only after a character that precedes a space inside some token. Text is
        # cut everywhere else, so that a word met before is not merged again; the result is the same.
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
        # A linked list of pieces: `next_` and `previous` hold positions, an absorbed piece is empty.
        pieces = list(word)
        count = len(pieces)
        previous = list(range(-1, count - 1))
        next_ = [*range(1, count), -1]
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            joined = pieces[left] + pieces[right]
            token = self._ids.get(joined)
            if token is not None:
                heapq.heappush(queue, (-self._scores[token], left, right, joined))

        for left in range(count - 1):
            offer(left, left + 1)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            # Pieces only grow, so an offer whose text no longer fits is one that another merge has overtaken.
            if not pieces[left] or not pieces[right] or len(pieces[left]) + len(pieces[right]) != len(joined):
                continue
            pieces[left], pieces[right] = joined, ""
            next_[left] = next_[right]
            if next_[right] != -1:
                previous[next_[right]] = left
            if previous[left] != -1:
                offer(previous[left], left)
            if next_[left] != -1:
                offer(left, next_[left])
        return tuple(token for piece in pieces if piece for token in self._tokens_of(piece))

    def _tokens_of(self, piece: str) -> list[int]:
        token = self._ids.get(piece)
        if token is not None:
            return [token]
        tokens = [self._byte_ids.get(byte, self._unknown_id) for byte in piece.encode()]
        return [token for token in tokens if token is not None]
