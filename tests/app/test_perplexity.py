"""Laws of measuring quality: what does not depend on how a text is fed, what is 0, and what llama-perplexity prints."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpaged_model.config import ModelConfig
from jaxpaged_model.llama import functional, random_params

from jaxpaged.app.cache_type import CacheType
from jaxpaged.app.divergence import Divergence, Estimate, perplexity, running_perplexity
from jaxpaged.app.scoring import Scores, cut, divergence, score

CONFIG = ModelConfig("llama", 61, 64, 32, 1, 2, 1, 64, 64)
N_CTX = 64
TEXT = "def f(x):\n    return x * 2\n" * 20


@jax.tree_util.register_static
class NoCache:
    """Attention over the tokens of one chunk alone, in plain jax.numpy; the seam of a cache and nothing behind it."""

    def attend(self, layer, q, k, v, batch, *, scale=None, **_):
        k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
        scores = jnp.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        seen = jnp.tril(jnp.ones((len(q), len(q)), bool))
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("hqk,khd->qhd", weights, v), self


@pytest.fixture(scope="module")
def chunks():
    return cut(np.random.default_rng(0).integers(0, CONFIG.vocab_size, 5 * N_CTX + 7).tolist(), N_CTX)


@pytest.fixture(scope="module")
def measured(chunks):
    """Scores of a model of random weights by page format, with f32 beside; each setting is measured once."""
    model, params = functional(CONFIG), random_params(CONFIG, seed=1)
    # Logits of random weights are small: these are sure of something, and look far back.
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x if "scale" in jax.tree_util.keystr(path) else 3 * x, params
    )

    def run(*kinds, step=N_CTX, parallel=2):
        caches = [k.create(CONFIG, num_seqs=parallel, tokens=N_CTX, page_size=16) for k in kinds]
        groups = list(score(model, params, CONFIG.vocab_size, caches, chunks, step=step))
        return [Scores.join(parts) for parts in zip(*groups, strict=True)]

    run.model, run.params = model, params
    return run


F32 = CacheType("f32", "f32")


def test_cut_drops_the_rest_and_puts_bos_first():
    np.testing.assert_array_equal(cut(range(7), 3), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(cut(range(7), 3, bos=9), [[9, 1, 2], [9, 4, 5]])
    assert cut(range(2), 3).shape == (0, 3)


def test_f32_scores_what_the_model_says_without_a_cache(measured, chunks):
    (found,) = measured(F32)
    step = SimpleNamespace(rope_positions=jnp.arange(N_CTX), position=jnp.arange(N_CTX), num_valid=N_CTX)
    rows = jnp.arange(N_CTX // 2, N_CTX - 1)
    logits_of = jax.jit(lambda params, chunk: measured.model(params, chunk, NoCache(), step, rows)[0])
    for chunk, nll, right in zip(chunks, found.nll, found.right, strict=True):
        logits = np.asarray(logits_of(measured.params, chunk), np.float64)
        of_next = logits[np.arange(len(rows)), chunk[rows + 1]]
        np.testing.assert_array_equal(right, logits.argmax(axis=-1) == chunk[rows + 1])
        np.testing.assert_allclose(nll, np.log(np.exp(logits).sum(axis=-1)) - of_next, rtol=2e-5, atol=2e-5)
    assert found.nll.std() > 1


@pytest.mark.parametrize(("step", "parallel"), [(1, 5), (24, 3)])
def test_f32_does_not_depend_on_how_it_is_fed(measured, step, parallel):
    (whole,) = measured(F32)
    (found,) = measured(F32, step=step, parallel=parallel)
    np.testing.assert_allclose(found.nll, whole.nll, rtol=2e-5, atol=2e-5)


def test_few_logits_at_once_are_the_same(measured, monkeypatch):
    monkeypatch.setattr("jaxpaged.app.scoring._LOGITS_BYTES", 4 * CONFIG.vocab_size * 5 * 5)
    (few,) = measured(F32, step=1, parallel=5)
    np.testing.assert_allclose(few.nll, measured(F32)[0].nll, rtol=2e-5, atol=2e-5)


def test_f32_against_f32_is_nothing(measured):
    base, found = measured(F32, F32)
    np.testing.assert_array_equal(found.nll, base.nll)
    assert not found.kld.any() and found.same_top.all()
    d = Divergence(base, found)
    assert d.ratio == (1, 0) and d.ln_ratio == (0, 0) and d.rms_delta_p == (0, 0) and d.same_top == (1, 0)
    assert d.correlation == pytest.approx(1)


@pytest.mark.parametrize(
    "kind", [CacheType("bf16", "bf16"), CacheType("q8_0", "q4_0"), CacheType("kivi4", "kivi4")]
)
def test_formats_are_near_f32_and_not_it(measured, kind):
    d = Divergence(*measured(F32, kind))
    print(kind, d.kld, d.same_top)
    assert 0 < d.kld.value < 0.3 and d.same_top.value > 0.8


def test_caches_must_fit(measured, chunks):
    make = partial(F32.create, CONFIG, page_size=16)
    arguments = measured.model, measured.params, CONFIG.vocab_size
    with pytest.raises(ValueError, match="differ in max_seqs"):
        next(score(*arguments, [make(num_seqs=n, tokens=N_CTX) for n in (1, 2)], chunks, step=N_CTX))
    with pytest.raises(ValueError, match="1 x 64 tokens need more than 1 pages of 16"):
        next(score(*arguments, [make(num_seqs=1, tokens=16)], chunks, step=N_CTX))


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.3, 3, 30])
def test_divergence_is_that_of_float64(size):
    rng = np.random.default_rng(0)
    base = (rng.normal(size=(20, 4096)) * 4).astype(np.float32)
    # A change that all logits have in common is none.
    logits = (base + size * rng.normal(size=base.shape) + 3).astype(np.float32)

    def log_softmax(x):
        x = x.astype(np.float64)
        x -= x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    p, q = log_softmax(base), log_softmax(logits)
    expected = np.sum(np.exp(p) * (p - q), axis=-1)
    np.testing.assert_allclose(divergence(base, logits), expected, rtol=5e-3 if size < 1e-3 else 1e-4)


def test_divergence_of_what_was_impossible_is_finite():
    base, logits = np.zeros((2, 1, 4), np.float32)
    base[0, 0], logits[0, 1] = 200, 60
    np.testing.assert_allclose(divergence(base, logits), [60], rtol=1e-6)
    np.testing.assert_array_equal(divergence(base, base), [0])


def test_uncertainties_are_llama_perplexitys():
    """By its formulas, sums and covariances of all tokens."""
    rng = np.random.default_rng(0)
    nll_base = rng.gamma(2.0, size=(3, 50))
    nll = nll_base + 0.1 * rng.normal(size=nll_base.shape)
    kld, same = rng.gamma(0.1, size=nll.shape), rng.random(nll.shape) < 0.9
    base = Scores(nll_base, same, np.zeros_like(nll), np.ones_like(same))
    found = Scores(nll, same, kld, same)
    d, n = Divergence(base, found), nll.size

    def mean(x):
        value = x.sum() / n
        return value, math.sqrt(((x**2).sum() / n - value**2) / (n - 1))

    (log_q, error_q), (log_b, error_b) = mean(nll), mean(nll_base)
    assert perplexity(found) == pytest.approx((math.exp(log_q), math.exp(log_q) * error_q))
    assert d.ppl_base == pytest.approx((math.exp(log_b), math.exp(log_b) * error_b))
    covariance = ((nll * nll_base).sum() / n - log_q * log_b) / (n - 1)
    ratio_error = math.sqrt(error_q**2 + error_b**2 - 2 * covariance)
    assert d.ln_ratio == pytest.approx((log_q - log_b, ratio_error))
    assert d.ratio == pytest.approx((math.exp(log_q - log_b), math.exp(log_q - log_b) * ratio_error))
    ppl, base_ppl = d.ppl, d.ppl_base
    squares = ppl.error**2 + base_ppl.error**2 - 2 * ppl.value * base_ppl.value * covariance
    assert d.difference == pytest.approx((ppl.value - base_ppl.value, math.sqrt(squares)))
    assert d.correlation == pytest.approx(covariance / (error_q * error_b))
    assert d.kld == pytest.approx(mean(kld))
    delta_p = np.exp(-nll) - np.exp(-nll_base)
    square, square_error = mean(delta_p**2)
    assert d.delta_p == pytest.approx(mean(delta_p))
    assert d.rms_delta_p == pytest.approx((math.sqrt(square), 0.5 / math.sqrt(square) * square_error))
    share = same.mean()
    assert d.same_top == pytest.approx((share, math.sqrt(share * (1 - share) / (n - 1))))
    assert d.kld_quantiles["Median"] == np.median(kld) and d.kld_quantiles["Maximum"] == kld.max()
    assert running_perplexity(found)[-1] == pytest.approx(perplexity(found).value)
    assert running_perplexity(found)[0] == pytest.approx(math.exp(nll[0].mean()))
    assert Estimate.mean(np.ones(1)) == (1, 0)


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.py"
    path.write_text(TEXT)
    return path


def test_perplexity_is_printed_as_llama_perplexity_does(here, model_path, text):
    flags = ("perplexity", "-m", model_path, "-f", text, "-c", "64", "-np", "3")
    done = here(*flags)
    assert done.exit_code == 0, done.output
    running, final = done.stdout.splitlines()
    count = len(TEXT) // 64
    values = re.findall(r"\[(\d+)\](\d+\.\d{4}),", running)
    assert [int(number) for number, _ in values] == list(range(1, count + 1))
    estimate = re.fullmatch(r"Final estimate: PPL = (\d+\.\d{4}) \+/- (\d+\.\d{5})", final)
    assert estimate and estimate[1] == values[-1][1]
    found = json.loads(here(*flags, "--json", "--log-disable").stdout)
    assert found["ppl"]["value"] == pytest.approx(float(estimate[1]), abs=1e-4)
    assert (found["chunks"], found["n_ctx"], found["tokens"]) == (count, 64, 31 * count)
    assert found["cache"] == {"k": "f32", "v": "f32", "hadamard": None, "page_size": 32, "bits_per_value": 32}


def test_kl_divergence_is_printed_as_llama_perplexity_does(here, model_path, text):
    flags = ("perplexity", "-m", model_path, "-f", text, "--kl-divergence", "-ctk", "bf16", "-ctv", "bf16")
    done = here(*flags, "--chunks", "2")
    assert done.exit_code == 0, done.output
    found = json.loads(here(*flags, "--chunks", "2", "--json").stdout)
    assert found["n_ctx"] == 128  # the model's, which has fewer than 512
    assert found["cache"]["bits_per_value"] == 16
    assert 0 < found["kld"]["value"] < 1e-4
    printed = dict(re.findall(r"^(.*?) *: +(-?[\d.]+)", done.stdout, re.MULTILINE))
    assert float(printed["Mean PPL(Q)"]) == pytest.approx(found["ppl"]["value"], abs=1e-6)
    assert float(printed["Mean    KLD"]) == pytest.approx(found["kld"]["value"], abs=1e-8)
    assert float(printed["99.9%   KLD"]) == pytest.approx(found["kld_quantiles"]["99.9%"], abs=1e-8)
    assert float(printed["Same top p"]) == pytest.approx(100 * found["same_top"]["value"], abs=1e-3)


def test_stdin_token_by_token(here, model_path):
    done = here(
        "perplexity", "-m", model_path, "-f", "-", "-c", "32", "--chunks", "3", "-ub", "1", stdin=TEXT
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("[1]") and "Final estimate: PPL = " in done.stdout
    assert "3 chunks of 32 tokens, the last 15 of each scored; 1 tokens a step, 3 side by side" in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-f", "nowhere.txt"], "-f nowhere.txt: No such file or directory"),
        (["-m", "nowhere.gguf"], "nowhere.gguf: no such file or folder"),
        (["-c", "63"], "-c 63 is odd"),
        (["-c", "130"], "-c 130 is more than the 128 tokens that the model was trained for"),
        (["-c", "6"], "-c 6 is less than the 8 tokens that make a chunk"),
        (
            ["-f", __file__, "-ctk", "q9_9"],
            "'-ctk' / '--cache-type-k': 'q9_9' is not one of 'f32', 'bf16', 'f16'",
        ),
        (["-ctv", "q9_9"], "'-ctv' / '--cache-type-v': 'q9_9' is not one of"),
        (["-ctk", "q8_0", "-ctv", "q8_0"], "head_dim must be a multiple of 32, got 8"),
        (["--hadamard", "maybe"], "'maybe' is not one of 'auto', 'on', 'off'"),
        (["--chunks", "0"], "there is nothing to measure"),
        (["--page-size", "12"], "12 is not a power of two"),
        (["-ub", "0"], "0 is not in the range"),
    ],
)
def test_bad_input_is_one_line(refused, model_path, text, flags, said):
    assert said in refused("perplexity", "-m", model_path, "-f", text, *flags)


def test_a_short_text_is_told_what_it_lacks(refused, model_path, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("x" * 100)
    assert f"{path} has 100 tokens; a chunk (-c) needs 128" in refused(
        "perplexity", "-m", model_path, "-f", path
    )
    path.write_bytes(b"\xff")
    assert "not UTF-8 text" in refused("perplexity", "-m", model_path, "-f", path)
