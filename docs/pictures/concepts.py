"""Draws the pictures of docs/concepts from real caches, into concepts/ beside this file:

python docs/pictures/concepts.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged import (
    GroupedKVCache,
    LayerGroup,
    PagedKVCache,
    Rope,
    reserve,
    seq_copy,
    seq_defragment,
    seq_remove,
    seq_shift,
)
from jaxpaged.engine import Engine, EngineConfig, EngineRequest
from jaxpaged.pictures.page_map import colour

PAGE_SIZE, SLOT, ACROSS = 8, 21, 3
MARGIN, GAP = 14, 14
WIDTH = 2 * MARGIN + ACROSS * PAGE_SIZE * SLOT + (ACROSS - 1) * GAP
"""Three pages in a row, so that a telephone shows numbers that can be read."""
ENTRY = (WIDTH - 2 * MARGIN) / 5 - 4
STYLE = (
    """
.back{fill:#fff}text{fill:#1f2328;font:13px system-ui,sans-serif}text.title{font:600 13px ui-monospace,monospace}
text.faint{fill:#59636e;font-size:12px}text.number{fill:#fff;font-size:12px;text-anchor:middle;stroke:#0008;stroke-width:2px;paint-order:stroke}
.slot{fill:none;stroke:#8c959f;stroke-width:.6}.cached{fill:#818b98}.entry{fill:none;stroke-width:1.5}
text.cell{font:12px ui-monospace,monospace}.edge{fill:none;stroke:#1f2328;stroke-width:2}
@media (prefers-color-scheme:dark){.back{fill:#15181d}text{fill:#e6edf3}text.faint{fill:#9198a1}.edge{stroke:#e6edf3}}
""".strip()
    + "".join(f".s{i}{{fill:{colour(i)};stroke:{colour(i)}}}" for i in range(2))
)
TABLE = ("pages", "first_slot", "num_tokens", "position", "rotation")

Panel = tuple[str, PagedKVCache]


def rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'


def text(kind: str, x: float, y: float, words: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{words}</text>'


def entries(cache: PagedKVCache, seq: int) -> list[tuple[int, ...]]:
    """Page, first slot, tokens, position and rotation of each entry of a sequence."""
    columns = [np.asarray(getattr(cache.table, name))[seq].tolist() for name in TABLE]
    return list(zip(*columns, strict=True))[: int(cache.table.num_entries[seq])]


def label(cache: PagedKVCache, page: int, count: int) -> str:
    if count == 0:
        return f"page {page}, free"
    if cache.staging is None:
        return f"page {page}, count {count}"
    residual = bool(cache.staging.is_residual(jnp.asarray(page)))
    return f"page {page}, " + ("16 bits, staged" if residual else str(cache.k_format.title))


def panel(title: str, cache: PagedKVCache, top: float) -> tuple[list[str], float]:
    """The pool, and below it the block table's row of each sequence: ``(elements, bottom)``."""
    parts, owners = [text("title", MARGIN, top, title)], {}
    for seq in range(cache.max_seqs):
        for page, first, count, position, _ in entries(cache, seq):
            for i in range(count):
                owners.setdefault((page, first + i), []).append((seq, position + i))
    y = top + 8
    for page, count in enumerate(np.asarray(cache.allocator.ref_counts).tolist()):
        row, column = divmod(page, ACROSS)
        x, y = MARGIN + column * (PAGE_SIZE * SLOT + GAP), top + 8 + row * (SLOT + 26)
        parts.append(text("faint", x, y + 14, label(cache, page, count)))
        cached = count and not any((page, slot) in owners for slot in range(PAGE_SIZE))
        for slot in range(PAGE_SIZE):
            left, here = x + slot * SLOT, owners.get((page, slot), [])
            for i, (seq, _) in enumerate(here):
                high = SLOT / len(here)
                parts.append(rect(f"s{seq}", left, y + 19 + i * high, SLOT, high))
            if cached:
                parts.append(rect("cached", left, y + 19, SLOT, SLOT))
            parts.append(rect("slot", left, y + 19, SLOT, SLOT))
            if here:
                parts.append(text("number", left + SLOT / 2, y + 34, str(here[0][1])))
        if len({seq for (p, _), of in owners.items() if p == page for seq, _ in of}) > 1:
            parts.append(rect("edge", x, y + 19, PAGE_SIZE * SLOT, SLOT))
    y += SLOT + 38
    for seq in range(cache.max_seqs):
        found = entries(cache, seq)
        if found:
            parts.append(text("faint", MARGIN, y, f"block table, sequence {seq}"))
            for i, (page, first, count, position, rotation) in enumerate(found):
                row, column = divmod(i, 5)
                x, at = MARGIN + column * (ENTRY + 4), y + 6 + row * 42
                parts.append(
                    f'<rect class="entry" stroke="{colour(seq)}" x="{x:g}" y="{at:g}" width="{ENTRY:g}" height="38"/>'
                )
                turned = f" r{rotation}" if rotation else ""
                parts.append(text("cell", x + 6, at + 16, f"{page}: {first}-{first + count - 1}"))
                parts.append(text("cell", x + 6, at + 31, f"= {position}-{position + count - 1}{turned}"))
            y += 42 * -(-len(found) // 5) + 22
    return parts, y


def draw(panels: list[Panel]) -> str:
    """An SVG picture of states one below the other, for light and dark backgrounds."""
    parts: list[str] = []
    bottom = 26.0
    for title, cache in panels:
        more, bottom = panel(title, cache, bottom)
        parts += more
        bottom += 14
    height = bottom - 26
    size = f'width="{WIDTH:g}" height="{height:g}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height:g}" {size}>',
            f"<style>{STYLE}</style>",
            f'<rect class="back" {size} rx="6"/>',
            *parts,
            "</svg>\n",
        ]
    )


def create(**options: Any) -> PagedKVCache:
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "num_pages": 6, "max_seqs": 2}
    return PagedKVCache.create(**sizes | {"page_size": PAGE_SIZE, "rope": Rope.create(())} | options)


def pages() -> list[Panel]:
    cache, _, _ = reserve(create(), jnp.array([20, 5]))
    return [("reserve(cache, [20, 5])", cache)]


def copy_on_write() -> list[Panel]:
    cache, _, _ = reserve(create(), jnp.array([20, 0]))
    cache, _ = seq_copy(cache, 0, 1)
    found = [("seq_copy(cache, 0, 1)", cache)]
    cache, _, _ = reserve(cache, jnp.array([1, 2]))
    return [*found, ("reserve(cache, [1, 2])", cache)]


def context_shift() -> list[Panel]:
    cache, _, _ = reserve(create(), jnp.array([20, 0]))
    found = [("20 tokens on three pages", cache)]
    cache, _ = seq_remove(cache, 0, 10, 13)
    found.append(("seq_remove(cache, 0, 10, 13)", cache))
    cache, _ = seq_shift(cache, 0, 13, -1, -3)
    found.append(("seq_shift(cache, 0, 13, -1, -3)", cache))
    cache, _ = seq_remove(cache, 0, 2, 8)
    cache, _ = seq_defragment(cache, 0)
    return [*found, ("seq_remove(cache, 0, 2, 8); seq_defragment(cache, 0)", cache)]


def windows() -> list[Panel]:
    groups = [
        LayerGroup(layers=(0,), num_kv_heads=1, head_dim=8),
        LayerGroup(layers=(1,), num_kv_heads=1, head_dim=8, window=12),
    ]
    cache = GroupedKVCache.create(groups, num_pages=6, max_seqs=1, page_size=PAGE_SIZE, step_tokens=4)
    for _ in range(10):
        cache, _, _ = reserve(cache, jnp.array([4]), num_tokens=4)
    titles = ("layer 0: 40 tokens", "layer 1, window of 12: what the next token sees")
    return list(zip(titles, cache.parts, strict=True))


def prefix_cache() -> list[Panel]:
    """An engine on a model of no layers, which prefers token 7."""

    def model(params: Any, tokens: Any, cache: Any, batch: Any, rows: Any) -> tuple[Any, Any]:
        return jnp.zeros((len(rows), 32)).at[:, 7].set(params), cache

    config = EngineConfig(n_ctx=40, vocab_size=32, max_batch_tokens=32, decode_steps=1)
    engine = Engine(model, jnp.float32(9), create(), config)
    engine.compile()

    def now() -> PagedKVCache:  # a copy, because the next step donates the cache
        return jax.tree.map(jnp.array, engine.device.cache)

    def run(name: str, prompt: list[int]) -> PagedKVCache:
        """The cache before the last step, while the request has its pages."""
        engine.add_request(EngineRequest(name, tuple(prompt), max_new_tokens=3))
        before = now()
        while engine.has_work:
            before = now()
            engine.step()
        return before

    shared = list(range(1, 18))
    found = [("request A: a prompt of 20 tokens", run("a", [*shared, 20, 21, 22]))]
    found.append(("A has ended: its pages stay, cached", now()))
    return [*found, ("request B begins with the same 17 tokens", run("b", [*shared, 23, 24]))]


def residual_pages() -> list[Panel]:
    cache = create(head_dim=32, dtype="q4_k", max_seqs=1)
    cache, _, _ = reserve(cache, jnp.array([20]))
    found = [("reserve(cache, [20])", cache)]
    cache, _, _ = reserve(cache, jnp.array([6]))
    return [*found, ("reserve(cache, [6])", cache)]


PICTURES: dict[str, Callable[[], list[Panel]]] = {
    made.__name__: made
    for made in (pages, copy_on_write, context_shift, windows, prefix_cache, residual_pages)
}
FOLDER = Path(__file__).with_suffix("")

if __name__ == "__main__":
    for name, made in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(made()), encoding="utf-8")
