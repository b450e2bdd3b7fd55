"""The vocabulary in a Hugging Face folder: `tokenizer.json` and the small files beside it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import tokenizers

from jaxpaged_model.text.detokenize import byte_level_bytes
from jaxpaged_model.text.spm import SPACE_MARK
from jaxpaged_model.text.vocabulary import TokenizerError, Vocabulary, byte_of, stop_ids


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


def read(folder: Path) -> Vocabulary:
    """The vocabulary of a folder; see `Tokenizer.from_folder`."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        hint = ", only tokenizer.model: convert it first" if (folder / "tokenizer.model").is_file() else ""
        raise TokenizerError(f"no tokenizer.json in {folder}{hint}")
    description = _read_json(path)
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
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
    return Vocabulary(
        pieces=pieces,
        hidden_ids=frozenset(token for token, entry in added.items() if entry.get("special")),
        encode_text=_LibraryEncoder(library),
        strip_space=strip_space,
        prefix=_with_override(prefix, bos_id, config.get("add_bos_token"), at_start=True),
        suffix=_with_override(suffix, eos_id, config.get("add_eos_token"), at_start=False),
        bos_id=bos_id,
        eos_id=eos_id,
        stop_ids=stop_ids(ids, eos_ids),
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
        raise TokenizerError(
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
    """What the post-processor of `tokenizer.json` puts around a text, read off a text."""
    bare = library.encode("a", add_special_tokens=False).ids
    full = library.encode("a", add_special_tokens=True).ids
    starts = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    start = next(starts, 0)
    return tuple(full[:start]), tuple(full[start + len(bare) :])


def _with_override(
    affix: tuple[int, ...], token: int | None, wanted: Any, *, at_start: bool
) -> tuple[int, ...]:
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
    template = config.get("chat_template") or _read_json(folder / "chat_template.json", optional=True).get(
        "chat_template"
    )
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
