"""Measures block sizes of the attention kernel on this TPU or GPU, and writes the fastest to attention/tuning.py.

    python -m tpu_scripts.bench.tune_paged_attention --dry-run       # lists what would be measured; runs anywhere
    python -m tpu_scripts.bench.tune_paged_attention -m Llama-3-8B

Needs: a TPU (pip install -e ".[tpu]") or a Hopper GPU (".[cuda13]"). On a CPU there is nothing to tune.

For the heads of every model, every page size, decode and prefill, each candidate is compiled and measured as
bench.paged_attention does it, in turns with the kernel's own choice. The fastest is written where it beats that choice
by 3% or more; elsewhere the kernel goes on choosing. A candidate that does not compile, or does not fit, is skipped.
Entries of other devices stay in the file.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpaged.attention import tuning
from jaxpaged.attention.api import PREFERENCES, default_platform
from jaxpaged.attention.cases import MODELS
from jaxpaged.attention.tuning import Key, current_device_kind, trial
from jaxpaged.pages.formats import LANES, PAGE_FORMATS
from tpu_scripts import common
from tpu_scripts.bench.memory import free_memory
from tpu_scripts.bench.models import noise
from tpu_scripts.bench.paged_attention import Attention, Shape
from tpu_scripts.common import Parser, each, known, mebibytes, note, page_size, positive

LEAST_GAIN = 1.03
"""Speed-up from which a candidate is written; less is noise."""
LAYERS = 2
Sizes = dict[str, int]


def candidates(platform: str, key: Key) -> list[Sizes]:
    """Block sizes to measure for a kernel, under the kernel's names."""
    if platform == "tpu":
        # Whole rows of 128 lanes; a tile of scores has 64 to 512 rows in prefill.
        packed = LANES // key.head_dim if LANES % key.head_dim == 0 else 1
        tokens = (128, 256, 512, 1024, 2048) if key.kind == "decode" else (256, 512, 1024)
        pages = [n // key.page_size for n in tokens if n >= key.page_size and n // packed % LANES == 0]
        queries = [1]
        if key.kind == "prefill":
            queries = [n for n in (4, 8, 16, 32, 64, 128, 256) if 64 <= n * key.group * packed <= 512]
        return [{"pages": p, "queries": n} for p, n in itertools.product(pages, queries)]
    stages = (2, 3, 4, 6)
    if key.kind == "prefill":
        return [{"stages": count} for count in stages]
    return [{"stages": count, "waves": waves} for count, waves in itertools.product(stages, (1, 2, 3, 4))]


def shapes(args: Any, device_kind: str) -> dict[Key, Shape]:
    """Shapes to measure; models with the same heads are one."""
    found: dict[Key, Shape] = {}
    for model, size, kind in itertools.product(args.model, args.page_size, ("decode", "prefill")):
        batch, queries = (args.batch, 1) if kind == "decode" else (1, args.chunk)
        shape = Shape(model, batch, args.context, queries, size, args.dtype)
        num_q_heads, num_kv_heads, head_dim = shape.heads
        dtype = np.dtype(PAGE_FORMATS[args.dtype].dtype).name
        key = Key(device_kind, num_kv_heads, num_q_heads // num_kv_heads, head_dim, size, dtype, kind)
        found.setdefault(key, shape)
    return found


def measure(platform: str, key: Key, shape: Shape, args: Any, free: int) -> Iterator[dict[str, Any]]:
    """Yields the candidates of a key with their times, fastest first; ``{}`` is the kernel's own choice."""
    (implementation,) = PREFERENCES[platform]
    layers = min(LAYERS, free // shape.layer_bytes())
    if not layers:
        note(f"left out: {shape.model}, {key.kind}: {mebibytes(shape.layer_bytes())} MiB of pages do not fit")
        return
    programs: dict[str, Attention] = {}
    for sizes in ({}, *candidates(platform, key)):
        # Programs traced with other sizes must not be reused.
        jax.clear_caches()
        with trial(sizes or None) as running:
            try:
                programs[json.dumps(sizes)] = Attention(shape, implementation, layers)
            except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
                said = str(error).splitlines()[0][:200]
                if sizes:
                    note(f"skipped: {sizes}: {said}")
                    continue
                note(f"left out: {shape.model}, {key.kind}, pages of {key.page_size}: {said}")
                return
        if not running.asked:
            raise SystemExit(f"{implementation} does not ask jaxpaged.attention.tuning for its block sizes")
    some = next(iter(programs.values()))
    pool = shape.pool()
    k_pools, v_pools = (tuple(noise(pool) for _ in range(layers)) for _ in range(2))
    arguments = (noise(some.q), k_pools, v_pools, some.table, some.batch)
    runs = {name: program.prepare(arguments, args.milliseconds / 1000) for name, program in programs.items()}
    taken = common.in_turns(runs, args.repeat)
    own = taken["{}"]
    for name, seconds in sorted(taken.items(), key=lambda item: statistics.median(item[1])):
        yield {"sizes": json.loads(name), "seconds": seconds, "gain": common.median_ratio(own, seconds)}


# --- the file -----------------------------------------------------------------------------------------------


def render(measured: Mapping[str, tuple[str, str]], table: Mapping[Key, Mapping[str, int]]) -> str:
    """Text between the marks, formatted as by ruff."""
    text = "MEASURED: dict[str, tuple[str, str]] = {"
    for device, (when, command) in sorted(measured.items()):
        text += f"\n    {json.dumps(device)}: (\n        {json.dumps(when)},\n        {json.dumps(command)},\n    ),"
    text += "\n}" if measured else "}"
    text += '\n"""Date, version of jax, and command, by device."""\n\n'
    text += "TABLE: dict[Key, dict[str, int]] = {"
    for key, sizes in sorted(table.items()):
        arguments = ", ".join(json.dumps(value) for value in key)
        text += f"\n    Key({arguments}): {json.dumps(dict(sizes))},"
    text += "\n}" if table else "}"
    text += '\n"""Sizes that were faster than the kernel\'s own choice, under the kernel\'s names."""\n'
    return text


def rewrite(
    source: str, measured: Mapping[str, tuple[str, str]], table: Mapping[Key, Mapping[str, int]]
) -> str:
    """Replaces the table in ``source``, the text of tuning.py.

    Raises:
      ValueError: the marks are not there.
    """
    marks = re.compile(r"(?s)(\n# --- written by [^\n]*\n\n).*?(\n# --- end of what is written[^\n]*\n)")
    if len(marks.findall(source)) != 1:
        raise ValueError("has no marks between which the table is written")
    return marks.sub(lambda found: found[1] + render(measured, table) + found[2], source)


def merged(
    results: Mapping[Key, Sequence[Mapping[str, Any]]], today: str
) -> tuple[dict[str, tuple[str, str]], dict[Key, Sizes]]:
    """Merges new results into the table; an entry that is no gain any more is removed."""
    measured, table = dict(tuning.MEASURED), dict(tuning.TABLE)
    for key, rows in results.items():
        measured[key.device_kind] = (
            f"{today}, jax {jax.__version__}",
            " ".join([common.program(), *sys.argv[1:]]),
        )
        table.pop(key, None)
        if rows and rows[0]["gain"] >= LEAST_GAIN:
            table[key] = rows[0]["sizes"]
    return measured, table


def list_candidates(platforms: Sequence[str], args: Any) -> None:
    """Prints a table of all candidates."""
    heads = ("platform", "kind", "KV heads", "group", "head_dim", "page size", "dtype", "candidates")
    print(common.head(*heads, left=("platform", "kind", "dtype", "candidates")))
    for platform in platforms:
        for key in shapes(args, platform):
            sizes = candidates(platform, key)
            names = {name: sorted({size[name] for size in sizes}) for name in sizes[0]}
            listed = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in names.items())
            numbers = (key.num_kv_heads, key.group, key.head_dim, key.page_size)
            print(common.row(platform, key.kind, *numbers, key.dtype, f"{len(sizes)}: {listed}"))


def main() -> None:
    output = Path(tuning.__file__)
    parser = Parser(__doc__, repeat=7, json=None)
    parser.add("-m --model", "models whose heads to tune", each(known("model", MODELS)), list(MODELS))
    parser.add("--page-size", "tokens per page", each(page_size), [16, 32, 64])
    parser.add("-b --batch", "sequences of a decode step", positive, 8)
    parser.add("-c --context", "tokens per sequence", positive, 8192)
    parser.add("--chunk", "prompt tokens of a prefill step", positive, 512)
    parser.add("--dtype", "of pages and queries", default="bf16", choices=PAGE_FORMATS)
    parser.add("--milliseconds", "minimum duration of a measurement", positive, 50)
    parser.flag("--dry-run", "list the candidates, measure nothing")
    parser.add("-o --output", "file to write the table into", Path, output)
    args = parser.parse()
    if args.chunk > args.context:
        parser.error(f"a chunk of {args.chunk} tokens is longer than the context of {args.context}")
    platform = {"cuda": "gpu"}.get(default_platform(), default_platform())
    if args.dry_run:
        list_candidates(["tpu", "gpu"] if platform == "cpu" else [platform], args)
        return
    if platform not in ("tpu", "gpu"):
        print(
            f"nothing to tune on {platform}: the CPU kernel's block sizes are constants, and bench.paged_attention "
            "compares it with xla; --dry-run lists the candidates for TPU and GPU"
        )
        return
    results: dict[Key, list[dict[str, Any]]] = {}
    heads = ("kind", "KV heads", "group", "head_dim", "page size", "own choice us", "fastest", "us", "gain")
    print(common.head(*heads, left=("kind", "fastest")), flush=True)
    for key, shape in shapes(args, current_device_kind()).items():
        rows = list(measure(platform, key, shape, args, free_memory()))
        if not rows:
            continue
        results[key] = rows
        best, own = rows[0], next(row for row in rows if not row["sizes"])
        sizes = " ".join(f"{name}={value}" for name, value in best["sizes"].items()) or "own choice"
        own_us, best_us = (f"{1e6 * statistics.median(row['seconds']):,.1f}" for row in (own, best))
        numbers = (key.num_kv_heads, key.group, key.head_dim, key.page_size)
        print(common.row(key.kind, *numbers, own_us, sizes, best_us, f"{best['gain']:.2f}"), flush=True)
    if not results:
        raise SystemExit("nothing was measured")
    rows = [key._asdict() | row for key, found in results.items() for row in found]
    common.write_json(args.json, {"rows": rows})
    measured, table = merged(results, datetime.date.today().isoformat())
    source = output.read_text(encoding="utf-8")
    args.output.write_text(rewrite(source, measured, table), encoding="utf-8")
    note(f"{len(table)} entries in {args.output}")


if __name__ == "__main__":
    main()
