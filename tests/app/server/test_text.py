"""Text comes out the same however it is cut, and nothing of a stop string ever does."""

from __future__ import annotations

import itertools

from http_server import TOKENIZER
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged.app.server.text import SampleText, StopFinder
from jaxpaged.engine.request import TokenLogprobs

_WORDS = st.text(alphabet="abé", max_size=12)
_STOPS = st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3)


def _cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def _oracle(text: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@given(_WORDS, _STOPS, st.lists(st.integers(0, 20), max_size=6))
def test_stop_strings_are_found_however_the_text_is_cut(text, stops, places):
    finder = StopFinder(stops)
    shown = "".join(map(finder.feed, _cut(text, places)))
    shown += finder.flush() if finder.found is None else ""
    assert (shown, finder.found) == _oracle(text, stops)


@given(_WORDS, _STOPS)
def test_only_the_beginning_of_a_stop_string_is_held_back(text, stops):
    finder = StopFinder(stops)
    shown = ""
    for i, character in enumerate(text):
        shown += finder.feed(character)
        if finder.found is not None:
            break
        held = text[len(shown) : i + 1]
        assert not held or any(stop.startswith(held) for stop in stops)


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_tokens_and_text_belong_together(text, stops):
    text = text.encode("utf-8", "replace").decode()
    ids = TOKENIZER.encode(text, add_special=False)
    logprobs = [TokenLogprobs(token, -1.0, ()) for token in ids]
    sample = SampleText(TOKENIZER.stream(at_start=False), stops)
    parts = [sample.push([token], [entry]) for token, entry in zip(ids, logprobs, strict=True)]
    if sample.stopped_by is None:
        parts.append(sample.finish())
    shown = "".join(part.text for part in parts)
    tokens = [token for part in parts for token in part.tokens]
    assert shown == _oracle(text, stops)[0]
    assert tokens == ids[: len(tokens)]
    assert [entry.token for part in parts for entry in part.logprobs] == tokens
    if sample.stopped_by is None:
        assert tokens == ids
    else:
        assert TOKENIZER.decode(tokens, skip_special=False).startswith(shown)


def test_half_a_character_waits_for_its_other_half():
    ids = TOKENIZER.encode("é!", add_special=False)
    sample = SampleText(TOKENIZER.stream(at_start=False), ())
    assert "".join(sample.push([token], None).text for token in ids) == "é!"
    sample = SampleText(TOKENIZER.stream(at_start=False), ())
    assert sample.push(ids[:1], None).text == ""
    assert sample.finish().text == "\ufffd"
