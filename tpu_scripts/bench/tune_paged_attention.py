"""Measures block sizes of the attention kernel on the TPU or GPU at hand, and writes them to attention/tuning.py.

    python -m tpu_scripts.bench.tune_paged_attention --dry-run       # lists what would be measured; runs anywhere
    python -m tpu_scripts.bench.tune_paged_attention -m Llama-3-8B

Needs: a TPU (pip install -e ".[tpu]") or a Hopper GPU (".[cuda13]"). On a CPU there is nothing to tune.

For the heads of every model, every page size, decode and prefill, each candidate is compiled and measured as
bench_paged_attention does it, in turns with the kernel's own choice. The fastest is written where it beats that choice
by 3% or more; elsewhere the kernel goes on choosing. A candidate that does not compile, or does not fit, is passed
over. Entries of other devices stay in the file.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpaged.attention import tuning
from jaxpaged.attention.api import PREFERENCES, default_platform
from jaxpaged.attention.cases import MODELS
from jaxpaged.attention.tuning import Key, current_device_kind, trial
from jaxpaged.pages.formats import LANES, MAX_PAGE_SIZE, MIN_PAGE_SIZE, PAGE_FORMATS
from tpu_scripts.bench.paged_attention import Attention, Shape, line
from tpu_scripts.common import (
    Parser,
    add_json,
    check_writable,
    choose_models,
    command_line,
    free_memory,
    in_turns,
    mebibytes,
    median_ratio,
    noise,
    note,
    positive,
    positives,
    write_json,
)

LEAST_GAIN = 1.03
"""What a candidate has to be faster by: less is noise, and an entry that is not needed is one to keep up."""
LAYERS = 2
Sizes = dict[str, int]


def candidates(platform: str, key: Key) -> list[Sizes]:
    """The block sizes to measure for a kernel, under the names that it has for them."""
    if platform == "tpu":
        # Whole rows of 128 numbers; a tile of scores has 64 to 512 rows where prompts are read.
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
    """What to measure, once for models that have the same heads."""
    found: dict[Key, Shape] = {}
    for model, page_size, kind in itertools.product(args.model, args.page_size, ("decode", "prefill")):
        shape = (
            Shape(model, args.batch, args.context, 1, page_size, args.dtype)
            if kind == "decode"
            else Shape(model, 1, args.context, args.chunk, page_size, args.dtype)
        )
        num_q_heads, num_kv_heads, head_dim = shape.heads
        dtype = np.dtype(PAGE_FORMATS[args.dtype].dtype).name
        key = Key(device_kind, num_kv_heads, num_q_heads // num_kv_heads, head_dim, page_size, dtype, kind)
        found.setdefault(key, shape)
    return found


def measure(platform: str, key: Key, shape: Shape, args: Any, room: int) -> Iterator[dict[str, Any]]:
    """The candidates of a key with their times, fastest first; the kernel's own choice is ``{}``."""
    (implementation,) = PREFERENCES[platform]
    layers = min(LAYERS, room // shape.layer_bytes())
    if not layers:
        note(f"left out: {shape.model}, {key.kind}: {mebibytes(shape.layer_bytes())} MiB of pages do not fit")
        return
    programs: dict[str, Attention] = {}
    for sizes in ({}, *candidates(platform, key)):
        # Programs that were traced with other sizes must not be found again.
        jax.clear_caches()
        with trial(sizes or None) as running:
            try:
                programs[json.dumps(sizes)] = Attention(shape, implementation, layers)
            except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
                said = str(error).splitlines()[0][:200]
                if sizes:
                    note(f"passed over: {sizes}: {said}")
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
    taken = in_turns(runs, args.repeat)
    own = taken["{}"]
    for name, seconds in sorted(taken.items(), key=lambda item: statistics.median(item[1])):
        yield {"sizes": json.loads(name), "seconds": seconds, "gain": median_ratio(own, seconds)}


# --- the file -----------------------------------------------------------------------------------------------


def render(measured: Mapping[str, tuple[str, str]], table: Mapping[Key, Mapping[str, int]]) -> str:
    """The part between the marks, as ``ruff format`` leaves it."""
    text = "MEASURED: dict[str, tuple[str, str]] = {"
    for device, (when, command) in sorted(measured.items()):
        text += f"\n    {json.dumps(device)}: (\n        {json.dumps(when)},\n        {json.dumps(command)},\n    ),"
    text += "\n}" if measured else "}"
    text += '\n"""By device: the date and the version of jax, and the command."""\n\n'
    text += "TABLE: dict[Key, dict[str, int]] = {"
    for key, sizes in sorted(table.items()):
        arguments = ", ".join(json.dumps(value) for value in key)
        text += f"\n    Key({arguments}): {json.dumps(dict(sizes))},"
    text += "\n}" if table else "}"
    text += '\n"""The sizes that were faster than the kernel\'s own choice, under the kernel\'s names."""\n'
    return text


def rewrite(
    source: str, measured: Mapping[str, tuple[str, str]], table: Mapping[Key, Mapping[str, int]]
) -> str:
    """``source``, the text of tuning.py, with another table.

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
    """The table with what was just measured: an entry that is no gain any more goes."""
    measured, table = dict(tuning.MEASURED), dict(tuning.TABLE)
    for key, rows in results.items():
        measured[key.device_kind] = (f"{today}, jax {jax.__version__}", command_line())
        table.pop(key, None)
        if rows and rows[0]["gain"] >= LEAST_GAIN:
            table[key] = rows[0]["sizes"]
    return measured, table


def list_candidates(platforms: Sequence[str], args: Any) -> None:
    """What would be measured: every size with every other."""
    print("| platform | kind | KV heads | group | head_dim | page size | dtype | candidates |")
    print("|---|---|---:|---:|---:|---:|---|---|")
    for platform in platforms:
        for key in shapes(args, platform):
            sizes = candidates(platform, key)
            names = {name: sorted({each[name] for each in sizes}) for name in sizes[0]}
            listed = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in names.items())
            numbers = (key.num_kv_heads, key.group, key.head_dim, key.page_size)
            print(line([platform, key.kind, *map(str, numbers), key.dtype, f"{len(sizes)}: {listed}"]))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "-m", "--model", default=list(MODELS), metavar="NAMES", type=lambda text: text.split(","),
        help=f"heads of these models (default: all, {', '.join(MODELS)})",
    )  # fmt: skip
    parser.add_argument("--page-size", type=positives, default=[16, 32, 64], help="(default: 16,32,64)")
    parser.add_argument("-b", "--batch", type=positive, default=8, help="sequences that decode (default: 8)")
    parser.add_argument("-c", "--context", type=positive, default=8192, help="tokens of each (default: 8192)")
    parser.add_argument(
        "--chunk", type=positive, default=512, help="tokens of a prompt in a step of prefill (default: 512)"
    )
    parser.add_argument("--dtype", choices=PAGE_FORMATS, default="bf16", help="(default: bf16)")
    parser.add_argument("-r", "--repeat", type=positive, default=7, help="turns (default: 7)")
    parser.add_argument(
        "--milliseconds", type=positive, default=50, help="the least that one measurement lasts (default: 50)"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the candidates, measure nothing")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(tuning.__file__), metavar="FILE",
        help="the file to write the table into (default: the jaxpaged/attention/tuning.py that is in use)",
    )  # fmt: skip
    add_json(parser)
    args = parser.parse_args()
    choose_models(parser, args.model, MODELS)
    for size in args.page_size:
        if not MIN_PAGE_SIZE <= size <= MAX_PAGE_SIZE or size & (size - 1):
            parser.error(f"page size {size} is no power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}")
    if args.chunk > args.context:
        parser.error(f"a chunk of {args.chunk} tokens is longer than the context of {args.context}")
    check_writable(parser, args.json, args.output)
    platform = {"cuda": "gpu"}.get(default_platform(), default_platform())
    if args.dry_run:
        list_candidates(["tpu", "gpu"] if platform == "cpu" else [platform], args)
        return
    if platform not in ("tpu", "gpu"):
        print(
            f"nothing to tune on {platform}: the CPU kernel's block sizes are constants of cpu_numba.py, and "
            "bench_paged_attention compares it with xla; --dry-run lists the candidates for TPU and GPU"
        )
        return
    results: dict[Key, list[dict[str, Any]]] = {}
    print("| kind | KV heads | group | head_dim | page size | own choice us | fastest | us | gain |")
    print("|---|---:|---:|---:|---:|---:|---|---:|---:|", flush=True)
    for key, shape in shapes(args, current_device_kind()).items():
        rows = list(measure(platform, key, shape, args, free_memory()))
        if not rows:
            continue
        results[key] = rows
        own = next(row for row in rows if not row["sizes"])
        best = rows[0]
        cells = [key.kind, *map(str, (key.num_kv_heads, key.group, key.head_dim, key.page_size))]
        cells += [f"{1e6 * statistics.median(own['seconds']):,.1f}"]
        cells += [" ".join(f"{k}={v}" for k, v in best["sizes"].items()) or "own choice"]
        cells += [f"{1e6 * statistics.median(best['seconds']):,.1f}", f"{best['gain']:.2f}"]
        print(line(cells), flush=True)
    if not results:
        raise SystemExit("nothing was measured")
    write_json(args.json, {"rows": [key._asdict() | row for key, rows in results.items() for row in rows]})
    measured, table = merged(results, datetime.date.today().isoformat())
    source = Path(tuning.__file__).read_text(encoding="utf-8")
    args.output.write_text(rewrite(source, measured, table), encoding="utf-8")
    note(f"{len(table)} entries in {args.output}")


if __name__ == "__main__":
    main()
