"""Draws sequences.svg beside this file, from a real cache: python docs/pictures/sequences.py"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxpaged import PagedKVCache, Rope, reserve, seq_copy, seq_defragment, seq_remove, seq_shift

PAGE_SIZE, PAGES, SLOT, PITCH = 8, 6, 21, 186
COLOURS = ("#4c8bd6", "#e08a3c")
LEFT, TOP, PANEL = 16, 14, 118


def states() -> list[tuple[str, PagedKVCache]]:
    """Title and result of each operation."""
    cache = PagedKVCache.create(
        num_layers=1,
        num_kv_heads=1,
        head_dim=8,
        num_pages=PAGES,
        max_seqs=2,
        page_size=PAGE_SIZE,
        rope=Rope.create(()),
    )
    cache, _, _ = reserve(cache, jnp.array([20, 0]))
    found = [("reserve(cache, [20, 0]): 20 tokens on three pages", cache)]
    cache, _ = seq_remove(cache, 0, 10, 13)
    found.append(("seq_remove(cache, 0, 10, 13): an entry is split in two, on one page", cache))
    cache, _ = seq_shift(cache, 0, 13, -1, -3)
    found.append(
        (
            "seq_shift(cache, 0, 13, -1, -3): positions change, keys do not; r = rotation offset",
            cache,
        )
    )
    cache, _ = seq_copy(cache, 0, 1)
    found.append(("seq_copy(cache, 0, 1): both sequences share the pages", cache))
    cache, _, _ = reserve(cache, jnp.array([1, 2]))
    found.append(("reserve(cache, [1, 2]): a shared page is copied before a write", cache))
    cache, _ = seq_remove(cache, 1)
    cache, _ = seq_remove(cache, 0, 2, 8)
    found.append(("seq_remove(cache, 1), seq_remove(cache, 0, 2, 8): unreferenced pages are free", cache))
    cache, _ = seq_defragment(cache, 0)
    found.append(("seq_defragment(cache, 0): the one operation that moves keys and values", cache))
    return found


def panel(title: str, cache: PagedKVCache, top: float) -> list[str]:
    """Slots of the pool, and below them the entries of each sequence."""
    table = {
        name: np.asarray(getattr(cache.table, name))
        for name in ("pages", "first_slot", "num_tokens", "position", "rotation", "num_entries")
    }
    owners: dict[tuple[int, int], list[tuple[int, int]]] = {}
    words: list[list[str]] = [[], []]
    for seq in range(2):
        for e in range(table["num_entries"][seq]):
            page, first, count, position, rotation = (
                int(table[name][seq, e])
                for name in ("pages", "first_slot", "num_tokens", "position", "rotation")
            )
            for i in range(count):
                owners.setdefault((page, first + i), []).append((seq, position + i))
            offset = f" r{rotation}" if rotation else ""
            words[seq].append(
                f"{position}-{position + count - 1} on {page}:{first}-{first + count - 1}{offset}"
            )
    parts = [f'<text x="{LEFT}" y="{top + 12}" class="title">{title}</text>']
    for page in range(PAGES):
        x0 = LEFT + page * PITCH
        count = int(cache.allocator.ref_counts[page])
        label = "free" if count == 0 else f"count {count}"
        parts.append(f'<text x="{x0}" y="{top + 30}" class="faint">page {page}, {label}</text>')
        for slot in range(PAGE_SIZE):
            x, y = x0 + slot * SLOT, top + 35
            here = owners.get((page, slot), [])
            for i, (seq, _) in enumerate(here):
                height = SLOT / len(here)
                parts.append(
                    f'<rect x="{x}" y="{y + i * height}" width="{SLOT}" height="{height}" fill="{COLOURS[seq]}"/>'
                )
            parts.append(f'<rect x="{x}" y="{y}" width="{SLOT}" height="{SLOT}" class="slot"/>')
            if here:
                parts.append(f'<text x="{x + SLOT / 2}" y="{y + 15}" class="number">{here[0][1]}</text>')
    for seq in range(2):
        if words[seq]:
            y = top + 72 + 15 * seq
            parts.append(f'<rect x="{LEFT}" y="{y - 9}" width="10" height="10" fill="{COLOURS[seq]}"/>')
            text = "; ".join(words[seq])
            parts.append(f'<text x="{LEFT + 15}" y="{y}" class="entry">sequence {seq}: {text}</text>')
    return parts


def picture() -> str:
    """All states as one SVG picture."""
    found = states()
    width, height = 2 * LEFT + PAGES * PITCH - 18, TOP + PANEL * len(found)
    style = (
        "text{font:12px sans-serif;fill:#222}.title{font:bold 13px monospace}.faint{fill:#777;font-size:11px}"
        ".number{text-anchor:middle;fill:#fff;font-size:11px}.slot{fill:none;stroke:#999}.entry{font:12px monospace}"
    )
    parts = [f'<rect width="{width}" height="{height}" fill="#fff"/><style>{style}</style>']
    for i, (title, cache) in enumerate(found):
        parts += panel(title, cache, TOP + i * PANEL)
    box = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{"".join(parts)}</svg>\n'


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
