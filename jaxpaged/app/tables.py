"""Markdown tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def markdown_table(columns: Mapping[str, Sequence[str]], left: Collection[str]) -> str:
    """Table of columns by their heads; those in ``left`` are aligned to the left, others to the right."""
    widths = {head: max(map(len, (head, *cells))) for head, cells in columns.items()}
    rule = ["-" * w if head in left else "-" * (w - 1) + ":" for head, w in widths.items()]
    lines = [
        [
            cell.ljust(w) if head in left else cell.rjust(w)
            for cell, (head, w) in zip(row, widths.items(), strict=True)
        ]
        for row in (columns, *zip(*columns.values(), strict=True))
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))
