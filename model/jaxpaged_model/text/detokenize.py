"""From token bytes to text: GPT-2's byte alphabet, and a streaming decoder that emits whole characters."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping
from types import MappingProxyType


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the other 68 for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(0x100) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


BYTE_OF_CHARACTER: Mapping[str, int] = MappingProxyType(_byte_alphabet())
"""Byte of each of the 256 characters of GPT-2's alphabet."""


def byte_level_bytes(text: str) -> bytes:
    """The bytes of a token spelled in GPT-2's alphabet; the UTF-8 of one that has other characters."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in text])
    except KeyError:
        return text.encode()


class StreamDecoder:
    """Decodes tokens one at a time; a character is emitted when all its bytes are there.

    The texts of `push` and `flush`, joined, equal `Tokenizer.decode` of the same tokens.

    Args:
        piece: function from a token to its visible bytes, none for a hidden special token.
        strip_space: True to drop one space at the very beginning, which a SentencePiece vocabulary adds.

    Example:
        >>> decoder = StreamDecoder(lambda token: bytes([token]), strip_space=False)
        >>> [decoder.push(byte) for byte in "é!".encode()], decoder.flush()
        (['', 'é', '!'], '')
    """

    def __init__(self, piece: Callable[[int], bytes], strip_space: bool) -> None:
        self._piece = piece
        self._strip_space = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, often a word, sometimes nothing.

        Raises:
            ValueError: the token is not in the vocabulary.
        """
        data = self._piece(token_id)
        if data and self._strip_space:
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The rest of the text: U+FFFD for an incomplete character, else nothing."""
        return self._utf8.decode(b"", final=True)
