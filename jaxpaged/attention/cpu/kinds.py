"""Kinds of pages that the CPU kernel reads; known without numba."""

KINDS = (
    "f32", "bf16", "f16", "fp8_e4m3", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "q4_k", "kivi4", "kivi2",
    "kivi4_by_token", "kivi2_by_token",
)  # fmt: skip
"""Storage kinds; kernels know a kind by its index."""
