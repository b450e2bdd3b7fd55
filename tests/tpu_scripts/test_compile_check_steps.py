"""Copies that compile_check.steps finds in lines of compiled programs; no compiler is needed."""

from __future__ import annotations

import pytest

from tpu_scripts.compile_check.steps import LAYERS, copies


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("  %copy.61 = bf16[1,4096,4096]{1,2,0:T(8,128)(2,1)S(1)} copy(%slice.12)", True),
        ("  ROOT %turned = bf16[4096,1024]{0,1} transpose(%w), dimensions={1,0}", True),
        (f"  %bits = s16[{LAYERS},448,4096]{{2,1,0}} bitcast-convert(%scales)", True),
        ("  %bits = s16[1,448,28672]{2,1,0} bitcast-convert(%own)", False),  # of one layer
        ("  %copy.2 = bf16[512,14336]{0,1} copy(%gate)", False),  # activations
        ("  %copy.3 = s32[8,256]{1,0} copy(%table)", False),
        ("  %ahead = (bf16[4096,4096]{1,0:S(1)}, u32[]) copy-start(%w)", False),  # read ahead of its use
    ],
)
def test_copies_of_matrices_count(line: str, counts: bool) -> None:
    text = f"%body.1 (x: s32[]) -> s32[] {{\n{line}\n}}\n"
    assert bool(copies(text, smallest=1 << 20, tokens=512)) == counts
    inside = (
        f"{text}ENTRY %main (x: s32[]) -> s32[] {{\n  %y = s32[] fusion(%x), kind=kLoop, calls=%body.1\n}}\n"
    )
    assert not copies(inside, smallest=1 << 20, tokens=512)
