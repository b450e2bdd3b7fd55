"""Collectives of a compiled program, their mesh axes, and its attention kernels, parsed from optimised HLO."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

KINDS = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "send",
)
"""Instructions that send values to other devices; those that receive them are not counted again."""


@dataclass(frozen=True)
class Collective:
    """An instruction that sends values to other devices."""

    kind: str
    over: str
    """Names of the mesh axes whose devices are grouped; "" where every device is alone; "?" where no axes fit."""
    in_loop: bool
    """True if it is inside a loop."""
    payload: int
    """Bytes of its operands on each device."""


@dataclass
class _Computation:
    collectives: list[Collective] = field(default_factory=list)
    kernels: int = 0
    calls: list[tuple[str, bool]] = field(default_factory=list)
    """Called computations, with True if in a loop; one that is named twice runs twice."""


@dataclass(frozen=True)
class Contents:
    """Collectives and number of attention kernels of a program; both sides of a branch and one iteration of a loop."""

    collectives: tuple[Collective, ...]
    kernels: int


_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_CALLS = re.compile(
    r"\b(calls|body|condition|to_apply|true_computation|false_computation|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*)".*op_name="[^"]*paged_attention')


def contents_of(text: str, axes: Mapping[str, int]) -> Contents:
    """Reads a compiled program.

    Args:
      text: its optimised HLO.
      axes: names and sizes of the mesh's axes; its devices are numbered along the last one first.
    """
    computations: dict[str, _Computation] = {}
    entry, here = "", _Computation()
    sizes: dict[str, int] = {}
    for line in text.splitlines():
        if not line.startswith(" "):
            if (head := _HEAD.match(line)) and not line.startswith("HloModule"):
                here = computations[head[2]] = _Computation()
                entry, sizes = (head[2] if head[1] else entry), {}
            continue
        if (found := _INSTRUCTION.match(line)) is None:
            continue
        name, shape, operation, rest = found.groups()
        sizes[name] = bytes_of(shape)
        if operation.endswith(("-done", "-update")):  # counted at its start
            continue
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            payload = sum(sizes.get(operand, 0) for operand in _operands(rest))
            here.collectives.append(Collective(kind, axes_of(groups_of(rest), axes), False, payload))
        here.kernels += operation == "custom-call" and _KERNEL.search(rest) is not None
        for role, names in _CALLS.findall(rest):
            called = re.findall(r"[\w.\-]+", names)
            here.calls += [(one, role in ("body", "condition")) for one in called]

    @functools.cache
    def whole(name: str) -> Contents:
        own = computations[name]
        collectives, kernels = list(own.collectives), own.kernels
        for called, in_loop in own.calls:
            if called in computations:
                inner = whole(called)
                kernels += inner.kernels
                collectives += [
                    Collective(one.kind, one.over, one.in_loop or in_loop, one.payload)
                    for one in inner.collectives
                ]
        return Contents(tuple(collectives), kernels)

    return whole(entry)


def unfused(text: str) -> Iterator[tuple[str, str]]:
    """Yields shape and operation of each instruction that is not part of a fusion: those with results in memory."""
    fused = set(re.findall(r" fusion\(.*\bcalls=%?([\w.\-]+)", text))
    here = ""
    for line in text.splitlines():
        if not line.startswith(" "):
            here = head[2] if (head := _HEAD.match(line)) else ""
        elif here not in fused and (found := _INSTRUCTION.match(line)):
            yield found[2], found[3]


def _operands(rest: str) -> list[str]:
    """Names of the operands in the text behind an instruction's parenthesis."""
    depth, end = 1, 0
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    return re.findall(r"%([\w.\-]+)", rest[:end])


def bytes_of(shape: str) -> int:
    """Bytes of a shape in HLO, an array or a tuple: "(bf16[8,128]{1,0}, s32[])"."""
    total = 0
    for letters, bits, dims in _ARRAY.findall(shape):
        count = math.prod(int(dim) for dim in dims.split(",") if dim)
        total += math.ceil(count * (8 if letters == "pred" else int(bits or 0)) / 8)
    return total


def groups_of(attributes: str) -> list[list[int]] | None:
    """Groups of devices of a collective, in any notation of HLO; None for another notation.

    ``{{0,1},{2,3}}``; ``[2,2]<=[4]`` and ``[2,2]<=[2,2]T(1,0)``, rows of an iota that may be transposed;
    ``mesh['data'=2,'tensor'=2] {'tensor'}``, axes of a mesh. Pairs of a permutation are groups too. No group is ``[]``,
    which stands for all devices in one.
    """
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", attributes):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims, order = ([int(n) for n in (part or "").split(",") if n] for part in found.groups())
        numbers = np.arange(math.prod(dims)).reshape(dims)
        groups: list[list[int]] = numbers.transpose(order or range(len(dims))).reshape(shape).tolist()
        return groups
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        named = re.findall(r"'?(\w+)'?=(\d+)", found[1])
        grouped = {name.strip().strip("'") for name in found[2].split(",")}
        axes = {name: int(size) for name, size in named}
        return _along(grouped, axes) if grouped <= axes.keys() else None
    return None


def _along(names: set[str], axes: Mapping[str, int]) -> list[list[int]]:
    """Groups of devices that differ along these axes alone."""
    numbers = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
    kept = [i for i, name in enumerate(axes) if name not in names]
    grouped = [i for i, name in enumerate(axes) if name in names]
    size = math.prod(axes[name] for name in names)
    groups: list[list[int]] = numbers.transpose(kept + grouped).reshape(-1, size).tolist()
    return groups


def axes_of(groups: list[list[int]] | None, axes: Mapping[str, int]) -> str:
    """Axes of the groups of devices, joined by "+"; see ``Collective.over``."""
    if groups is None:
        return "?"
    found = {frozenset(group) for group in groups or _along(set(axes), axes)}
    if all(len(group) == 1 for group in found):
        return ""
    wide = [name for name, size in axes.items() if size > 1]
    for count in range(1, len(wide) + 1):
        for names in itertools.combinations(wide, count):
            if found == {frozenset(group) for group in _along(set(names), axes)}:
                return "+".join(names)
    return "?"
