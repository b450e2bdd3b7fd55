"""GPU kernel of products with quantized matrices, for few rows of activations on Hopper (Mosaic GPU).

A block computes ``bn`` rows of the matrix. In each step the TMA copies 64 rows of each segment of the codes,
their scales and the activations to shared memory; codes are dequantized in registers and stored as a tile
in shared memory, which a wgmma multiplies. Dequantized weights are never in global memory.

With more rows of activations than one wgmma has, each block of rows would dequantize the matrix again;
XLA dequantizes it once and is the better choice.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.attention.gpu.quantized import load
from jaxpaged_model.quantized import lanes
from jaxpaged_model.quantized.formats import WeightFormat

TOKENS = 64
"""Maximal rows of activations: those of one wgmma."""
_BK = 64
"""Columns of each run in a step."""
_SWIZZLE = 128
_CAPABILITY = "9.0"
"""Hopper, which has wgmma."""


class TileConfig(NamedTuple):
    """Static sizes of a product."""

    fmt: WeightFormat
    columns: int
    bn: int
    """Rows of the matrix in a block."""
    stages: int
    """Stages of the pipeline: one step is computed while the others are copied."""

    @property
    def length(self) -> int:
        return lanes.run_length(self.fmt, self.columns)

    @property
    def runs(self) -> int:
        return lanes.num_runs(self.fmt)

    @property
    def segments(self) -> int:
        """Number of segments of the codes, see ``lanes.places``."""
        return self.fmt.bits // min(self.fmt.planes)


def tile_config(fmt: WeightFormat, rows: int, columns: int, tokens: int) -> TileConfig:
    """Sizes of a product.

    Raises:
      NotImplementedError: the kernel does not support the product; one line with the reason.
    """
    if tokens > TOKENS:
        raise NotImplementedError(f"the GPU kernel is for at most {TOKENS} rows of activations, not {tokens}")
    if rows % 64:
        raise NotImplementedError(f"the GPU kernel needs a multiple of 64 rows, not {rows}")
    if lanes.run_length(fmt, columns) % _BK:
        raise NotImplementedError(
            f"the GPU kernel computes {_BK} columns in a step, which do not divide {columns} of {fmt.name}"
        )
    # A step has a tile of activations for every run in shared memory; formats of few bits have many runs.
    few = min(fmt.planes) >= 4
    return TileConfig(fmt, columns, 128 if few and rows % 128 == 0 else 64, 4 if few else 2)


def _block(config: TileConfig, *refs: Any, **scratch: Any) -> None:
    """The body of the kernel; arguments are references."""
    layer_ref, x, codes, *factors, out = refs
    x_ring, code_ring, tile, barrier = (scratch[name] for name in ("x", "codes", "tile", "barrier"))
    wgmma, columns_of, rows_of = (
        plgpu.Layout.WGMMA,
        plgpu.Layout.WGMMA.reduce(0),
        plgpu.Layout.WGMMA.reduce(1),
    )
    fmt, length = config.fmt, config.length
    mine = pl.ds(lax.axis_index("rows") * config.bn, config.bn)
    steps, layer = length // _BK, layer_ref[0]

    def fetch(step: Array) -> None:
        slot = lax.rem(step, config.stages)
        for i in range(config.segments):
            source = codes.at[layer, pl.ds(i * length + step * _BK, _BK), mine]
            plgpu.copy_gmem_to_smem(source, code_ring.at[slot, i], barrier.at[slot])
        for i in range(config.runs):
            first = i * length + step * _BK
            plgpu.copy_gmem_to_smem(x.at[:, pl.ds(first, _BK)], x_ring.at[slot, i], barrier.at[slot])
            for (name, (shared, _)), part in zip(fmt.factors.items(), factors, strict=True):
                count = max(_BK // shared, 1)
                source = part.at[layer, pl.ds(lax.div(first, shared), count), mine]
                plgpu.copy_gmem_to_smem(source, scratch[name].at[slot, i], barrier.at[slot])

    def factor(slot: Array, i: Array, scales: str, steps_name: str) -> Array:
        """Scale of each code of a step: f32[64, bn]."""
        row = plgpu.broadcasted_iota(jnp.int32, (_BK,), 0, layout=rows_of)
        row = lax.broadcast_in_dim(row, (_BK, config.bn), [0])

        def number(name: str, group: int) -> Array:
            one = load(scratch[name].at[slot, i, group], columns_of).astype(jnp.float32)
            return lax.broadcast_in_dim(one, (_BK, config.bn), [1])

        found: Any = None
        for group in reversed(range(_BK // fmt.group)):
            here = number(scales, 0) * number(steps_name, group) if fmt.has_steps else number(scales, group)
            found = here if found is None else jnp.where(row < (group + 1) * fmt.group, here, found)
        return found

    for step in range(min(config.stages - 1, steps)):
        fetch(jnp.int32(step))

    def advance(step: Array, sums: Array) -> Array:
        slot = lax.rem(step, config.stages)
        ahead = step + config.stages - 1
        pl.when(ahead < steps)(functools.partial(fetch, ahead))
        plgpu.barrier_wait(barrier.at[slot])

        def add_run(i: Array, sums: Array) -> Array:
            def load_segment(segment: Array) -> Array:
                return load(code_ring.at[slot, segment], wgmma).astype(jnp.int32) & 255

            numbers = (lanes.codes_of(fmt, load_segment, i) - fmt.zero).astype(jnp.float32)
            numbers = numbers * factor(slot, i, "scales", "steps")
            if fmt.has_minima:
                numbers = numbers - factor(slot, i, "minima", "min_steps")
            tile[...] = numbers.astype(tile.dtype)
            plgpu.commit_smem()

            def product(acc: Any) -> Array:
                plgpu.wgmma(acc, x_ring.at[slot, i], tile)
                return acc[...]

            return sums + pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((TOKENS, config.bn), jnp.float32))

        return lax.fori_loop(0, config.runs, add_run, sums)

    nothing = plgpu.layout_cast(jnp.zeros((TOKENS, config.bn), jnp.float32), wgmma)
    result = scratch["out"]
    result[...] = lax.fori_loop(0, steps, advance, nothing).astype(result.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result, out.at[:, mine])
    plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.jit, static_argnames=("fmt", "interpret"))
def matmul(
    fmt: WeightFormat,
    x: Array,
    parts: dict[str, Array],
    layer: Array | int | None = None,
    *,
    interpret: Any = None,
) -> Array:
    """``x @ W.T``: bf16 ``[T, rows]`` from ``x`` bf16 ``[T, columns]`` and a matrix's parts.

    With ``layer`` the parts are those of a stack of matrices; tiles are copied from that layer's.

    Raises:
      NotImplementedError: another dtype or GPU, or see ``tile_config``.
    """
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the GPU kernel multiplies bfloat16, not {x.dtype}")
    if interpret is None and jax.default_backend() == "gpu":
        capability = str(jax.devices()[0].compute_capability)
        if capability != _CAPABILITY:
            raise NotImplementedError(
                f"the GPU kernel is for compute capability {_CAPABILITY} (Hopper), not {capability}"
            )
        if fmt.table is not None:
            # Right in Pallas' interpreter, wrong by factors of 1e7 on an H100 with jax 0.11.2 (kernel_check.on_device).
            raise NotImplementedError(f"the compiled GPU kernel gives wrong values of {fmt.name}'s table")
    tokens, columns = x.shape
    if layer is None:
        layer, parts = 0, {name: part[None] for name, part in parts.items()}
    rows = parts["codes"].shape[2]
    config = tile_config(fmt, rows, columns, tokens)
    x = jnp.pad(x, ((0, TOKENS - tokens), (0, lanes.padded(fmt, columns) - columns)))
    tiled = (plgpu.TilingTransform((8, _SWIZZLE // 2)), plgpu.SwizzleTransform(_SWIZZLE))
    scratch: dict[str, Any] = {
        "x": plgpu.SMEM((config.stages, config.runs, TOKENS, _BK), x.dtype, transforms=tiled),
        "codes": plgpu.SMEM((config.stages, config.segments, _BK, config.bn), jnp.uint8),
        "tile": plgpu.SMEM((_BK, config.bn), x.dtype, transforms=tiled),
        "out": plgpu.SMEM((TOKENS, config.bn), x.dtype, transforms=tiled),
        "barrier": plgpu.Barrier(
            num_arrivals=config.segments + config.runs * (1 + len(fmt.factors)), num_barriers=config.stages
        ),
    }
    for name, (shared, _) in fmt.factors.items():
        shape = (config.stages, config.runs, max(_BK // shared, 1), config.bn)
        scratch[name] = plgpu.SMEM(shape, parts[name].dtype)
    kernel = plgpu.kernel(
        functools.partial(_block, config),
        out_type=jax.ShapeDtypeStruct((TOKENS, rows), x.dtype),
        scratch_types=scratch,
        grid=(rows // config.bn,),
        grid_names=("rows",),
        kernel_name=f"quantized_product_{fmt.name}",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    index = jnp.asarray(layer, jnp.int32).reshape(1)
    return kernel(index, x, parts["codes"], *(parts[name] for name in fmt.factors))[:tokens]
