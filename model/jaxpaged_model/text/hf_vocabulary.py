"""Reads the vocabulary of a Hugging Face folder: `tokenizer.json` and the small files beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import tokenizers

from jaxpaged_model.metadata import Metadata, ModelError, read_json
from jaxpaged_model.text.detokenize import byte_level_bytes
from jaxpaged_model.text.spm import SPACE_MARK
from jaxpaged_model.text.vocabulary import Vocabulary, byte_of, stop_ids


class _LibraryEncoder:
    """`tokenizers.Tokenizer` as a function of (text, parse_special)."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self._parsing = library

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        # A flag of the object decides whether special tokens are parsed: threads need one object for each value.
        literal = copy.deepcopy(self._parsing)
        literal.encode_special_tokens = True
        return literal

    def __call__(self, text: str, parse_special: bool) -> list[int]:
        library = self._parsing if parse_special else self._literal
        return library.encode(text, add_special_tokens=False).ids


def read(folder: Path) -> Vocabulary:
    """The vocabulary of a folder; see `Tokenizer.from_folder`."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        hint = ", only tokenizer.model: convert it first" if (folder / "tokenizer.model").is_file() else ""
        raise ModelError(f"no tokenizer.json in {folder}{hint}")
    description = read_json(path)
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises nothing narrower.
        raise ModelError(f"{path} is not a tokenizer: {error}") from error
    library.no_truncation()
    library.no_padding()

    ids = library.get_vocab(with_added_tokens=True)
    to_bytes, strip_space = _folder_decoder(description, path)
    added = {int(token["id"]): token for token in description.get("added_tokens", [])}
    pieces = [b""] * (max(ids.values(), default=-1) + 1)
    for text, token in ids.items():
        pieces[token] = text.encode() if token in added else to_bytes(text)

    config = _optional(folder / "tokenizer_config.json")
    special_map = _optional(folder / "special_tokens_map.json")
    generation = _optional(folder / "generation_config.json")
    model_config = _optional(folder / "config.json")

    def named_ids(name: str) -> list[int]:
        text = _token_text(config, name) or _token_text(special_map, name)
        by_text = [ids[text]] if text in ids else []
        key = f"{name}_id"
        file = generation if key in generation.values else model_config
        if isinstance(file.get(key), list):
            listed = file.array(key, int)
        else:
            listed = [file.integer(key, -1, least=None)]
        return [*by_text, *(token for token in listed if 0 <= token < len(pieces))]

    bos_id = next(iter(named_ids("bos_token")), None)
    eos_ids = named_ids("eos_token")
    eos_id = next(iter(eos_ids), None)
    prefix, suffix = _affixes_of_library(library)
    add_bos, add_eos = (config.boolean(key, None) for key in ("add_bos_token", "add_eos_token"))
    return Vocabulary(
        pieces=pieces,
        hidden_ids=frozenset(token for token, entry in added.items() if entry.get("special")),
        encode_text=_LibraryEncoder(library),
        strip_space=strip_space,
        prefix=_with_override(prefix, bos_id, add_bos, at_start=True),
        suffix=_with_override(suffix, eos_id, add_eos, at_start=False),
        bos_id=bos_id,
        eos_id=eos_id,
        stop_ids=stop_ids(ids, eos_ids),
        chat_template=_folder_template(folder, config),
    )


def _optional(path: Path) -> Metadata:
    return Metadata(read_json(path) if path.is_file() else {}, file=path.name)


def _token_text(file: Metadata, name: str) -> str | None:
    """A token's text; files write it as it is, or as an object's "content"."""
    entry = file.get(name)
    text = entry.get("content") if isinstance(entry, dict) else entry
    if text is not None and not isinstance(text, str):
        raise file.wrong(name, 'a string, or an object with a string as its "content"')
    return text


def _folder_decoder(description: Mapping[str, Any], path: Path) -> tuple[Callable[[str], bytes], bool]:
    """Returns (function from a token's text to its bytes, True if a text's leading space is dropped)."""
    decoder = description.get("decoder") or {}
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    names = {step.get("type") for step in steps}
    if "ByteLevel" in names:
        return byte_level_bytes, False
    if not names & {"Metaspace", "ByteFallback", "Replace"}:
        raise ModelError(
            f"{path} has the decoder {decoder.get('type')!r}; supported are byte-level and SentencePiece"
        )
    strip_space = False
    mark = SPACE_MARK
    for step in steps:
        if step.get("type") == "Strip":
            strip_space = step.get("start", 0) > 0
        elif step.get("type") == "Metaspace":
            mark = step.get("replacement", SPACE_MARK)
            strip_space = step.get("prepend_scheme", "always") != "never" and step.get(
                "add_prefix_space", True
            )
    return partial(_fallback_bytes, mark=mark), strip_space


def _fallback_bytes(text: str, *, mark: str) -> bytes:
    byte = byte_of(text)
    return text.replace(mark, " ").encode() if byte is None else bytes([byte])


def _affixes_of_library(library: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor of `tokenizer.json` puts before and behind a text, found by encoding one."""
    bare = library.encode("a", add_special_tokens=False).ids
    full = library.encode("a", add_special_tokens=True).ids
    starts = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    start = next(starts, 0)
    return tuple(full[:start]), tuple(full[start + len(bare) :])


def _with_override(
    affix: tuple[int, ...], token: int | None, wanted: bool | None, *, at_start: bool
) -> tuple[int, ...]:
    """The affix with the token added or removed if `tokenizer_config.json` says so."""
    if token is None or wanted is None or wanted == (token in affix):
        return affix
    if not wanted:
        return tuple(other for other in affix if other != token)
    return (token, *affix) if at_start else (*affix, token)


def _folder_template(folder: Path, config: Metadata) -> str | None:
    """The chat template: its own file first, as in transformers, then `tokenizer_config.json`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {path}: {error}") from error
    file = config if config.get("chat_template") else _optional(folder / "chat_template.json")
    template = file.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise file.wrong("chat_template", "a string, or a list of named strings")
    return template
