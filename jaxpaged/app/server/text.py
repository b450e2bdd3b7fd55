"""Text of a sample from its tokens: whole characters, without stop strings."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxpaged_model.text.detokenize import StreamDecoder

from jaxpaged.engine.request import TokenLogprobs


class StopFinder:
    """Finds the first stop string in a text that arrives in parts; holds back possible beginnings
    of one.

    The first one is the one that is complete first, the longest of several: independent of how the
    text is split.

    Example:
        >>> finder = StopFinder(["END"]) >>> finder.feed("the E"), finder.feed("N"), finder.feed("T
        E"), finder.feed("ND."), finder.found ('the ', '', 'ENT ', '', 'END')
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.found: str | None = None

    def feed(self, part: str) -> str:
        """Adds a part; returns the text that can be shown now, none after a stop string."""
        if self.found is not None:
            return ""
        if not self._stops:
            return part
        text = self._held + part
        ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if ends:
            end, length, self.found = min(ends)
            self._held = ""
            return text[: end + length]
        held = self._may_begin(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Returns the text held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


@dataclass
class TextPart:
    """A part of a sample's text, with the tokens that end in it."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Characters of the sample's text before each token."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def extend(self, other: TextPart) -> None:
        """Appends another part."""
        self.text += other.text
        self.tokens += other.tokens
        self.offsets += other.offsets
        self.logprobs += other.logprobs


class SampleText:
    """The text of one sample. Tokens are returned with their text; those of a stop string are not."""

    def __init__(self, decoder: StreamDecoder, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._finder = StopFinder(stops)
        self._waiting: deque[tuple[int, int, int, TokenLogprobs | None]] = deque()
        self._seen = self._shown = 0
        self.num_tokens = 0
        """Tokens generated, up to and including the one that completes a stop string."""

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended it."""
        return self._finder.found

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> TextPart:
        """Adds tokens up to a stop string; returns the text that can be shown now."""
        text = ""
        for i, token in enumerate(tokens):
            if self.stopped_by is not None:
                break
            piece = self._decoder.push(token)
            self.num_tokens += 1
            start, self._seen = self._seen, self._seen + len(piece)
            self._waiting.append((start, self._seen, token, logprobs[i] if logprobs else None))
            text += self._finder.feed(piece)
        return self._released(text, ended=self.stopped_by is not None)

    def finish(self) -> TextPart:
        """Returns the rest of the text, at the end of the sample."""
        text = self._finder.feed(self._decoder.flush()) + self._finder.flush()
        return self._released(text, ended=True)

    def _released(self, text: str, *, ended: bool) -> TextPart:
        self._shown += len(text)
        part = TextPart(text)
        # At the end, tokens with a part in the shown text are included; those without text only if
        # no stop string was found.
        while self._waiting and (
            self._waiting[0][1] <= self._shown
            or (ended and (self._waiting[0][0] < self._shown or self.stopped_by is None))
        ):
            start, _, token, logprobs = self._waiting.popleft()
            part.tokens.append(token)
            part.offsets.append(start)
            if logprobs is not None:
                part.logprobs.append(logprobs)
        if ended:
            self._waiting.clear()
        return part
