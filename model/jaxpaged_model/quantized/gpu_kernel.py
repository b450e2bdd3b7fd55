"""The GPU kernel of products with quantized matrices, for few rows of activations on Hopper (Mosaic GPU).

A block takes ``bn`` rows of the matrix. Step by step the copy engine brings 64 rows of bytes of each segment of the
codes, their factors, and the activations that go with them; codes become numbers in registers, numbers a tile in shared
memory, and a wgmma adds its products. No number of the matrix is ever in global memory.

With more rows of activations than one tile of a wgmma has, every tile would make the same numbers again: XLA, which
makes them once, is the better choice there.
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
from jaxpaged_model.quantized.formats import SUPER_BLOCK, WeightFormat

TOKENS = 64
"""Rows of activations at most: of one wgmma."""
_PIECE = 64
"""Columns of a run that a step takes."""
_SWIZZLE = 128
_CAPABILITY = "9.0"
"""Hopper's: of wgmma."""


class Cut(NamedTuple):
    """The static sizes of a product."""

    fmt: WeightFormat
    columns: int
    bn: int
    """Rows of the matrix that a block takes."""
    stages: int
    """Steps under way, one computed and the others arriving."""

    @property
    def length(self) -> int:
        return lanes.run_length(self.fmt, self.columns)

    @property
    def runs(self) -> int:
        return lanes.num_runs(self.fmt)

    @property
    def segments(self) -> int:
        """Pieces of ``codes`` that one step of every run is made of."""
        return self.fmt.bits // min(self.fmt.planes)

    @property
    def factors(self) -> list[tuple[str, int]]:
        """Parts beside the codes, and how many columns one number of each is for."""
        shapes = lanes.part_shapes(self.fmt, 1, self.columns)
        wide = SUPER_BLOCK if self.fmt.has_steps else self.fmt.group
        return [(name, self.fmt.group if "steps" in name else wide) for name in shapes if name != "codes"]


def cut_of(fmt: WeightFormat, rows: int, columns: int, tokens: int) -> Cut:
    """How a product is cut.

    Raises:
      NotImplementedError: the kernel has no such cut; the line says why.
    """
    if tokens > TOKENS:
        raise NotImplementedError(f"the GPU kernel is for at most {TOKENS} rows of activations, not {tokens}")
    if rows % 64:
        raise NotImplementedError(f"the GPU kernel takes 64 rows of a matrix at a time, which has {rows}")
    if lanes.run_length(fmt, columns) % _PIECE:
        raise NotImplementedError(
            f"the GPU kernel takes {_PIECE} columns at a time: no {fmt.name} matrix of {columns} columns"
        )
    # Of every run a step has a tile of activations in shared memory: formats of few bits have many.
    few = min(fmt.planes) >= 4
    return Cut(fmt, columns, 128 if few and rows % 128 == 0 else 64, 4 if few else 2)


