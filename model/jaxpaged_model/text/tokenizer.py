"""Text to token ids and back, from a GGUF file's metadata or from a Hugging Face folder.

Two kinds of GGUF vocabularies are read: byte-level BPE (`tokenizer.ggml.model` = "gpt2") with the splitting
rules of its family (`pretokenizers.py`), and SentencePiece with scores and byte fallback ("llama", `spm.py`).
Everything that is not known exactly, such as a new pre-tokenizer, is refused: a guess gives fluent nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpaged_model.text.detokenize import StreamDecoder
from jaxpaged_model.text.vocabulary import TokenizerError, Vocabulary

try:
    from jaxpaged_model.text import gguf_vocabulary, hf_vocabulary
except ModuleNotFoundError as error:
    if error.name != "tokenizers":
        raise
    raise ImportError(
        "model.tokenizer needs the package 'tokenizers': pip install 'jaxpaged[model]'"
    ) from error

__all__ = ["StreamDecoder", "Tokenizer", "TokenizerError"]


class Tokenizer:
    """A vocabulary with its rules. Immutable; safe to share between threads.

    Attributes:
        vocab_size: number of token ids.
        bos_id, eos_id: ids of the begin and end of a text, None where the vocabulary has none.
        stop_ids: every token that ends generation (end of text, of turn, of message, ...).
        add_bos, add_eos: whether `encode(..., add_special=True)` adds them.
        chat_template: the Jinja source that came with the vocabulary, or None.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Use `from_gguf` or `from_folder`."""
        self._pieces = vocabulary.pieces
        self._hidden_ids = vocabulary.hidden_ids
        self._encode_text = vocabulary.encode_text
        self._strip_space = vocabulary.strip_space
        self._prefix = vocabulary.prefix
        self._suffix = vocabulary.suffix
        self.vocab_size = len(vocabulary.pieces)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.stop_ids = vocabulary.stop_ids
        self.add_bos = self.bos_id is not None and self.bos_id in self._prefix
        self.add_eos = self.eos_id is not None and self.eos_id in self._suffix
        self.chat_template = vocabulary.chat_template

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer of a GGUF file.

        Args:
            metadata: values by GGUF key, plain Python or numpy, e.g. `"tokenizer.ggml.tokens": list[str]`.

        Raises:
            TokenizerError: a key is missing, contradicts another, or names a tokenizer that is not supported.
        """
        return cls(gguf_vocabulary.read(metadata))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder: `tokenizer.json` and the small files beside it.

        Raises:
            TokenizerError: no `tokenizer.json`, an unreadable file, or a decoder that is not supported.
        """
        return cls(hf_vocabulary.read(Path(folder)))

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of a text.

        Args:
            add_special: put BOS before and EOS after, where the vocabulary asks for them.
            parse_special: read control tokens written out in the text (`<|im_end|>`) as tokens. User-defined
                tokens are always read. Leave it off for text that a stranger wrote.
        """
        ids = self._encode_text(_valid_unicode(text), parse_special) if text else []
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD.

        A SentencePiece vocabulary's space at the very beginning is dropped. Spaces before punctuation stay.

        Raises:
            TokenizerError: an id is not in the vocabulary.
        """
        piece = self._visible_bytes if skip_special else self.token_bytes
        data = b"".join(map(piece, ids))
        return (data.removeprefix(b" ") if self._strip_space else data).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, perhaps a part of a character; a special token's are its written-out name.

        Raises:
            TokenizerError: the id is not in the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"token id {token_id} is outside the vocabulary of {self.vocab_size} tokens")
        return self._pieces[token_id]

    def stream(self, *, at_start: bool = True) -> StreamDecoder:
        """A decoder for tokens that arrive one at a time; it equals `decode` of all of them.

        Args:
            at_start: False when the tokens continue a text, so that a leading space is theirs.
        """
        return StreamDecoder(self._visible_bytes, self._strip_space and at_start)

    def _visible_bytes(self, token_id: int) -> bytes:
        data = self.token_bytes(token_id)
        return b"" if token_id in self._hidden_ids else data


def _valid_unicode(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which a Python string can hold but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
