"""Checks of ``kernel_check.other_kernels``: states of the conformance kit, and some of its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpaged.attention.cases import MODELS
from jaxpaged.testing.conformance import CASES, Built, Case, benign_fill, build_case


@dataclass(frozen=True)
class Check:
    """Row of the table: a name, and the states to test."""

    name: str
    builds: Mapping[str, Callable[[str], Built]]
    """Builders of states by label; their argument is the format of pages that the kernel prefers."""
    of_values: bool = False
    """True if the values of the arrays matter, so that compiling is not enough."""
    lse: bool = False


_SIZES: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 4, "head_dim": 128, "page_size": 16}


def _case(dtype: str, **changes: Any) -> Case:
    lengths = changes.setdefault("lengths", (64, 32, 16))
    changes.setdefault("q_lens", (1,) * len(lengths))
    return Case("check", **_SIZES | {"dtype": dtype} | changes)


def _benign(**changes: Any) -> Callable[[str], Built]:
    """Returns a builder of a benign state with ``changes``."""
    keep = changes.pop("keep", ())
    return lambda dtype: benign_fill(build_case(_case(**{"dtype": dtype} | changes)), keep=keep)


def _stale(choose: Callable[[Built, np.ndarray], int], keep: tuple[str, ...] = ()) -> Callable[[str], Built]:
    """Returns a builder whose table rows have, behind their entries, the page that ``choose`` returns."""

    def build(dtype: str) -> Built:
        built = benign_fill(build_case(_case(dtype, lengths=(75, 32, 16))), keep=keep)
        pages = np.array(built.table.pages)
        live = np.arange(pages.shape[1]) < np.asarray(built.table.num_entries)[:, None]
        stale = np.where(live, pages, choose(built, pages[live]))
        return dataclasses.replace(
            built, table=dataclasses.replace(built.table, pages=jnp.asarray(stale, jnp.int32))
        )

    return build


def _a_free_page(built: Built, live: np.ndarray) -> int:
    return int(np.setdiff1d(np.arange(built.k_pages.shape[0]), live)[0])


def _as_the_kit_has_it(case: Case, dtype: str) -> Built:
    return build_case(dataclasses.replace(case, dtype=dtype) if case.dtype == "f32" else case)


def _models() -> dict[str, Callable[[str], Built]]:
    labels: dict[tuple[int, ...], list[str]] = {}
    for name, heads in MODELS.items():
        labels.setdefault(tuple(heads.values()), []).append(name)
    return {" / ".join(names): _benign(**MODELS[names[0]], lengths=(32, 16)) for names in labels.values()}


_MIXED: dict[str, Any] = {"lengths": (40, 37, 70), "q_lens": (1, 37, 9)}

CHECKS: tuple[Check, ...] = (
    Check("decode, whole pages", {"": _benign()}),
    Check("lengths that end inside a page", {"": _benign(lengths=(61, 33, 7))}, of_values=True),
    *(Check(f"head_dim {d}", {"": _benign(head_dim=d, lengths=(61, 33))}) for d in (64, 80, 96, 128, 256)),
    Check(
        "query heads to a KV head",
        {str(g): _benign(num_q_heads=4 * g, lengths=(32, 16)) for g in range(1, 17)},
    ),
    Check(
        "KV heads",
        {
            str(kv): _benign(num_q_heads=2 * kv, num_kv_heads=kv, lengths=(32, 16))
            for kv in (1, 2, 3, 5, 8, 12)
        },
    ),
    Check("heads of", _models()),
    Check("page size", {str(n): _benign(page_size=n, lengths=(300, 33)) for n in (8, 16, 32, 64, 128, 256)}),
    Check("pages of", {name: _benign(dtype=name) for name in ("f32", "bf16", "f16")}),
    Check(
        "NaN in unused slots of a live page",
        {"": _benign(lengths=(61, 33, 7), keep=("unused_slots",))},
        of_values=True,
    ),
    Check("NaN in free pages", {"": _benign(keep=("free_pages",))}, of_values=True),
    Check("stale table row: pages of others", {"": _stale(lambda _, live: live[-1])}, of_values=True),
    Check(
        "stale table row: free pages that hold NaN",
        {"": _stale(_a_free_page, ("free_pages",))},
        of_values=True,
    ),
    Check(
        "stale table row: N, one past the last page",
        {"": _stale(lambda built, _: built.k_pages.shape[0])},
        of_values=True,
    ),
    Check(
        "a sequence of length 0 gives zeros",
        {
            label: _benign(lengths=lengths, q_lens=tuple(map(bool, lengths)), padding=lengths.count(0))
            for label, lengths in {
                "first": (0, 40, 48),
                "between": (40, 0, 48),
                "last": (40, 48, 0),
                "all": (0, 0, 0),
            }.items()
        },
        of_values=True,
    ),
    Check("pages shared by sequences", {"": _benign(lengths=(64, 48, 40), shared=True)}, of_values=True),
    Check("window", {"": _benign(lengths=(100, 33, 7), window=40)}),
    Check("soft cap", {"": _benign(soft_cap=5.0)}),
    Check("window and soft cap", {"": _benign(lengths=(100, 33, 7), window=40, soft_cap=5.0)}),
    Check("prompts alone", {"": _benign(lengths=(37, 70), q_lens=(37, 70))}),
    Check("a part of a prompt", {"": _benign(lengths=(90,), q_lens=(33,))}),
    Check("prompts beside decode", {"": _benign(**_MIXED)}),
    Check("prompts beside decode, window", {"": _benign(**_MIXED, window=20)}),
    Check(
        "a sequence without queries, padding rows",
        {"": _benign(lengths=(40, 37, 70, 0), q_lens=(1, 0, 9, 0), padding=3)},
        of_values=True,
    ),
    Check("entries that start or end inside a page", {"": _benign(lengths=(90, 40), slices=True)}),
    Check("positions without a token", {"": _benign(lengths=(90, 40), gaps=True)}),
    Check("keys rotated for other positions", {"": _benign(lengths=(90, 40), rotary_dim=128)}),
    Check("sinks", {"": _benign(sinks=True)}),
    Check("log-sum-exp", {"": _benign()}, lse=True),
    Check(
        "the kit's cases, all adversarial fills at once",
        {case.name: functools.partial(_as_the_kit_has_it, case) for case in CASES},
        of_values=True,
    ),
)
