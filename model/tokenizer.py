"""Text to token ids and back, from a GGUF file's metadata or from a Hugging Face folder.

Two kinds of GGUF vocabularies are read: byte-level BPE (`tokenizer.ggml.model` = "gpt2") with the splitting rules of
its family (`pretokenizers.py`), and SentencePiece with scores and byte fallback ("llama", `spm.py`). Everything that
is not known exactly, such as a new pre-tokenizer, is refused: a guess gives fluent nonsense.
"""

from __future__ import annotations

import copy
import enum
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from model.detokenize import StreamDecoder, byte_level_bytes
from model.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from model.spm import SPACE_MARK, ScoreMerger

try:
    import tokenizers
except ImportError as error:
    raise ImportError("model.tokenizer needs the package 'tokenizers': pip install tokenizers") from error

__all__ = ["StreamDecoder", "Tokenizer", "TokenizerError"]


class TokenizerError(ValueError):
    """A vocabulary that cannot be used, or a token that is not in it, in one line."""


class TokenKind(enum.IntEnum):
    """`tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_UNSUPPORTED_MODELS = {
    "bert": "WordPiece",
    "t5": "SentencePiece Unigram",
    "rwkv": "RWKV",
    "plamo2": "PLaMo-2",
    "hybriddna": "DNA k-mer",
    "whitespace": "whitespace",
    "none": "empty",
    "no_vocab": "empty",
}
_SUPPORTED = "supported are 'gpt2' and 'gemma4' (BPE) and 'llama' (SentencePiece with scores)"

# Tokens that end generation wherever they are in a vocabulary, as in llama.cpp: files often name only one of them.
_STOP_TEXTS = frozenset(
    (
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|tool_response>",
        "<turn|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<eos>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "[e~[",
        "</s>",
        "<｜end▁of▁sentence｜>",
        # Padding, repository and file separators of fill-in-the-middle models: what follows is another document.
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<PAD>",
        "[PAD]",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<reponame>",
        "<|file_sep|>",
    )
)
_STOP_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# gpt-oss marks the parts of an answer with these; hidden, the parts would run into each other.
_ALWAYS_VISIBLE = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
_SPACE_CHARACTERS = " \t\n\v\f\r"


class Tokenizer:
    """A vocabulary with its rules. Immutable; safe to share between threads.

    Attributes:
        vocab_size: number of token ids.
        bos_id, eos_id: ids of the begin and end of a text, None where the vocabulary has none.
        stop_ids: every token that ends generation (end of text, of turn, of message, ...).
        add_bos, add_eos: whether `encode(..., add_special=True)` adds them.
        chat_template: the Jinja source that came with the vocabulary, or None.
    """

    def __init__(
        self,
        *,
        pieces: Sequence[bytes],
        hidden_ids: frozenset[int],
        encode_text: Callable[[str, bool], list[int]],
        strip_space: bool,
        prefix: tuple[int, ...],
        suffix: tuple[int, ...],
        bos_id: int | None,
        eos_id: int | None,
        stop_ids: frozenset[int],
        chat_template: str | None,
    ) -> None:
        """Use `from_gguf` or `from_folder`.

        Args:
            pieces: the bytes of each token, by id.
            hidden_ids: special tokens that `decode` skips.
            encode_text: (text, parse_special) -> ids, without prefix and suffix.
            strip_space: a text starts with a space that is not the user's.
            prefix, suffix: what `add_special` puts around a text.
        """
        self._pieces = pieces
        self._hidden_ids = hidden_ids
        self._encode_text = encode_text
        self._strip_space = strip_space
        self._prefix = prefix
        self._suffix = suffix
        self.vocab_size = len(pieces)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.stop_ids = stop_ids
        self.add_bos = bos_id is not None and bos_id in prefix
        self.add_eos = eos_id is not None and eos_id in suffix
        self.chat_template = chat_template

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer of a GGUF file.

        Args:
            metadata: values by GGUF key, plain Python or numpy, e.g. `"tokenizer.ggml.tokens": list[str]`.

        Raises:
            TokenizerError: a key is missing, contradicts another, or names a tokenizer that is not supported.
        """
        return _from_gguf(cls, metadata)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder: `tokenizer.json` and the small files beside it.

        Raises:
            TokenizerError: no `tokenizer.json`, an unreadable file, or a decoder that is not supported.
        """
        return _from_folder(cls, Path(folder))

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


# --- special tokens written out in a text -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _SpecialToken:
    id: int
    strip_left: bool = False
    strip_right: bool = False


class _SpecialTokens:
    """Finds special tokens in a text: leftmost first, the longest of those that start at one place."""

    def __init__(self, tokens: Mapping[str, _SpecialToken]) -> None:
        self._tokens = tokens
        lengths: dict[str, set[int]] = {}
        for text in tokens:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}

    def split(self, text: str) -> Iterator[str | int]:
        """The text between special tokens, as strings that are never empty, and the tokens' ids, in order."""
        start = 0
        position = 0
        while position < len(text):
            found = self._at(text, position)
            if found is None:
                position += 1
                continue
            name, token = found
            before = text[start:position]
            if token.strip_left:
                before = before.rstrip(_SPACE_CHARACTERS)
            if before:
                yield before
            yield token.id
            position += len(name)
            if token.strip_right:
                while position < len(text) and text[position] in _SPACE_CHARACTERS:
                    position += 1
            start = position
        if start < len(text):
            yield text[start:]

    def _at(self, text: str, position: int) -> tuple[str, _SpecialToken] | None:
        for length in self._lengths.get(text[position], ()):
            name = text[position : position + length]
            token = self._tokens.get(name)
            if token is not None:
                return name, token
        return None


