"""``Vocabulary``, what the readers of both kinds of files return, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Vocabulary:
    """The tokens and the rules of one tokenizer.

    pieces: bytes of each token, by id.
    hidden_ids: special tokens, which decoding skips.
    encode_text: (text, parse_special) -> ids, without prefix and suffix.
    strip_space: True if encoding puts a space before a text, which decoding drops.
    prefix, suffix: ids before and behind a whole text.
    bos_id, eos_id: ids of the begin and end of a text, None if there is none.
    stop_ids: every token that ends generation.
    chat_template: Jinja source, None if there is none.
    fim_ids: tokens of fill-in-the-middle that the file names: "pre", "suf", "mid", "rep", "sep".
    """

    pieces: Sequence[bytes]
    hidden_ids: frozenset[int]
    encode_text: Callable[[str, bool], list[int]]
    strip_space: bool
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    bos_id: int | None
    eos_id: int | None
    stop_ids: frozenset[int]
    chat_template: str | None
    fim_ids: Mapping[str, int] = field(default_factory=dict)


FIM_TEXTS = {
    "pre": (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", " <PRE>", "<PRE>",
        "<|code_prefix|>",
    ),
    "suf": (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", " <SUF>", "<SUF>",
        "<|code_suffix|>",
    ),
    "mid": (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", " <MID>", "<MID>",
        "<|code_middle|>",
    ),
    "rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "sep": ("<|file_sep|>",),
}  # fmt: skip
"""Tokens of fill-in-the-middle by their texts, as in llama.cpp: before and behind the gap, in the gap, before
a repository's name and a file's."""

STOP_TEXTS = frozenset((
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>",
    "<|endoftext|>", "<|end_of_text|>", "<|tool_response>", "<turn|>", "<end_of_turn>", "<end_of_utterance>",
    "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[", "</s>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
    # Padding, repository and file separators of fill-in-the-middle models: another document follows.
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>",
    "<REPO>", "<reponame>", "<|file_sep|>",
))  # fmt: skip
"""Tokens that end generation in any vocabulary, as in llama.cpp: files often name only one of them."""


def stop_ids(ids: Mapping[str, int], named: Iterable[int]) -> frozenset[int]:
    """The tokens that end generation: those that the file names, and those known by their text."""
    stops = {text for text in STOP_TEXTS if text in ids}
    calls = {"<|call|>", "<|calls|>"} & stops
    not_stops = set()
    if calls and stops & {"<|return|>", "<|flush|>"}:
        not_stops.add("<|end|>")  # In gpt-oss and Solar this closes a channel of an answer, not the answer.
    if "<|tool_response>" in stops:
        not_stops.add("</s>")  # In Gemma 4 this is an HTML tag.
    return frozenset(
        {*named, *(ids[text] for text in stops)} - {ids[text] for text in not_stops if text in ids}
    )


def byte_of(text: str) -> int | None:
    """The byte of a token written `<0xXX>`, None for another text."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return None
    return None
