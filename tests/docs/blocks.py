"""Pages of the documentation, their fenced blocks, and the commands in these and between backticks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    if path.parent.name != "notebooks"  # made by scripts that have a test of their own
)
FENCE = re.compile(r"^([ \t]*)```(\S*)\n(.*?)^\1```$", re.M | re.S)


class Block(NamedTuple):
    """A fenced block."""

    page: str
    language: str
    code: str


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[Block]:
    """Blocks of a page, of these languages or of all."""
    found = [Block(page, language, code) for _, language, code in FENCE.findall(text_of(page))]
    return [block for block in found if not languages or block.language in languages]


def commands(page: str) -> Iterator[list[str]]:
    """Words of each command in a page's shell blocks, and in its text where one begins with a program of ours."""
    for block in blocks(page, "sh"):
        for line in block.code.replace("\\\n", " ").splitlines():
            yield from split(line)
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text_of(page))):
        if re.match(r"(jaxpaged|make)\s+[a-z-]+|python -m\s+tpu_scripts", code):
            yield from split(" ".join(code.split()))


def split(line: str) -> Iterator[list[str]]:
    """Commands of a line, without what sets their environment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word.strip("|&;"):
            if words or not re.match(r"\w+=", word):
                words.append(word)
        elif words:
            yield words
            words = []
