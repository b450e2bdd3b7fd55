"""Runs the kernels on the TPU or GPU of this machine, and checks their results.

    python -m tpu_scripts.kernel_check.on_device
    python -m tpu_scripts.kernel_check.on_device --only decode --json FILE

Needs: a TPU or a GPU, and jax for it (pip install -e ".[model,tpu]" or ".[model,cuda13]").

Attention is checked by the conformance kit, queries in float32 and in bfloat16, pages of two bytes and quantized ones,
against its oracle in numpy; products with quantized weights of every type against products with the dequantized
weights. The same cases run in CI in the kernels' interpreters; here they run compiled. Exit status: 0, all that
is not refused is right; 1, something is not; 2, there is nothing to check.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.attention import paged_attention
from jaxpaged.attention.cases import CASES, QUANTIZED_CASES, Case
from jaxpaged.testing.conformance import Built, Verdict, build_case, judge
from tpu_scripts import common
from tpu_scripts.common import Parser, note, on_cpu

KERNELS = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}
FLOAT32, QUANTIZED, BFLOAT16 = 1e-4, 2.5e-3, 2e-2
"""Tolerances: float32 queries are multiplied as two terms of bfloat16; quantized pages are dequantized to float16; an
output of bfloat16 has 8 bits."""


def with_truth(built: Built) -> Built:
    """Replaces the expected output by the reference's for the rounded pages and queries, on the CPU in float32."""
    options = {key: value for key, value in built.options.items() if key not in ("sinks", "rope")}
    options |= {"return_lse": True, "implementation": "reference"}
    cpu = jax.devices("cpu")[0]
    arrays = (built.q, built.k_pages, built.v_pages, built.table, built.batch, built.sinks, built.rope)
    *arrays, sinks, rope = jax.device_put(arrays, cpu)
    with jax.default_device(cpu):
        out, lse = paged_attention(*arrays, sinks=sinks, rope=rope, **options)
    return dataclasses.replace(built, out=np.asarray(out, np.float64), lse=np.asarray(lse, np.float64))


def attention_cases(only: str) -> Iterator[tuple[str, Built, float]]:
    """Yields name, case and tolerance, over pages of bfloat16, float16 and quantized ones."""
    for case in (*CASES, *QUANTIZED_CASES):
        if only not in case.name:
            continue
        stored: Case = dataclasses.replace(case, dtype="bf16") if case.dtype == "f32" else case
        built = build_case(stored)
        tolerance = QUANTIZED if case in QUANTIZED_CASES else FLOAT32
        yield f"{case.name}, f32 queries", with_truth(built), tolerance
        half = dataclasses.replace(built, q=built.q.astype(jnp.bfloat16))
        yield f"{case.name}, bf16 queries", with_truth(half), BFLOAT16


def judged(implementation: str, built: Built, tolerance: float) -> Verdict:
    """Verdict of the conformance kit on one case."""

    def attention(*arguments: Any, **options: Any) -> Any:
        arrays = {"sinks": options.pop("sinks"), "rope": options.pop("rope", None)}
        run = jax.jit(
            lambda arguments, arrays: paged_attention(
                *arguments, **arrays, **options, implementation=implementation
            )
        )
        with jax.default_matmul_precision("highest"):
            return run(arguments, arrays)

    return judge(attention, built, rtol=tolerance, atol=tolerance)


def guarded(check: Callable[[], Verdict]) -> Verdict:
    """Verdict of a check; a kernel that does not compile, or fails, is one row and not the end."""
    try:
        return check()
    except Exception as error:
        return Verdict("wrong", float("nan"), f"{type(error).__name__}: {error}".splitlines()[0][:200])


def product_verdict(name: str, tokens: int, kernel: Any, rows: int = 512, columns: int = 1024) -> Verdict:
    """Verdict of a matrix of random codes times normal random rows."""
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
    """Yields the checks of products with quantized weights."""
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
    parser = Parser(__doc__, implementation=None, json=None)
    parser.add("--only", "cases whose name contains this", default="")
    args = parser.parse()
    if on_cpu():
        note("JAX found no TPU or GPU here; make test runs these cases in the kernels' interpreters")
        return 2
    platform = "tpu" if jax.default_backend() == "tpu" else "gpu"
    names = [KERNELS[platform]]
    if args.implementation:
        names = common.choose_implementations(parser, args.implementation)
    rows: list[dict[str, Any]] = []

    def check(name: str, who: str, verdict_of: Callable[[], Verdict]) -> None:
        start = time.perf_counter()
        verdict = guarded(verdict_of)
        seconds = time.perf_counter() - start
        rows.append({"case": name, "implementation": who, **dataclasses.asdict(verdict), "seconds": seconds})
        cells = (name, who, verdict, f"{verdict.max_error:.2g}", f"{seconds:.1f}")
        print(common.row(*cells), flush=True)

    heads = ("case", "implementation", "found", "max error", "s")
    print(f"{common.device()}\n\n{common.head(*heads, left=heads[:3])}", flush=True)
    for name, built, tolerance in attention_cases(args.only):
        for who in names:
            check(name, who, partial(judged, who, built, tolerance))
    for name, verdict_of in products(args.only, platform):
        check(name, "quantized product", verdict_of)
    common.write_json(args.json, {"rows": rows})
    kinds = [entry["kind"] for entry in rows]
    wrong = len(kinds) - kinds.count("ok") - kinds.count("refused")
    print(f"\n{kinds.count('ok')} right, {kinds.count('refused')} refused, {wrong} wrong")
    if not rows:
        note(f"no case has {args.only!r} in its name")
        return 2
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
