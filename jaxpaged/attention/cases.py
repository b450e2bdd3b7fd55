"""Named cases of attention, shared by tests, benchmarks and tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """Sizes, sequences and masks of one attention."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    """Number of tokens of each sequence, those of the step included; 0 = no sequence."""
    q_lens: tuple[int, ...]
    """Number of queries of each sequence: its last tokens."""
    v_head_dim: int | None = None
    """Numbers of a head of values; None = ``head_dim``."""
    page_size: int = 32
    padding: int = 0
    """Number of rows after the last query."""
    dtype: str = "f32"
    """Page format, a name of ``PAGE_FORMATS``."""
    v_dtype: str | None = None
    """Page format of values; default ``dtype``."""
    hadamard: bool = False
    """True if quantized rows are Hadamard-transformed."""
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    scale: float | None = None
    slices: bool = False
    """Entries that begin and end inside their pages, as removals leave them."""
    gaps: bool = False
    """Positions that no entry covers."""
    shared: bool = False
    """Sequences begin with the pages of the first one."""
    ahead: bool = False
    """Rows that see keys behind them: a random ``Batch.visible_end`` each, of which some change nothing."""
    rotary_dim: int = 0
    """Number of rotated dimensions; entries are then shifted, each by its own number of positions.
    0 = no RoPE."""
    interleaved: bool = False
    """True if the RoPE pairs neighbouring dimensions."""


SMOLLM2_135M: dict[str, Any] = {"num_q_heads": 9, "num_kv_heads": 3, "head_dim": 64}
LLAMA_3_8B: dict[str, Any] = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
QWEN3_0_6B: dict[str, Any] = {"num_q_heads": 16, "num_kv_heads": 8, "head_dim": 128}
MISTRAL_7B: dict[str, Any] = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
GEMMA_2_2B: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 4, "head_dim": 256}
GPT_OSS_20B: dict[str, Any] = {"num_q_heads": 64, "num_kv_heads": 8, "head_dim": 64}
PHI_3_MINI: dict[str, Any] = {"num_q_heads": 32, "num_kv_heads": 32, "head_dim": 96}
STABLELM_3B: dict[str, Any] = {"num_q_heads": 32, "num_kv_heads": 32, "head_dim": 80}

LLAMA_3_70B_TP8: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 1, "head_dim": 128}
"""Heads of one of eight devices."""
QWEN3_8B: dict[str, Any] = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
GEMMA_2_9B: dict[str, Any] = {"num_q_heads": 16, "num_kv_heads": 8, "head_dim": 256}
GEMMA_3_1B: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 1, "head_dim": 256}
GEMMA_3_4B: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 4, "head_dim": 256}
GEMMA_3_12B: dict[str, Any] = {"num_q_heads": 16, "num_kv_heads": 8, "head_dim": 256}
GEMMA_3_27B: dict[str, Any] = {"num_q_heads": 32, "num_kv_heads": 16, "head_dim": 128}
PHI_4_MINI: dict[str, Any] = {"num_q_heads": 24, "num_kv_heads": 8, "head_dim": 128}

MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": SMOLLM2_135M,
    "Llama-3-8B": LLAMA_3_8B,
    "Llama-3-70B/8": LLAMA_3_70B_TP8,
    "Qwen3-0.6B": QWEN3_0_6B,
    "Qwen3-8B": QWEN3_8B,
    "Mistral-7B": MISTRAL_7B,
    "Gemma-2-2B": GEMMA_2_2B,
    "Gemma-2-9B": GEMMA_2_9B,
    "Gemma-3-1B": GEMMA_3_1B,
    "Gemma-3-4B": GEMMA_3_4B,
    "Gemma-3-12B": GEMMA_3_12B,
    "Gemma-3-27B": GEMMA_3_27B,
    "Phi-4-mini": PHI_4_MINI,
}
"""Heads of real models, for benchmarks and ahead-of-time compilation."""

CASES: tuple[Case, ...] = (
    # Decode: one query a sequence.
    Case("smollm2_decode", **SMOLLM2_135M, lengths=(128, 1, 700, 33), q_lens=(1, 1, 1, 1)),
    Case(
        "smollm2_decode_idle",
        **SMOLLM2_135M,
        lengths=(40, 0, 300, 64, 0),
        q_lens=(1, 0, 0, 1, 0),
        padding=3,
    ),
    Case("llama3_decode_bf16", **LLAMA_3_8B, lengths=(70, 19), q_lens=(1, 1), dtype="bf16"),
    Case("mistral_window", **MISTRAL_7B, lengths=(600, 90), q_lens=(1, 1), window=128),
    Case("gpt_oss_sinks", **GPT_OSS_20B, lengths=(200, 5), q_lens=(1, 1), window=128, sinks=True),
    # Prefill and mixtures.
    Case("smollm2_prefill", **SMOLLM2_135M, lengths=(150, 40), q_lens=(150, 40), padding=2),
    Case("smollm2_chunk", **SMOLLM2_135M, lengths=(400,), q_lens=(130,)),
    Case("smollm2_mixed", **SMOLLM2_135M, lengths=(90, 301, 0, 64, 7), q_lens=(1, 37, 0, 1, 7), padding=5),
    Case("qwen3_mixed_f16", **QWEN3_0_6B, lengths=(50, 80, 33), q_lens=(1, 20, 2), dtype="f16"),
    Case("mistral_window_chunk", **MISTRAL_7B, lengths=(200, 60), q_lens=(45, 1), window=50, page_size=16),
    Case(
        "gemma2_soft_cap",
        **GEMMA_2_2B,
        lengths=(40, 70),
        q_lens=(11, 1),
        soft_cap=50.0,
        window=64,
        scale=0.125,
    ),
    Case("phi3_head_dim_96", **PHI_3_MINI, lengths=(35, 9), q_lens=(3, 1)),
    Case("stablelm_head_dim_80", **STABLELM_3B, lengths=(20, 66), q_lens=(1, 5), page_size=64),
    # State as removals, forks and shifts leave it.
    Case("slices", **SMOLLM2_135M, lengths=(150, 77, 31), q_lens=(1, 5, 1), slices=True),
    Case(
        "slices_gaps_window",
        **SMOLLM2_135M,
        lengths=(170, 64),
        q_lens=(1, 9),
        slices=True,
        gaps=True,
        window=40,
    ),
    Case("shared", **SMOLLM2_135M, lengths=(130, 130, 97, 0), q_lens=(1, 4, 1, 0), shared=True),
    Case(
        "shifted",
        **SMOLLM2_135M,
        lengths=(150, 700, 0, 40),
        q_lens=(1, 37, 0, 1),
        slices=True,
        gaps=True,
        rotary_dim=64,
    ),
    Case("shifted_decode", **SMOLLM2_135M, lengths=(300, 33), q_lens=(1, 1), rotary_dim=64),
    Case(
        "shifted_window",
        **MISTRAL_7B,
        lengths=(200, 60),
        q_lens=(9, 1),
        window=50,
        page_size=16,
        slices=True,
        rotary_dim=128,
    ),
    Case(
        "shifted_part_of_a_head",
        **STABLELM_3B,
        lengths=(66, 90),
        q_lens=(5, 1),
        rotary_dim=20,
        interleaved=True,
        shared=True,
    ),
    # Rows that see behind them.
    Case(
        "ahead",
        **SMOLLM2_135M,
        lengths=(150, 90, 0, 33, 40),
        q_lens=(150, 37, 0, 1, 2),
        padding=3,
        ahead=True,
    ),
    Case(
        "ahead_window_shifted",
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=128,
        lengths=(90, 40),
        q_lens=(40, 1),
        window=30,
        page_size=16,
        slices=True,
        gaps=True,
        ahead=True,
        rotary_dim=128,
    ),
    # Odd sizes.
    Case("one_token", num_q_heads=1, num_kv_heads=1, head_dim=8, lengths=(1,), q_lens=(1,), page_size=8),
    Case(
        "two_tokens", num_q_heads=2, num_kv_heads=1, head_dim=16, lengths=(2, 2), q_lens=(2, 0), page_size=8
    ),
    Case("nothing", num_q_heads=4, num_kv_heads=2, head_dim=16, lengths=(9, 0), q_lens=(0, 0), padding=4),
    Case(
        "group_16", num_q_heads=16, num_kv_heads=1, head_dim=64, lengths=(60, 9), q_lens=(1, 6), page_size=8
    ),
    Case(
        "group_5_everything",
        num_q_heads=10,
        num_kv_heads=2,
        head_dim=24,
        lengths=(61, 300, 12, 0),
        q_lens=(1, 70, 12, 0),
        page_size=8,
        padding=6,
        window=33,
        soft_cap=5.0,
        sinks=True,
        slices=True,
        gaps=True,
    ),
    # Heads of values of another size: as in DeepSeek-V2 (arXiv:2405.04434); wider; padded on a TPU.
    Case(
        "values_128_of_192",
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=192,
        v_head_dim=128,
        lengths=(90, 33, 0, 64),
        q_lens=(1, 20, 0, 1),
        rotary_dim=64,
        slices=True,
        padding=2,
    ),
    Case(
        "values_wider",
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=64,
        v_head_dim=128,
        lengths=(150, 40),
        q_lens=(30, 1),
        page_size=16,
        window=50,
        sinks=True,
        gaps=True,
    ),
    Case(
        "values_96_of_128",
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=128,
        v_head_dim=96,
        lengths=(70, 33),
        q_lens=(1, 1),
        soft_cap=20.0,
    ),
    Case(
        "pages_of_256",
        num_q_heads=6,
        num_kv_heads=2,
        head_dim=32,
        lengths=(256, 257, 700),
        q_lens=(1, 2, 1),
        page_size=256,
    ),
)
"""Cases that each implementation supports, or refuses with NotImplementedError."""

_SMALL: dict[str, Any] = {
    "num_q_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "page_size": 16,
    "lengths": (37, 64, 0, 21),
    "q_lens": (1, 9, 0, 1),
    "slices": True,
    "rotary_dim": 64,
}
_QUANTIZED: dict[str, dict[str, Any]] = {
    "fp8_e4m3": {},
    "q8_0": {"shared": True, "slices": False},
    "q5_1": {"gaps": True},
    "q5_0": {"hadamard": True},
    "q4_1": {"window": 20},
    "q4_0": {"hadamard": True, "interleaved": True},
    "iq4_nl": {"head_dim": 96, "rotary_dim": 96},
    "q4_k": {"hadamard": True},
    "kivi4": {"shared": True, "slices": False},
    "kivi2": {"head_dim": 128, "rotary_dim": 128},
}
QUANTIZED_CASES: tuple[Case, ...] = (
    *(Case(name, **_SMALL | {"dtype": name} | more) for name, more in _QUANTIZED.items()),
    Case("q8_0_with_q4_0", **_SMALL | {"dtype": "q8_0", "v_dtype": "q4_0"}),
    Case("f16_with_kivi4", **_SMALL | {"dtype": "f16", "v_dtype": "kivi4"}),
    Case("q4_k_with_f32", **_SMALL | {"dtype": "q4_k", "v_dtype": "f32", "soft_cap": 20.0}),
    Case(
        "q8_0_smollm2_decode",
        **SMOLLM2_135M,
        lengths=(300, 33, 0, 128),
        q_lens=(1, 1, 0, 1),
        padding=2,
        dtype="q8_0",
        rotary_dim=64,
    ),
    Case("q8_0_values_half", **_SMALL | {"dtype": "q8_0", "head_dim": 128, "v_head_dim": 64}),
    Case(
        "q4_0_with_q8_0_values_wider",
        **_SMALL | {"dtype": "q4_0", "v_dtype": "q8_0", "head_dim": 128, "v_head_dim": 256, "hadamard": True},
    ),
    Case("q4_0_llama3_mixed", **LLAMA_3_8B, lengths=(70, 40), q_lens=(1, 20), dtype="q4_0", hadamard=True),
)
"""Cases with quantized pages: each format, mixed formats, with and without Hadamard transform."""
