"""Tokens of DRY's sequence breakers: those whose text contains one."""

from __future__ import annotations

import pytest
from http_server import TOKENIZER

from jaxpaged.app.breakers import breaker_tokens


@pytest.mark.parametrize("texts", [["\n"], [":", '"', "*"], ["aa"], ["  "], ["é"], ["", "x"], [], ["zqzq"]])
def test_all_tokens_with_a_breaker_in_them_are_found(texts: list[str]) -> None:
    expected = {
        token
        for token in range(TOKENIZER.vocab_size)
        if any(text and text.encode() in TOKENIZER.token_bytes(token) for text in texts)
    }
    assert breaker_tokens(texts, TOKENIZER) == expected
    if texts[:1] == ["\n"]:
        assert expected


def test_forty_bytes_of_a_breaker_count() -> None:
    spaces = breaker_tokens([" " * 1000], TOKENIZER)
    assert spaces == breaker_tokens([" " * 40], TOKENIZER)