def _block(cut: Cut, *refs: Any, **scratch: Any) -> None:
    """The body of the kernel; arguments are references."""
    x, codes, *factors, out = refs
    x_ring, code_ring, tile, barrier = (scratch[name] for name in ("x", "codes", "tile", "barrier"))
    wgmma, columns_of, rows_of = (
        plgpu.Layout.WGMMA,
        plgpu.Layout.WGMMA.reduce(0),
        plgpu.Layout.WGMMA.reduce(1),
    )
    fmt, length = cut.fmt, cut.length
    mine = pl.ds(lax.axis_index("rows") * cut.bn, cut.bn)
    steps = length // _PIECE

    def fetch(step: Array) -> None:
        slot = lax.rem(step, cut.stages)
        for i in range(cut.segments):
            source = codes.at[pl.ds(i * length + step * _PIECE, _PIECE), mine]
            plgpu.copy_gmem_to_smem(source, code_ring.at[slot, i], barrier.at[slot])
        for i in range(cut.runs):
            first = i * length + step * _PIECE
            plgpu.copy_gmem_to_smem(x.at[:, pl.ds(first, _PIECE)], x_ring.at[slot, i], barrier.at[slot])
            for (name, of), part in zip(cut.factors, factors, strict=True):
                count = max(_PIECE // of, 1)
                source = part.at[pl.ds(lax.div(first, of), count), mine]
                plgpu.copy_gmem_to_smem(source, scratch[name].at[slot, i], barrier.at[slot])

    def factor(slot: Array, i: Array, scales: str, steps_name: str) -> Array:
        """f32[64, bn]: what each code of a piece is multiplied with."""
        row = plgpu.broadcasted_iota(jnp.int32, (_PIECE,), 0, layout=rows_of)
        row = lax.broadcast_in_dim(row, (_PIECE, cut.bn), [0])

        def number(name: str, group: int) -> Array:
            one = load(scratch[name].at[slot, i, group], columns_of).astype(jnp.float32)
            return lax.broadcast_in_dim(one, (_PIECE, cut.bn), [1])

        found: Any = None
        for group in reversed(range(_PIECE // fmt.group)):
            here = number(scales, 0) * number(steps_name, group) if fmt.has_steps else number(scales, group)
            found = here if found is None else jnp.where(row < (group + 1) * fmt.group, here, found)
        return found

    for step in range(min(cut.stages - 1, steps)):
        fetch(jnp.int32(step))

    def advance(step: Array, sums: Array) -> Array:
        slot = lax.rem(step, cut.stages)
        ahead = step + cut.stages - 1
        pl.when(ahead < steps)(functools.partial(fetch, ahead))
        plgpu.barrier_wait(barrier.at[slot])

        def add_run(i: Array, sums: Array) -> Array:
            def piece(segment: Array) -> Array:
                return load(code_ring.at[slot, segment], wgmma).astype(jnp.int32) & 255

            numbers = (lanes.codes_of(fmt, piece, i) - fmt.zero).astype(jnp.float32)
            numbers = numbers * factor(slot, i, "scales", "steps")
            if fmt.has_minima:
                numbers = numbers - factor(slot, i, "minima", "min_steps")
            tile[...] = numbers.astype(tile.dtype)
            plgpu.commit_smem()

            def product(acc: Any) -> Array:
                plgpu.wgmma(acc, x_ring.at[slot, i], tile)
                return acc[...]

            return sums + pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((TOKENS, cut.bn), jnp.float32))

        return lax.fori_loop(0, cut.runs, add_run, sums)

    nothing = plgpu.layout_cast(jnp.zeros((TOKENS, cut.bn), jnp.float32), wgmma)
    result = scratch["out"]
    result[...] = lax.fori_loop(0, steps, advance, nothing).astype(result.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result, out.at[:, mine])
    plgpu.wait_smem_to_gmem(0)


def matmul(fmt: WeightFormat, x: Array, parts: dict[str, Array], *, interpret: Any = None) -> Array:
    """``x @ W.T``: bf16 ``[T, rows]`` of ``x`` bf16 ``[T, columns]`` and the parts of ``lanes``.

    Raises:
      NotImplementedError: ``x`` is of another dtype, this GPU is no Hopper, or see ``cut_of``.
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
            raise NotImplementedError(
                f"the GPU kernel looks up {fmt.name}'s codes wrongly when it is compiled"
            )
    tokens, columns = x.shape
    rows = parts["codes"].shape[1]
    cut = cut_of(fmt, rows, columns, tokens)
    x = jnp.pad(x, ((0, TOKENS - tokens), (0, lanes.filled(fmt, columns) - columns)))
    tiled = (plgpu.TilingTransform((8, _SWIZZLE // 2)), plgpu.SwizzleTransform(_SWIZZLE))
    scratch: dict[str, Any] = {
        "x": plgpu.SMEM((cut.stages, cut.runs, TOKENS, _PIECE), x.dtype, transforms=tiled),
        "codes": plgpu.SMEM((cut.stages, cut.segments, _PIECE, cut.bn), jnp.uint8),
        "tile": plgpu.SMEM((_PIECE, cut.bn), x.dtype, transforms=tiled),
        "out": plgpu.SMEM((TOKENS, cut.bn), x.dtype, transforms=tiled),
        "barrier": plgpu.Barrier(
            num_arrivals=cut.segments + cut.runs * (1 + len(cut.factors)), num_barriers=cut.stages
        ),
    }
    for name, of in cut.factors:
        shape = (cut.stages, cut.runs, max(_PIECE // of, 1), cut.bn)
        scratch[name] = plgpu.SMEM(shape, parts[name].dtype)
    kernel = plgpu.kernel(
        functools.partial(_block, cut),
        out_type=jax.ShapeDtypeStruct((TOKENS, rows), x.dtype),
        scratch_types=scratch,
        grid=(rows // cut.bn,),
        grid_names=("rows",),
        kernel_name=f"quantized_product_{fmt.name}",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    return kernel(x, parts["codes"], *(parts[name] for name, _ in cut.factors))[:tokens]
