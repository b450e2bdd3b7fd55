"""Reads the vocabulary of a GGUF file's metadata as llama.cpp does (`src/llama-vocab.cpp`)."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from jaxpaged_model.metadata import Metadata, ModelError
from jaxpaged_model.text.detokenize import byte_level_bytes
from jaxpaged_model.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from jaxpaged_model.text.spm import SPACE_MARK, ScoreMerger
from jaxpaged_model.text.vocabulary import STOP_TEXTS, Vocabulary, byte_of, stop_ids


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

_FIM_KEYS = ("fim_pre", "fim_suf", "fim_mid")
_STOP_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# gpt-oss delimits the channels of an answer with these; if they were hidden, channels would run together.
_CHANNEL_TOKENS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|end|>")
_SPACE_CHARACTERS = " \t\n\v\f\r"


@dataclass(frozen=True)
class _TokenTable:
    """Texts and kinds of the tokens by id, ids by text."""

    texts: list[str]
    kinds: list[TokenKind]
    ids: dict[str, int]

    def having(self, *kinds: TokenKind) -> list[int]:
        return [token for token, kind in enumerate(self.kinds) if kind in kinds]


def read(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a GGUF file; see `Tokenizer.from_gguf`."""
    m = Metadata(metadata, "tokenizer.ggml.")
    model = m.text("model")
    if model in _UNSUPPORTED_MODELS:
        name = _UNSUPPORTED_MODELS[model]
        raise ModelError(f"tokenizer model {model!r} ({name} vocabulary) is not supported; {_SUPPORTED}")
    if model not in ("gpt2", "gemma4", "llama"):
        raise ModelError(f"unknown tokenizer model {model!r}; {_SUPPORTED}")
    is_spm = model == "llama"
    pre = "gemma4" if model == "gemma4" else m.text("pre", "")
    pre_tokenizer = None if is_spm else _pre_tokenizer(pre)

    table = _token_table(m)
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if is_spm else {}
    special = {
        name: _special_ids(m, name, defaults.get(name), len(table.texts))
        for name in ("bos", "unknown", *_FIM_KEYS, *_STOP_KEYS)
    }
    stops = stop_ids(table.ids, (token for name in _STOP_KEYS for token in special[name]))
    for token in stops:
        if table.texts[token] in STOP_TEXTS:
            table.kinds[token] = TokenKind.CONTROL
    for text in _CHANNEL_TOKENS:
        if text in table.ids and table.ids[text] not in stops:
            table.kinds[table.ids[text]] = TokenKind.USER_DEFINED
    bos_id, eos_id, unknown_id = (next(iter(special[name]), None) for name in ("bos", "eos", "unknown"))

    user_defined, all_special = _special_tokens(Metadata(metadata).text("general.name", ""), pre, table)
    add_space_prefix = m.boolean("add_space_prefix", is_spm) and is_spm
    if pre_tokenizer is None:
        fragment_ids = _spm_encoder(m, table, unknown_id)
        to_bytes = _spm_bytes
        add_bos = m.boolean("add_bos_token", True)
    else:
        fragment_ids = _bpe_encoder(m, table, pre_tokenizer)
        to_bytes = byte_level_bytes if pre_tokenizer.byte_level else _spm_bytes
        default = pre_tokenizer.add_bos and bos_id is not None
        add_bos = m.boolean("add_bos_token", default) or pre_tokenizer.force_bos

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

    return Vocabulary(
        pieces=[
            _gguf_piece(text, kind, to_bytes) for text, kind in zip(table.texts, table.kinds, strict=True)
        ],
        hidden_ids=frozenset(table.having(TokenKind.CONTROL, TokenKind.UNKNOWN)),
        encode_text=encode_text,
        strip_space=add_space_prefix,
        prefix=_affix("bos", add_bos, bos_id),
        suffix=_affix("eos", m.boolean("add_eos_token", False), eos_id),
        bos_id=bos_id,
        eos_id=eos_id,
        stop_ids=stops,
        chat_template=Metadata(metadata).text("tokenizer.chat_template", None),
        fim_ids={
            name.removeprefix("fim_"): token
            for name in (*_FIM_KEYS, "fim_rep", "fim_sep")
            for token in special[name]
        },
    )


def _pre_tokenizer(name: str) -> PreTokenizer:
    if not name:
        warnings.warn(
            "the GGUF file is too old to name its pre-tokenizer: using 'default', which may split wrongly",
            stacklevel=4,
        )
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise ModelError(f"unknown pre-tokenizer {name!r}; known are {', '.join(sorted(PRE_TOKENIZERS))}")
    return PRE_TOKENIZERS[name]


def _token_table(m: Metadata) -> _TokenTable:
    texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(m.array("tokens", str))]
    ids = {text: token for token, text in reversed(list(enumerate(texts)))}
    if len(ids) != len(texts):
        token = next(token for token, text in enumerate(texts) if ids[text] != token)
        raise ModelError(f"tokens {ids[texts[token]]} and {token} are both {texts[token]!r}")
    known = {kind.value: kind for kind in TokenKind}
    numbers = _as_many(m, "token_type", int, [TokenKind.NORMAL] * len(texts))
    return _TokenTable(texts, [known.get(number, TokenKind.UNDEFINED) for number in numbers], ids)


def _as_many(m: Metadata, key: str, kind: type, default: list[Any]) -> list[Any]:
    """A list of one value for each token, ``default`` if the file has none."""
    values = m.array(key, kind, default)
    if len(values) != len(default):
        raise m.error(key, f"has {len(values)} entries for {len(default)} tokens")
    return values


