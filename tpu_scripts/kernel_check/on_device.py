"""Runs the kernels on the TPU or GPU of this machine, and says which of their results are right.

    python -m tpu_scripts.kernel_check.on_device
    python -m tpu_scripts.kernel_check.on_device --only decode --json FILE

Needs: a TPU or a GPU, and jax for it (pip install -e ".[model,tpu]" or ".[model,cuda13]").

Attention is checked by the conformance kit, queries in float32 and in bfloat16, pages of two bytes and quantized ones,
against its oracle in numpy; products with quantized weights of every type against products with the numbers that the
codes stand for. The same cases run in CI in the kernels' interpreters; here they run compiled. Exit status: 0, all that
is not refused is right; 1, something is not; 2, there is nothing to check.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.attention import paged_attention
from jaxpaged.attention.cases import CASES, QUANTIZED_CASES, Case
from jaxpaged.testing.conformance import Built, Verdict, build_case, judge
from tpu_scripts.common import (
    Parser,
    add_json,
    check_writable,
    choose_implementations,
    note,
    on_cpu,
    write_json,
)

KERNELS = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}
FLOAT32, QUANTIZED, BFLOAT16 = 1e-4, 2.5e-3, 2e-2
"""Tolerances: float32 queries are multiplied in two terms of bfloat16; what quantized pages hold becomes float16; an
output of bfloat16 has 8 bits."""


def with_truth(built: Built) -> Built:
    """The case with what the specification makes of its rounded pages and queries, computed on the CPU in float32."""
    options = {key: value for key, value in built.options.items() if key not in ("sinks", "rope")}
    cpu = jax.devices("cpu")[0]
    arguments = jax.device_put(
        (built.q, built.k_pages, built.v_pages, built.table, built.batch, built.sinks, built.rope), cpu
    )
    q, k_pages, v_pages, table, batch, sinks, rope = arguments
    with jax.default_device(cpu):
        out, lse = paged_attention(
            q, k_pages, v_pages, table, batch, sinks=sinks, rope=rope, **options, return_lse=True,
            implementation="reference",
        )  # fmt: skip
    return dataclasses.replace(built, out=np.asarray(out, np.float64), lse=np.asarray(lse, np.float64))


def attention_cases(only: str) -> Iterator[tuple[str, Built, float]]:
    """Cases over pages of bfloat16, float16 and quantized ones, as the kernels take them."""
    for case in (*CASES, *QUANTIZED_CASES):
        if only not in case.name:
            continue
        stored: Case = dataclasses.replace(case, dtype="bf16") if case.dtype == "f32" else case
        built = build_case(stored)
        yield (
            f"{case.name}, f32 queries",
            with_truth(built),
            QUANTIZED if case in QUANTIZED_CASES else FLOAT32,
        )
        half = dataclasses.replace(built, q=built.q.astype(jnp.bfloat16))
        yield f"{case.name}, bf16 queries", with_truth(half), BFLOAT16


def judged(implementation: str, built: Built, tolerance: float) -> Verdict:
    def attention(*arguments: Any, **options: Any) -> Any:
        arrays = {"sinks": options.pop("sinks"), "rope": options.pop("rope", None)}
        run = jax.jit(
            lambda arguments, arrays: paged_attention(
                *arguments, **arrays, **options, implementation=implementation
            )
        )
        with jax.default_matmul_precision("highest"):
            return run(arguments, arrays)

    return guarded(lambda: judge(attention, built, rtol=tolerance, atol=tolerance))


def guarded(check: Callable[[], Verdict]) -> Verdict:
    """What came of a check; a kernel that does not compile, or whose program fails, is one row and not the end."""
    try:
        return check()
    except Exception as error:
        return Verdict("wrong", float("nan"), f"{type(error).__name__}: {error}".splitlines()[0][:200])


def product_verdict(name: str, tokens: int, kernel: Any, rows: int = 512, columns: int = 1024) -> Verdict:
    """One matrix of any codes, times rows of normal numbers."""
    from jaxpaged_model.quantized import lanes
    from jaxpaged_model.quantized.formats import WEIGHT_FORMATS

    fmt, rng = WEIGHT_FORMATS[name], np.random.default_rng(0)
    parts = {}
    for part, shape in lanes.part_shapes(fmt, rows, columns).items():
        if shape.dtype == jnp.float16:
            parts[part] = jnp.asarray(0.01 * rng.standard_normal(shape.shape), jnp.float16)
        else:
            limits = np.iinfo(shape.dtype)
            parts[part] = jnp.asarray(rng.integers(limits.min, limits.max + 1, shape.shape), shape.dtype)
    x = jnp.asarray(rng.standard_normal((tokens, columns)), jnp.bfloat16)
    matrix = np.asarray(lanes.dequantized(name, parts, rows, columns), np.float64)
    wanted = np.asarray(x, np.float64) @ matrix.T
    try:
        found = np.asarray(jax.jit(lambda x, parts: kernel.matmul(fmt, x, parts))(x, parts), np.float64)
    except NotImplementedError as refusal:
        return Verdict("refused", reason=str(refusal))
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    return Verdict("ok" if error < 2.0**-7 else "wrong", error)


def products(only: str, platform: str) -> Iterator[tuple[str, Callable[[], Verdict]]]:
    from jaxpaged_model.quantized.formats import WEIGHT_FORMATS

    if platform == "gpu":
        from jaxpaged_model.quantized import gpu_kernel as kernel
    else:
        from jaxpaged_model.quantized import tpu_kernel as kernel  # type: ignore[no-redef]
    for name in WEIGHT_FORMATS:
        for tokens in (1, 8, 64):
            label = f"{name} product, {tokens} rows"
            if only in label:
                yield label, lambda name=name, tokens=tokens: product_verdict(name, tokens, kernel)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--only", default="", metavar="PART", help="cases whose name contains this")
    parser.add_argument(
        "--implementation", metavar="NAMES", help="of attention (default: the platform's own kernel alone)"
    )
    add_json(parser)
    args = parser.parse_args()
    check_writable(parser, args.json)
    if on_cpu():
        note(
            "check_on_device: JAX found no TPU or GPU here; make test runs these cases in the kernels' interpreters"
        )
        return 2
    platform = jax.default_backend()
    kernel = KERNELS["gpu" if platform in ("gpu", "cuda") else "tpu"]
    rows: list[dict[str, Any]] = []

    def row(name: str, who: str, verdict: Verdict, start: float) -> None:
        seconds = time.perf_counter() - start
        rows.append({"case": name, "implementation": who, **dataclasses.asdict(verdict), "seconds": seconds})
        print(f"| {name} | {who} | {verdict} | {verdict.max_error:.2g} | {seconds:.1f} |", flush=True)

    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print("| case | implementation | found | max error | s |\n|---|---|---|---:|---:|")
    if args.implementation:
        choose_implementations(parser, args.implementation)
    for name, built, tolerance in attention_cases(args.only):
        for who in args.implementation.split(",") if args.implementation else [kernel]:
            start = time.perf_counter()
            row(name, who, judged(who, built, tolerance), start)
    for name, verdict_of in products(args.only, "gpu" if kernel == "mosaic_gpu" else "tpu"):
        start = time.perf_counter()
        row(name, "quantized product", guarded(verdict_of), start)
    write_json(args.json, {"rows": rows})
    kinds = [entry["kind"] for entry in rows]
    wrong = len(kinds) - kinds.count("ok") - kinds.count("refused")
    print(f"\n{kinds.count('ok')} right, {kinds.count('refused')} refused, {wrong} wrong")
    if not rows:
        note(f"check_on_device: no case has {args.only!r} in its name")
        return 2
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
