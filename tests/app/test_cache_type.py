"""Laws of -ctk, -ctv and --hadamard: what is reported is what is stored, and paging does not change values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from jaxpaged_model.config import ModelConfig

from jaxpaged.app.cache_type import CacheType
from jaxpaged.app.chat import reusable_tokens
from jaxpaged.app.kv_report import CachePlan, KVReport
from jaxpaged.app.options import CACHE_TYPES
from jaxpaged.pages.formats import PAGE_FORMATS

CONFIG = ModelConfig("llama", 61, 64, 32, 3, 2, 1, 32, 64)
GREEDY = ("--temp", "0", "--ignore-eos", "--page-size", "8", "--no-warmup")
PROMPT = "def f(x):\n    return"


@pytest.fixture(scope="module")
def generate(here: Callable, wide_model_path: Path) -> Callable[..., dict]:
    def run(*arguments: str | Path, prompt: str = PROMPT) -> dict:
        done = here("generate", "-m", wide_model_path, "-p", prompt, *GREEDY, "--json", *arguments)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return run


def test_every_page_format_has_its_name_on_the_command_line():
    assert tuple(PAGE_FORMATS) == CACHE_TYPES


@pytest.mark.parametrize(
    ("k", "v"), [*((name, name) for name in PAGE_FORMATS), ("q8_0", "q4_0"), ("kivi2", "f16")]
)
def test_bytes_told_are_those_of_the_arrays(k, v):
    cache_type = CacheType(k, v)
    sizes = {"num_seqs": 2, "context": 40, "tokens": 20, "page_size": 8}
    for paged in (True, False) if not cache_type.has_residual else (True,):
        plan = CachePlan.make(CONFIG, paged=paged, cache_type=cache_type, **sizes)
        cache = plan.create()
        arrays = jax.tree.leaves((cache.k_pages, cache.v_pages) if paged else (cache.k, cache.v))
        report = KVReport.of(plan, plan.num_pages)
        assert report.bytes_peak == sum(array.nbytes for array in arrays)
        if not paged:
            assert report.bytes_contiguous == report.bytes_peak
    assert f"of {cache_type}" in report.line()


def test_what_only_pages_can_keep_is_not_compared_with_a_contiguous_cache():
    plan = CachePlan.make(
        CONFIG, paged=True, cache_type=CacheType("q4_k", "f16"), num_seqs=1, context=8, tokens=8, page_size=8
    )
    report = KVReport.of(plan, 1)
    assert report.as_dict()["bytes_contiguous"] is None and "contiguous" not in report.line()


def test_quantized_rows_give_the_same_text_with_and_without_pages(generate):
    flags = ("-n", "12", "-ctk", "q8_0", "-ctv", "q8_0")
    paged, contiguous = generate(*flags), generate(*flags, "--no-kv-cache-paged")
    assert paged["tokens"] == contiguous["tokens"] and len(paged["tokens"]) == 12
    assert (paged["kv"]["type_k"], paged["kv"]["type_v"]) == ("q8_0", "q8_0")
    page = 8 * 2 * 34
    assert paged["kv"]["bytes_peak"] == paged["kv"]["pages_peak"] * page
    assert paged["kv"]["bytes_contiguous"] == contiguous["kv"]["bytes_peak"] == 128 // 8 * page


def test_residual_pages_are_filled_whatever_was_reused_of_them(generate, tmp_path):
    # All of them run one program: prompts of up to 8 tokens are alike to it.
    def run(name: str, prompt: str, *more: str) -> dict:
        flags = ("-n", "12", "-ctk", "kivi2", "-ctv", "f16", "--prompt-cache", tmp_path / name)
        return generate(*flags, *more, prompt=prompt)

    first, other = run("kept.kv", "def f(x)", "--prompt-cache-all"), run("other.kv", "def g(x)")
    assert first["kv"]["pages_peak"] == -(-(8 + 12 - 1) // 8)
    # Both begin with tokens of the first page, which is finalized: after those alone it would never be filled again.
    for expected, prompt in ((first, "def f(x)"), (other, "def g(x)")):
        again = run("kept.kv", prompt, "--prompt-cache-ro")
        assert again["timings"]["prompt_n"] == len(prompt)
        assert (again["tokens"], again["kv"]) == (expected["tokens"], expected["kv"])


def test_a_chat_that_forgets_forgets_whole_pages_of_residual_formats():
    assert reusable_tokens([1, 2, 3, 4, 5], [1, 2, 3, 9, 5], by=2) == 2
    assert reusable_tokens([1, 2, 3], [1, 2, 3, 4], by=2) == 3  # goes on behind what is held
    assert reusable_tokens([1, 2, 3], [1, 2, 3], by=2) == 2
    assert reusable_tokens([1, 2, 3, 4, 5], [1, 2, 3, 9, 5]) == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-ctk", "q9_9"], "'q9_9' is not one of 'f32', 'bf16', 'f16', 'fp8_e4m3', 'q8_0'"),
        (
            ["-ctv", "q4_k", "--no-kv-cache-paged"],
            "q4_k quantizes whole pages; a cache without pages stores f32, ",
        ),
        (["--hadamard", "on", "-ctk", "f16", "-ctv", "fp8_e4m3"], "give -ctk or -ctv one of q8_0, q5_1, "),
        (["--hadamard", "maybe"], "'maybe' is not one of 'auto', 'on', 'off'"),
    ],
)
def test_types_that_cannot_be_are_one_line(refused, wide_model_path, flags, said):
    assert said in refused("generate", "-m", wide_model_path, "-p", "x", "-s", "1", *flags)


def test_heads_that_a_format_cannot_keep_are_one_line(refused, model_path):
    base = ("generate", "-m", model_path, "-p", "x", "-s", "1", "--page-size", "8")
    assert "head_dim must be a multiple of 32, got 8; formats for any head_dim are f32" in refused(
        *base, "-ctk", "q4_0"
    )
    assert "got 8 * 8; for head_dim 8 page sizes that fit are 32, 64" in refused(*base, "-ctv", "q4_k")
    assert "head_dim must be a multiple of 32" in refused(
        "bench", "-m", model_path, "-p", "8", "-d", "0", "-n", "8", "-ctk", "f32,q8_0"
    )
    assert "head_dim must be a multiple of 32" in refused("explain", "-m", model_path, "-ctk", "q8_0")