def _special_ids(m: Metadata, name: str, default: int | None, vocab_size: int) -> list[int]:
    """The ids under one key: none, one, or several where the file has an array of ends of text."""
    key = f"{name}_token_id"
    if name in _STOP_KEYS and isinstance(m.get(key), list):
        given = m.array(key, int)
    else:
        given = [value for value in [m.integer(key, None, least=None)] if value is not None]
        if not given:
            return [default] if default is not None and default < vocab_size else []
    # Converters have written -1 as a very large number for "none".
    for value in given:
        if not 0 <= value < vocab_size:
            warnings.warn(f"{m.prefix}{key} is {value}, which is no token: ignored", stacklevel=5)
    return [value for value in given if 0 <= value < vocab_size]


def _affix(name: str, wanted: bool, token: int | None) -> tuple[int, ...]:
    if not wanted:
        return ()
    if token is None:
        raise ModelError(
            f"tokenizer.ggml.add_{name}_token is true, but there is no tokenizer.ggml.{name}_token_id"
        )
    return (token,)


def _special_tokens(name: str, pre: str, table: _TokenTable) -> tuple[_SpecialTokens, _SpecialTokens]:
    """The tokens recognized in every text (user-defined), and those recognized with `parse_special`.

    GGUF does not say which tokens swallow the spaces beside them; llama.cpp knows a few models by name.
    """
    name = name.lower()
    is_phi3 = "phi-3" in name or "phi3" in name
    left_strippers = {"<mask>"} if pre in ("jina-v2-de", "jina-v2-es", "jina-v2-code") else set()
    if "modern-bert" in name:
        left_strippers = {"[MASK]"}

    def tokens(*kinds: TokenKind) -> _SpecialTokens:
        found = {}
        for token in table.having(*kinds):
            text = table.texts[token]
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
            byte = byte_of(text)
            if byte is None:
                raise ModelError(f"byte token {text!r} is not of the form <0xXX>")
            return bytes([byte])
        case TokenKind.CONTROL | TokenKind.UNKNOWN | TokenKind.USER_DEFINED:
            return text.encode()
        case _:
            return b""


def _spm_bytes(text: str) -> bytes:
    return text.replace(SPACE_MARK, " ").encode()


def _spm_encoder(m: Metadata, table: _TokenTable, unknown_id: int | None) -> Callable[[str], list[int]]:
    scores = _as_many(m, "scores", float, [0.0] * len(table.texts))
    # Control tokens are left out, so that no text can spell one.
    mergeable = table.having(TokenKind.NORMAL, TokenKind.USER_DEFINED, TokenKind.UNUSED, TokenKind.UNDEFINED)
    by_byte = {byte_of(table.texts[token]): token for token in table.having(TokenKind.BYTE)}
    byte_ids = {byte: token for byte, token in by_byte.items() if byte is not None}
    merger = ScoreMerger({table.texts[token]: token for token in mergeable}, scores, byte_ids, unknown_id)
    return lambda fragment: merger.encode(fragment.replace(" ", SPACE_MARK))


def _bpe_encoder(m: Metadata, table: _TokenTable, pre_tokenizer: PreTokenizer) -> Callable[[str], list[int]]:
    listed = _merges(m.array("merges", str))
    ids = table.ids
    merges = [(a, b) for a, b in listed if a in ids and b in ids and a + b in ids]
    if len(merges) < len(listed):
        missing = len(listed) - len(merges)
        warnings.warn(f"{missing} merges lead to no token of the vocabulary: left out", stacklevel=4)
    spelled = {text for left, right in merges for text in (left, right, left + right)}
    # Control tokens are left out, so that no text can spell one, except those that merges need.
    controls = {table.texts[token] for token in table.having(TokenKind.CONTROL, TokenKind.UNKNOWN)}
    bpe = tokenizers.models.BPE(
        vocab={text: token for text, token in ids.items() if text in spelled or text not in controls},
        merges=merges,
        ignore_merges=pre_tokenizer.ignore_merges,
        byte_fallback=not pre_tokenizer.byte_level,
    )
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
            token = table.ids.get(run) if run[0] == "\n" else None
            ids.extend(encode_fragment(run) if token is None else [token])
        return ids

    return encode_lines


def _runs(text: str, character: str) -> Iterator[str]:
    """Splits the text where runs of `character` begin and end."""
    start = 0
    for i in range(1, len(text) + 1):
        if i == len(text) or (text[i] == character) != (text[i - 1] == character):
            yield text[start:i]
            start = i


def _merges(lines: list[str]) -> list[tuple[str, str]]:
    """Pairs in the order of the file; the first of duplicates counts."""
    pairs: dict[tuple[str, str], None] = {}
    for number, line in enumerate(lines):
        # The first part may itself begin with a space, where the vocabulary is not byte-level.
        cut = line.find(" ", 1)
        if cut == -1:
            raise ModelError(
                f"tokenizer.ggml.merges: entry {number}, {line!r}, is not two parts with a space"
            )
        pairs[line[:cut], line[cut + 1 :]] = None
    return list(pairs)


@dataclass(frozen=True)
class _SpecialToken:
    id: int
    strip_left: bool = False
    strip_right: bool = False


class _SpecialTokens:
    """Finds special tokens in a text: leftmost first, of those at one position the longest."""

    def __init__(self, tokens: Mapping[str, _SpecialToken]) -> None:
        self._tokens = tokens
        lengths: dict[str, set[int]] = {}
        for text in tokens:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}

    def split(self, text: str) -> Iterator[str | int]:
        """Yields the ids of special tokens and the non-empty texts between them, in order."""
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