# --- GGUF -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Vocabulary:
    """The token table of a GGUF file: texts and kinds by id, ids by text."""

    texts: list[str]
    kinds: list[TokenKind]
    ids: dict[str, int]

    def having(self, *kinds: TokenKind) -> list[int]:
        return [token for token, kind in enumerate(self.kinds) if kind in kinds]


def _from_gguf(cls: type[Tokenizer], metadata: Mapping[str, Any]) -> Tokenizer:
    model = str(_required(metadata, "tokenizer.ggml.model"))
    if model in _UNSUPPORTED_MODELS:
        name = _UNSUPPORTED_MODELS[model]
        raise TokenizerError(f"tokenizer model {model!r} ({name} vocabulary) is not supported; {_SUPPORTED}")
    if model not in ("gpt2", "gemma4", "llama"):
        raise TokenizerError(f"unknown tokenizer model {model!r}; {_SUPPORTED}")
    is_spm = model == "llama"
    pre_tokenizer = None if is_spm else _pre_tokenizer(metadata, model)

    vocabulary = _vocabulary(metadata)
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if is_spm else {}
    special = {
        name: _special_id(metadata, name, defaults.get(name), len(vocabulary.texts))
        for name in ("bos", "unknown", *_STOP_KEYS)
    }
    stop_ids = _stop_ids(vocabulary.ids, [special[name] for name in _STOP_KEYS])
    for token in stop_ids:
        if vocabulary.texts[token] in _STOP_TEXTS:
            vocabulary.kinds[token] = TokenKind.CONTROL
    for text in _ALWAYS_VISIBLE:
        if text in vocabulary.ids:
            vocabulary.kinds[vocabulary.ids[text]] = TokenKind.USER_DEFINED

    user_defined, all_special = _special_tokens(metadata, vocabulary)
    add_space_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", is_spm)) and is_spm
    if pre_tokenizer is None:
        fragment_ids = _spm_encoder(metadata, vocabulary, special["unknown"])
        to_bytes = _spm_bytes
    else:
        fragment_ids = _bpe_encoder(metadata, vocabulary, pre_tokenizer)
        to_bytes = byte_level_bytes if pre_tokenizer.byte_level else _spm_bytes

    def encode_text(text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        after_special = True
        for part in (all_special if parse_special else user_defined).split(text):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
            else:
                ids.extend(fragment_ids(" " + part if add_space_prefix and after_special else part))
                after_special = False
        return ids

    bos_id, eos_id = special["bos"], special["eos"]
    default_bos = is_spm if pre_tokenizer is None else pre_tokenizer.add_bos and bos_id is not None
    force_bos = pre_tokenizer is not None and pre_tokenizer.force_bos
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", default_bos)) or force_bos
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    template = metadata.get("tokenizer.chat_template")
    return cls(
        pieces=[_gguf_piece(text, kind, to_bytes) for text, kind in zip(vocabulary.texts, vocabulary.kinds, strict=True)],
        hidden_ids=frozenset(vocabulary.having(TokenKind.CONTROL, TokenKind.UNKNOWN)),
        encode_text=encode_text,
        strip_space=add_space_prefix,
        prefix=_affix("bos", add_bos, bos_id),
        suffix=_affix("eos", add_eos, eos_id),
        bos_id=bos_id,
        eos_id=eos_id,
        stop_ids=stop_ids,
        chat_template=None if template is None else str(template),
    )


def _required(metadata: Mapping[str, Any], key: str) -> Any:
    value = metadata.get(key)
    if value is None:
        raise TokenizerError(f"the GGUF metadata has no {key!r}")
    return value


def _pre_tokenizer(metadata: Mapping[str, Any], model: str) -> PreTokenizer:
    name = "gemma4" if model == "gemma4" else str(metadata.get("tokenizer.ggml.pre") or "")
    if not name:
        warnings.warn(
            "the GGUF file is too old to name its pre-tokenizer: using 'default', some text may be split wrongly",
            stacklevel=5,
        )
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise TokenizerError(f"unknown pre-tokenizer {name!r}; known are {', '.join(sorted(PRE_TOKENIZERS))}")
    return PRE_TOKENIZERS[name]


def _vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    texts = [str(text) or f"[EMPTY_{i}]" for i, text in enumerate(_required(metadata, "tokenizer.ggml.tokens"))]
    ids = {text: token for token, text in reversed(list(enumerate(texts)))}
    if len(ids) != len(texts):
        token = next(token for token, text in enumerate(texts) if ids[text] != token)
        raise TokenizerError(f"tokens {ids[texts[token]]} and {token} are both {texts[token]!r}")
    numbers = metadata.get("tokenizer.ggml.token_type")
    known = {kind.value: kind for kind in TokenKind}
    kinds = (
        [TokenKind.NORMAL] * len(texts)
        if numbers is None
        else [known.get(int(number), TokenKind.UNDEFINED) for number in numbers]
    )
    if len(kinds) != len(texts):
        raise TokenizerError(f"'tokenizer.ggml.token_type' has {len(kinds)} entries for {len(texts)} tokens")
    return _Vocabulary(texts, kinds, ids)


def _special_id(metadata: Mapping[str, Any], name: str, default: int | None, vocab_size: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return default if default is not None and default < vocab_size else None
    if not 0 <= int(value) < vocab_size:
        raise TokenizerError(f"{key!r} is {int(value)}, outside the vocabulary of {vocab_size} tokens")
    return int(value)


def _affix(name: str, wanted: bool, token: int | None) -> tuple[int, ...]:
    if not wanted:
        return ()
    if token is None:
        raise TokenizerError(
            f"'tokenizer.ggml.add_{name}_token' is true, but there is no 'tokenizer.ggml.{name}_token_id'"
        )
    return (token,)


def _stop_ids(ids: Mapping[str, int], named: Iterable[int | None]) -> frozenset[int]:
    """The named tokens, and those known by their text."""
    stops = {text for text in _STOP_TEXTS if text in ids}
    calls = {"<|call|>", "<|calls|>"} & stops
    not_stops = set()
    if calls and "<|return|>" in stops or calls and "<|flush|>" in stops:
        not_stops.add("<|end|>")  # In gpt-oss and Solar this closes a part of an answer, not the answer.
    if "<|tool_response>" in stops:
        not_stops.add("</s>")  # In Gemma 4 an HTML tag like any other.
    named_ids = {token for token in named if token is not None}
    return frozenset((named_ids | {ids[text] for text in stops}) - {ids[text] for text in not_stops if text in ids})


def _special_tokens(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> tuple[_SpecialTokens, _SpecialTokens]:
    """Those read in every text (user-defined), and those read with `parse_special`.

    GGUF does not say which tokens swallow the spaces beside them; llama.cpp knows a few models by name.
    """
    name = str(metadata.get("general.name", "")).lower()
    pre = str(metadata.get("tokenizer.ggml.pre", ""))
    is_phi3 = "phi-3" in name or "phi3" in name
    left_strippers = {"<mask>"} if pre in ("jina-v2-de", "jina-v2-es", "jina-v2-code") else set()
    if "modern-bert" in name:
        left_strippers = {"[MASK]"}

    def tokens(*kinds: TokenKind) -> _SpecialTokens:
        found = {}
        for token in vocabulary.having(*kinds):
            text = vocabulary.texts[token]
            strip_right = is_phi3 and text not in ("<unk>", "<s>", "<|endoftext|>")
            found[text] = _SpecialToken(token, strip_left=text in left_strippers, strip_right=strip_right)
        return _SpecialTokens(found)

    return (
        tokens(TokenKind.USER_DEFINED),
        tokens(TokenKind.USER_DEFINED, TokenKind.CONTROL, TokenKind.UNKNOWN),
    )


def _gguf_piece(text: str, kind: TokenKind, to_bytes: Callable[[str], bytes]) -> bytes:
    match kind:
        case TokenKind.NORMAL:
            return to_bytes(text)
        case TokenKind.BYTE:
            byte = _byte_of(text)
            if byte is None:
                raise TokenizerError(f"byte token {text!r} is not of the form <0xXX>")
            return bytes([byte])
        case TokenKind.CONTROL | TokenKind.UNKNOWN | TokenKind.USER_DEFINED:
            return text.encode()
        case _:
            return b""


def _byte_of(text: str) -> int | None:
    """The byte of a token written `<0xXX>`."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return None
    return None


def _spm_bytes(text: str) -> bytes:
    return text.replace(SPACE_MARK, " ").encode()


def _spm_encoder(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, unknown_id: int | None
) -> Callable[[str], list[int]]:
    size = len(vocabulary.texts)
    scores = [float(score) for score in metadata.get("tokenizer.ggml.scores", [0.0] * size)]
    if len(scores) != size:
        raise TokenizerError(f"'tokenizer.ggml.scores' has {len(scores)} entries for {size} tokens")
    # Control tokens are left out, so that no text can spell one.
    mergeable = vocabulary.having(
        TokenKind.NORMAL, TokenKind.USER_DEFINED, TokenKind.UNUSED, TokenKind.UNDEFINED
    )
    byte_ids = {}
    for token in vocabulary.having(TokenKind.BYTE):
        byte = _byte_of(vocabulary.texts[token])
        if byte is not None:
            byte_ids[byte] = token
    merger = ScoreMerger({vocabulary.texts[token]: token for token in mergeable}, scores, byte_ids, unknown_id)
    return lambda fragment: merger.encode(fragment.replace(" ", SPACE_MARK))


def _bpe_encoder(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, pre_tokenizer: PreTokenizer
) -> Callable[[str], list[int]]:
    merges = _merges(_required(metadata, "tokenizer.ggml.merges"))
    products = {left + right for left, right in merges}
    missing = next((text for text in products if text not in vocabulary.ids), None)
    if missing is not None:
        raise TokenizerError(f"'tokenizer.ggml.merges' makes {missing!r}, which is not a token")
    # Control tokens are left out, so that no text can spell one, but for those that merges pass through.
    controls = {vocabulary.texts[token] for token in vocabulary.having(TokenKind.CONTROL, TokenKind.UNKNOWN)}
    parts = {part for merge in merges if (merge[0] in controls or merge[1] in controls) for part in merge}
    kept = {text: token for text, token in vocabulary.ids.items() if text not in controls - products - parts}
    try:
        bpe = tokenizers.models.BPE(
            vocab=kept,
            merges=merges,
            ignore_merges=pre_tokenizer.ignore_merges,
            byte_fallback=not pre_tokenizer.byte_level,
        )
    except Exception as error:  # The library raises nothing narrower.
        raise TokenizerError(f"the BPE vocabulary is not consistent: {error}") from error
    library = tokenizers.Tokenizer(bpe)
    steps: list[tokenizers.pre_tokenizers.PreTokenizer] = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
        for pattern in pre_tokenizer.patterns
    ]
    if pre_tokenizer.byte_level:
        steps.append(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)

    def encode_fragment(text: str) -> list[int]:
        if pre_tokenizer.escape_spaces:
            text = text.replace(" ", SPACE_MARK)
        return library.encode(text, add_special_tokens=False).ids

    if not pre_tokenizer.whole_newline_runs:
        return encode_fragment

    def encode_lines(text: str) -> list[int]:
        ids: list[int] = []
        for run in _runs(text, "\n"):
            token = vocabulary.ids.get(run) if run[0] == "\n" else None
            ids.extend(encode_fragment(run) if token is None else [token])
        return ids

    return encode_lines


def _runs(text: str, character: str) -> Iterator[str]:
    """The text cut where runs of `character` begin and end."""
    start = 0
    for i in range(1, len(text) + 1):
        if i == len(text) or (text[i] == character) != (text[i - 1] == character):
            yield text[start:i]
            start = i


def _merges(lines: Iterable[Any]) -> list[tuple[str, str]]:
    """Pairs in the order of the file; of a pair that is there twice the first counts."""
    pairs: dict[tuple[str, str], None] = {}
    for number, line in enumerate(map(str, lines)):
        # The first part may itself begin with a space, where the vocabulary is not byte-level.
        cut = line.find(" ", 1)
        if cut == -1:
            raise TokenizerError(f"merge {number} of 'tokenizer.ggml.merges' is {line!r}, not two parts with a space")
        pairs[line[:cut], line[cut + 1 :]] = None
    return list(pairs)


# --- Hugging Face folder ----------------------------------------------------------------------------------------------


class _LibraryEncoder:
    """`tokenizers.Tokenizer` behind the (text, parse_special) seam."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self._parsing = library

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        # Whether special tokens are read is a property of the object, so a second one keeps threads apart.
        literal = copy.deepcopy(self._parsing)
        literal.encode_special_tokens = True
        return literal

    def __call__(self, text: str, parse_special: bool) -> list[int]:
        library = self._parsing if parse_special else self._literal
        return library.encode(text, add_special_tokens=False).ids


def _from_folder(cls: type[Tokenizer], folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        hint = ", only tokenizer.model: convert it first" if (folder / "tokenizer.model").is_file() else ""
        raise TokenizerError(f"no tokenizer.json in {folder}{hint}")
    description = _read_json(path)
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # The library raises nothing narrower.
        raise TokenizerError(f"{path} is not a tokenizer: {error}") from error
    library.no_truncation()
    library.no_padding()

    ids = library.get_vocab(with_added_tokens=True)
    to_bytes, strip_space = _folder_decoder(description, path)
    added = {int(token["id"]): token for token in description.get("added_tokens", [])}
    pieces = [b""] * (max(ids.values(), default=-1) + 1)
    for text, token in ids.items():
        pieces[token] = text.encode() if token in added else to_bytes(text)

    config = _read_json(folder / "tokenizer_config.json", optional=True)
    generation = _read_json(folder / "generation_config.json", optional=True)
    special_map = _read_json(folder / "special_tokens_map.json", optional=True)
    model_config = _read_json(folder / "config.json", optional=True)

    def named_ids(name: str) -> list[int]:
        text = _token_text(config.get(name)) or _token_text(special_map.get(name))
        by_text = [ids[text]] if text in ids else []
        listed = generation.get(f"{name}_id", model_config.get(f"{name}_id"))
        listed = listed if isinstance(listed, list) else [listed]
        return [*by_text, *(token for token in listed if isinstance(token, int) and 0 <= token < len(pieces))]

    bos_id = next(iter(named_ids("bos_token")), None)
    eos_ids = named_ids("eos_token")
    eos_id = next(iter(eos_ids), None)
    prefix, suffix = _affixes_of_library(library)
    return cls(
        pieces=pieces,
        hidden_ids=frozenset(token for token, entry in added.items() if entry.get("special")),
        encode_text=_LibraryEncoder(library),
        strip_space=strip_space,
        prefix=_with_override(prefix, bos_id, config.get("add_bos_token"), at_start=True),
        suffix=_with_override(suffix, eos_id, config.get("add_eos_token"), at_start=False),
        bos_id=bos_id,
        eos_id=eos_id,
        stop_ids=_stop_ids(ids, eos_ids),
        chat_template=_folder_template(folder, config),
    )


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds no JSON object")
    return content


def _token_text(entry: Any) -> str | None:
    """A token as the config files write it: its text, or an object that holds it."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _folder_decoder(description: Mapping[str, Any], path: Path) -> tuple[Callable[[str], bytes], bool]:
    """How a token's text becomes bytes, and whether a leading space is dropped."""
    decoder = description.get("decoder") or {}
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    names = {step.get("type") for step in steps}
    if "ByteLevel" in names:
        return byte_level_bytes, False
    if not names & {"Metaspace", "ByteFallback", "Replace"}:
        raise TokenizerError(f"{path} has the decoder {decoder.get('type')!r}; supported are byte-level and SentencePiece")
    strip_space = False
    mark = SPACE_MARK
    for step in steps:
        if step.get("type") == "Strip":
            strip_space = step.get("start", 0) > 0
        elif step.get("type") == "Metaspace":
            mark = step.get("replacement", SPACE_MARK)
            strip_space = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
    return partial(_fallback_bytes, mark=mark), strip_space


def _fallback_bytes(text: str, *, mark: str) -> bytes:
    byte = _byte_of(text)
    return text.replace(mark, " ").encode() if byte is None else bytes([byte])


def _affixes_of_library(library: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor of `tokenizer.json` puts around a text, read off a text."""
    bare = library.encode("a", add_special_tokens=False).ids
    full = library.encode("a", add_special_tokens=True).ids
    starts = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    start = next(starts, 0)
    return tuple(full[:start]), tuple(full[start + len(bare) :])


def _with_override(affix: tuple[int, ...], token: int | None, wanted: Any, *, at_start: bool) -> tuple[int, ...]:
    """The affix with the token put in or left out where `tokenizer_config.json` says so."""
    if token is None or not isinstance(wanted, bool) or wanted == (token in affix):
        return affix
    if not wanted:
        return tuple(other for other in affix if other != token)
    return (token, *affix) if at_start else (*affix, token)


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: its own file first, as in transformers, then `tokenizer_config.json`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"cannot read {path}: {error}") from error
    template = config.get("chat_template") or _read_json(folder / "chat_template.json", optional=True).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
