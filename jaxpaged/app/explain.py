"""``jaxpaged explain``: the attention implementation and block sizes of a model on a platform, and why."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import click
import jax
from jaxpaged_model.checkpoint.loading import read_config
from jaxpaged_model.config import ModelConfig

from jaxpaged.app.cache_type import CacheType, bits_per_value, check_hadamard
from jaxpaged.app.errors import InputError
from jaxpaged.app.kv_report import readable
from jaxpaged.app.loading import model_file
from jaxpaged.app.measure_options import ExplainOptions
from jaxpaged.app.tables import markdown_table
from jaxpaged.attention.api import VARIABLE, default_platform
from jaxpaged.attention.explain import Explanation, Step, explain
from jaxpaged.attention.tpu.block_sizes import Blocks
from jaxpaged.cache.groups import parts_of
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.pages.formats import LANES

_LENGTHS = (1024, 8192, 131072)
"""Tokens of a sequence that layer groups are compared at."""


def run(options: ExplainOptions) -> None:
    """Prints a paragraph for each kind of step.

    Raises:
      InputError: no such model, or pages that are not supported.
    """
    if options.platform == "auto":
        options = dataclasses.replace(options, platform=default_platform())
    check_hadamard(options.hadamard, options.cache_type_k, options.cache_type_v)
    path = model_file(options.model, options.hf, options.offline)
    try:
        config = read_config(path)
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(str(error)) from error
    rows = list(_rows(config, options))
    pages = _cache(config, options, num_seqs=1)
    page_bytes, bits = pages.bytes_per_page, bits_per_value(pages, config)
    if options.as_json:
        kv = {
            **_cache_type(options).as_dict(),
            "page_size": options.page_size,
            "page_bytes": page_bytes,
            "staging_bytes": pages.bytes_of_staging,
            "bits_per_value": bits,
        }
        head = {"model": config.name, "platform": options.platform, "kv": kv}
        if len(config.groups) > 1:
            head["groups"] = _groups(config, options)
        click.echo(json.dumps({**head, "steps": rows}, indent=2))
        return
    group = config.num_q_heads // config.num_kv_heads
    click.echo(
        f"{config.name}: {config.num_layers} layers, {config.num_q_heads} query heads on {config.num_kv_heads} KV "
        f"heads of {config.head_dim} (groups of {group})"
    )
    kept = " and ".join(dict.fromkeys((pages.k_format.title, pages.v_format.title)))
    click.echo(
        f"pages of {options.page_size} tokens in {kept}: {_size(page_bytes)} in all layers, {bits:.4g} bits a value"
    )
    if opened := pages.bytes_of_staging:
        click.echo(f"the newest page of each sequence, until it is full: {_size(opened)} in 16 bits")
    if len(config.groups) > 1:
        click.echo(f"\nlayer groups: pages of a sequence, and bytes of all\n{_groups_table(config, options)}")
    for row in rows:
        click.echo(f"\n{row.pop('step')}")
        for name, value in row.items():
            click.echo(f"  {name.replace('_', ' '):<24}{_shown(name, value)}")


def _cache_type(options: ExplainOptions) -> CacheType:
    own = "f32" if options.platform == "cpu" else "bf16"
    return CacheType.of(options.cache_type_k or own, options.cache_type_v or own, options.hadamard)


def _rows(config: ModelConfig, options: ExplainOptions) -> Iterator[dict[str, Any]]:
    """Yields a description of a decode step for each batch size, and of a prefill step."""
    steps: list[tuple[str, int, int, int | None]] = [(f"decode, batch {b}", b, b, 1) for b in options.batch]
    steps.append((f"prompt, {options.ubatch_size} tokens a step", 1, options.ubatch_size, None))
    # Layers with the same window are computed alike.
    windows = Counter(config.window(layer) for layer in range(config.num_layers))
    for window, layers in windows.items():
        for name, seqs, tokens, max_q_len in steps:
            step = _step(config, options, seqs, tokens, max_q_len, window)
            try:
                found = explain(options.platform, step)
            except ValueError as error:
                raise InputError(str(error)) from error
            sees = "" if window is None else f", {layers} layers with a window of {window} tokens"
            yield {
                "step": f"{options.platform}: {name}, {options.context} live tokens{sees}",
                **_described(found, layers),
            }


def _step(
    config: ModelConfig,
    options: ExplainOptions,
    seqs: int,
    tokens: int,
    max_q_len: int | None,
    window: int | None,
) -> Step:
    cache = _cache(config, options, seqs)
    k_pages, v_pages = jax.eval_shape(lambda cache: cache.pages(0), cache)
    return Step(
        num_q_heads=config.num_q_heads,
        k_pages=k_pages,
        v_pages=v_pages,
        head_dim=config.head_dim,
        page_size=options.page_size,
        max_seqs=seqs,
        live_tokens=options.context,
        num_tokens=tokens,
        max_q_len=max_q_len,
        max_pages_per_seq=cache.max_pages_per_seq,
        window=window,
    )


def _cache(config: ModelConfig, options: ExplainOptions, num_seqs: int) -> PagedKVCache:
    """Abstract cache for the context of each sequence, in the layout of the platform."""
    lanes = options.platform == "tpu" and options.page_size * config.head_dim >= LANES
    entries = -(-options.context // options.page_size)
    sizes: dict[str, Any] = {
        "num_pages": num_seqs * entries,
        "max_seqs": num_seqs,
        "page_size": options.page_size,
    }
    layout = "lanes" if lanes else "plain"
    create = partial(_cache_type(options).paged, config, **sizes, max_seq_len=options.context, layout=layout)
    return jax.eval_shape(create)


def _groups(config: ModelConfig, options: ExplainOptions) -> dict[str, Any]:
    """Pages that a decoding sequence of each length holds in each layer group, and bytes of all groups
    beside those of one pool."""
    size = options.page_size
    create = partial(
        _cache_type(options).paged, config, groups=config.groups, num_pages=1, max_seqs=1, page_size=size
    )
    each = [part.bytes_per_page for part in parts_of(jax.eval_shape(create))]
    rows = [
        {
            "layers": len(group.layers),
            "window": group.window,
            "page_bytes": page_bytes,
            "pages": [group.pages_per_seq(n, size) for n in _LENGTHS],
        }
        for group, page_bytes in zip(config.groups, each, strict=True)
    ]

    def bytes_of(i: int) -> int:
        return sum(row["pages"][i] * row["page_bytes"] for row in rows)

    return {
        "tokens": list(_LENGTHS),
        "groups": rows,
        "bytes": [bytes_of(i) for i in range(len(_LENGTHS))],
        "bytes_of_one_pool": [-(-n // size) * sum(each) for n in _LENGTHS],
    }


def _groups_table(config: ModelConfig, options: ExplainOptions) -> str:
    found = _groups(config, options)
    columns: dict[str, list[str]] = {}
    names = [
        f"{row['layers']} layers that see " + ("all" if row["window"] is None else f"{row['window']} tokens")
        for row in found["groups"]
    ]
    columns["layers"] = [*names, "all groups", "one pool (--swa-full)"]
    for i, tokens in enumerate(found["tokens"]):
        pages = [f"{row['pages'][i]} pages" for row in found["groups"]]
        whole, one = found["bytes"][i], found["bytes_of_one_pool"][i]
        columns[f"{tokens:,} tokens"] = [*pages, readable(whole), f"{readable(one)}, {one / whole:.2f} x"]
    return markdown_table(columns, left=("layers",))


def _described(found: Explanation, layers: int) -> dict[str, Any]:
    refusals = found.choice.refusals
    chosen = f"{VARIABLE} names it" if os.environ.get(VARIABLE) else "the kernel of this platform"
    why = "; ".join(f"{name} {reason}" for name, reason in refusals.items()) or chosen
    details = {
        name: dataclasses.asdict(value) if isinstance(value, Blocks) else value
        for name, value in found.details.items()
        if name != "implementation"
    }
    return {
        "implementation": found.choice.name,
        "why": why,
        "kv_bytes_a_step": layers * found.kv_bytes,
        **details,
    }


def _shown(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, int) and "bytes" in name and value >= 2**20:
        return readable(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def _size(count: int) -> str:
    return readable(count) if count >= 2**20 else f"{count} bytes"
