"""Text to token ids and back, from a GGUF file's metadata or from a Hugging Face folder.

Two kinds of GGUF vocabularies are read: byte-level BPE (`tokenizer.ggml.model` = "gpt2") with the
splitting rules of its family (`pretokenizers.py`), and SentencePiece with scores and byte fallback
("llama", `spm.py`). What is not known exactly, such as a new pre-tokenizer, is refused: with a guess
the model would answer fluent nonsense.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpaged_model.metadata import ModelError
from jaxpaged_model.text import gguf_vocabulary, hf_vocabulary
from jaxpaged_model.text.detokenize import StreamDecoder
from jaxpaged_model.text.vocabulary import FIM_TEXTS, Vocabulary


class Tokenizer:
    """A vocabulary with its rules. Immutable; safe to share between threads.

    Attributes:
        vocab_size: number of tokens; their ids are below it.
        bos_id, eos_id: ids of the begin and end of a text, None if the vocabulary has none.
        stop_ids: every token that ends generation (end of text, of turn, of message, ...).
        add_bos, add_eos: True if `encode(..., add_special=True)` adds them.
        chat_template: the Jinja source that came with the vocabulary, or None.
        fim_ids: tokens of fill-in-the-middle: "pre", "suf", "mid", and "rep" and "sep" if there are any;
            empty if the first three are not complete.
    """

    def __init__(self, vocabulary: Vocabulary, num_rows: int | None = None) -> None:
        """Use `from_gguf` or `from_folder`."""
        self._pieces = vocabulary.pieces
        self._hidden_ids = vocabulary.hidden_ids
        self._encode_text = vocabulary.encode_text
        self._strip_space = vocabulary.strip_space
        self._prefix = vocabulary.prefix
        self._suffix = vocabulary.suffix
        self.vocab_size = len(vocabulary.pieces)
        self._num_rows = self.vocab_size if num_rows is None else num_rows
        if self.vocab_size > self._num_rows:
            raise ModelError(
                f"the tokenizer has {self.vocab_size} tokens, the model's embedding only {num_rows} rows"
            )
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.stop_ids = vocabulary.stop_ids
        self.add_bos = self.bos_id is not None and self.bos_id in self._prefix
        self.add_eos = self.eos_id is not None and self.eos_id in self._suffix
        self.chat_template = vocabulary.chat_template
        self.fim_ids = _fim_ids(vocabulary)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer of a GGUF file.

        Args:
            metadata: plain values by GGUF key, such as `"tokenizer.ggml.tokens": list[str]`.

        Raises:
            ModelError: a key is missing, has a value of another type, contradicts another, or names a
                tokenizer that is not supported.
        """
        return cls(gguf_vocabulary.read(metadata))

    @classmethod
    def from_folder(cls, folder: Path, *, num_rows: int | None = None) -> Tokenizer:
        """The tokenizer of a Hugging Face folder: `tokenizer.json` and the small files beside it.

        Args:
            folder: the folder.
            num_rows: rows of the model's embedding; None = one for each token. Ids from `vocab_size`
                on are padding, which decodes to nothing.

        Raises:
            ModelError: no `tokenizer.json`, an unreadable file, a key of another type, a decoder that
                is not supported, or more tokens than rows.
        """
        return cls(hf_vocabulary.read(Path(folder)), num_rows)

    @property
    def special_ids(self) -> frozenset[int]:
        """Control tokens, which `decode` skips."""
        return self._hidden_ids

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of a text.

        Args:
            add_special: add BOS before and EOS behind, if the vocabulary asks for them.
            parse_special: recognize control tokens written out in the text (`<|im_end|>`). User-defined
                tokens always are. Leave it off for text from users.
        """
        ids = self._encode_text(_valid_unicode(text), parse_special) if text else []
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD.

        The space that a SentencePiece vocabulary puts before a text is dropped. Spaces before
        punctuation stay.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        piece = self._visible_bytes if skip_special else self.token_bytes
        data = b"".join(map(piece, ids))
        return (data.removeprefix(b" ") if self._strip_space else data).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, perhaps a part of a character; its name for a special token, none for padding.

        Raises:
            ValueError: the id is not in the vocabulary.
        """
        if not 0 <= token_id < self._num_rows:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size} tokens")
        return self._pieces[token_id] if token_id < self.vocab_size else b""

    def stream(self, *, at_start: bool = True, visible: Collection[int] = ()) -> StreamDecoder:
        """A decoder for tokens that arrive one at a time; its texts joined equal `decode` of all of them.

        Args:
            at_start: False if the tokens continue a text, so that a leading space is kept.
            visible: special tokens that are written out.
        """

        def piece(token_id: int) -> bytes:
            return self.token_bytes(token_id) if token_id in visible else self._visible_bytes(token_id)

        return StreamDecoder(piece, self._strip_space and at_start)

    def _visible_bytes(self, token_id: int) -> bytes:
        data = self.token_bytes(token_id)
        return b"" if token_id in self._hidden_ids else data


def _fim_ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Tokens of fill-in-the-middle: those that the file names, else those known by their texts."""
    wanted = {text.encode(): name for name, texts in FIM_TEXTS.items() for text in texts}
    found: dict[str, int] = {}
    for token, piece in enumerate(vocabulary.pieces):
        if piece in wanted:
            found.setdefault(wanted[piece], token)
    found |= vocabulary.fim_ids
    return found if {"pre", "suf", "mid"} <= found.keys() else {}


def _valid_unicode(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which a Python string can hold but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
