"""llama.cpp on the same GGUF files: logits, greedy tokens, tokenizers.

What came out, and why the bounds are what they are, is in ``docs/reports/peers.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import peer_models as peer
from conftest import LlamaCpp, Measured
from jaxpaged_model import tiny
from jaxpaged_model.checkpoint.gguf_file import SUPPORTED_TYPES, GGUFFile
from jaxpaged_model.checkpoint.loading import load_model
from jaxpaged_model.metadata import ModelError
from jaxpaged_model.text.tokenizer import Tokenizer

# llama.cpp ignores the window in files of these architectures, and EXAONE 4's unless it has 64 layers.
IGNORED_WINDOWS = ("mistral-window", "qwen2-window", "qwen3-window", "phi3", "exaone4")
COMPARED = [name for name, one in peer.VARIANTS.items() if one.in_gguf and name not in IGNORED_WINDOWS]
TABLE_OF_GELU = ("gemma", "gemma2", "gemma3")
"""On a CPU llama.cpp looks GELU up in a table of float16."""

# Real vocabularies are optional.
VOCABULARIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "vocab"
TEXTS = [
    "",
    " ",
    "\n",
    "   leading,  runs     of spaces   ",
    "\t\ttabs\r\nand\n\n\nlines \n  indented\n \n\r\n x",
    "Hello, world! It's 'quoted' and I'LL DON'T stop. We've we'Re",
    "1 12 123 1234 12345 1234567 3.14159 1,000,000 1٢٣ ½ ² Ⅷ",
    "def f(x):\n    return {'a': x**2}  # 100%\n",
    "héllo wörld cafe\u0301 ΑΒΓ αβγ Дом Привет · 你好，世界 · こんにちは · 안녕하세요 · สวัสดี · नमस्ते",
    "مرحبا بالعالم ۔ שלום",
    "👩‍👩‍👧‍👦 🏳️‍🌈 😶‍🌫️ 🦙 ✅",
    "\x01 control \x7f \u200b zero width \xa0 nbsp \u3000 ideographic \ufeff",
    "<s>a</s> <|endoftext|> <|end|>b <unk>▁▁ <0x41>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 4,
]


def both(
    llama_cpp: LlamaCpp, name: str, quantization: str, tmp_path: Path, kv: str = "f32", steps: int = 0
) -> tuple[np.ndarray, dict[str, np.ndarray], Path]:
    """Our logits of all positions, concatenated, and llama.cpp's results."""
    path = tmp_path / "model.gguf"
    peer.write_gguf(peer.hf_model(name), path, quantization)
    ours = np.concatenate(peer.our_logits(load_model(path), "paged", peer.texts_to_score()))
    return ours, evaluated(llama_cpp, path, kv, steps), path


def evaluated(llama_cpp: LlamaCpp, path: Path, kv: str = "f32", steps: int = 0) -> dict[str, np.ndarray]:
    """llama.cpp's logits of all positions, concatenated, and its greedy tokens."""
    texts = peer.texts_to_score()
    theirs = llama_cpp(
        do="evaluate",
        path=str(path),
        kv=kv,
        texts=texts,
        decode=peer.DECODE_STEPS,
        prompts=peer.prompts() if steps else [],
        steps=steps,
    )
    theirs["logits"] = np.concatenate([theirs[f"logits{i}"] for i in range(len(texts))])
    return theirs


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square of the difference, in standard deviations of the logits."""
    return float(np.sqrt(np.mean((a - b) ** 2)) / b.std())


def divergence(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean KL divergence of our next-token distribution from theirs, in nats."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(theirs), log_softmax(ours)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", COMPARED)
def test_float32_logits_and_greedy_tokens_are_llama_cpps(
    llama_cpp: LlamaCpp, name: str, tmp_path: Path, measured: Measured
) -> None:
    ours, theirs, path = both(llama_cpp, name, "F32", tmp_path, steps=peer.GREEDY_STEPS)
    measured(difference=np.abs(ours - theirs["logits"]).max())
    if name in TABLE_OF_GELU:
        model = peer.with_gelu_of_a_table(peer.hf_model(name))
        explained = np.concatenate(peer.hf_logits(model, peer.texts_to_score()))
        error, rest = relative(ours, theirs["logits"]), relative(explained, theirs["logits"])
        measured(relative=error, unexplained=rest)
        # An activation halfway between two numbers of float16 may have been rounded the other way.
        assert error < 2e-3 and rest < error / 2
        return
    np.testing.assert_allclose(ours, theirs["logits"], rtol=0, atol=1e-4)
    starts = peer.prompts()
    greedy = [theirs[f"greedy{i}"].tolist() for i in range(len(starts))]
    assert peer.greedy_by_steps(load_model(path), "paged", starts) == greedy


def test_a_cache_in_float16_explains_what_llama_cpps_default_differs_by(
    llama_cpp: LlamaCpp, tmp_path: Path, measured: Measured
) -> None:
    ours, theirs, _ = both(llama_cpp, "llama", "F32", tmp_path, kv="f16")
    measured(relative=relative(ours, theirs["logits"]), kl=divergence(ours, theirs["logits"]))
    # Half a unit in the last place of float16 is 2^-11 = 4.9e-4 of a key or value; measured: 7.4e-4 of the logits.
    assert 1e-5 < relative(ours, theirs["logits"]) < 2e-3
    assert divergence(ours, theirs["logits"]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_0"])
def test_quantized_weights_differ_by_llama_cpps_rounding_of_activations(
    llama_cpp: LlamaCpp, name: str, quantization: str, tmp_path: Path, measured: Measured
) -> None:
    ours, theirs, path = both(llama_cpp, name, quantization, tmp_path)
    kl = divergence(ours, theirs["logits"])
    # Measured: 0.023 to 0.030, and 0.0009 to 0.0018 nats.
    assert relative(ours, theirs["logits"]) < 0.06
    assert kl < 5e-3
    # The same weights with activations rounded to Q8_0, as llama.cpp's kernels do: 1.6e-7, or up to 0.004 where, from
    # one position on, an activation seems to have been rounded the other way.
    in_file = peer.write_gguf(peer.hf_model(name), path, quantization)
    model = peer.with_weights(peer.hf_model(name), in_file)
    rounded = peer.rounding_activations(model, dict.fromkeys(in_file, quantization))
    explained = np.concatenate(peer.hf_logits(rounded, peer.texts_to_score()))
    measured(
        difference=np.abs(ours - theirs["logits"]).max(),
        relative=relative(ours, theirs["logits"]),
        kl=kl,
        unexplained=relative(explained, theirs["logits"]),
    )
    assert relative(explained, theirs["logits"]) < 0.01


# Types that llama.cpp writes without an importance matrix and that are supported here: of files, and of their matrices.
MIXTURES = {
    "F16": {"F16"},
    "BF16": {"BF16"},
    "Q8_0": {"Q8_0"},
    "Q4_0": {"Q4_0", "Q6_K"},
    "Q4_1": {"Q4_1", "Q6_K"},
    "Q5_0": {"Q5_0", "Q6_K"},
    "Q5_1": {"Q5_1", "Q6_K"},
    "Q2_K": {"Q2_K", "Q3_K", "Q6_K"},
    "Q3_K_S": {"Q3_K", "Q6_K"},
    "Q3_K_M": {"Q3_K", "Q4_K", "Q5_K", "Q6_K"},
    "Q3_K_L": {"Q3_K", "Q5_K", "Q6_K"},
    "Q4_K_S": {"Q4_K", "Q5_K", "Q6_K"},
    "Q4_K_M": {"Q4_K", "Q6_K"},
    "Q5_K_S": {"Q5_K", "Q6_K"},
    "Q5_K_M": {"Q5_K", "Q6_K"},
    "Q6_K": {"Q6_K"},
    "IQ4_NL": {"IQ4_NL", "Q6_K"},
    "IQ4_XS": {"IQ4_XS", "Q6_K"},
}


@dataclass(frozen=True)
class Quantized:
    """A file that llama.cpp quantized.

    Attributes:
      file_type: such as ``"Q4_K_M"``.
      path: the file.
      dequantized: the same, which llama.cpp made a file of float32 weights again.
    """

    file_type: str
    path: Path
    dequantized: Path


def quantize(llama_cpp: LlamaCpp, path: Path, file_type: str, folder: Path) -> Quantized:
    """llama.cpp's results for a file."""
    made = Quantized(file_type, folder / f"{file_type}.gguf", folder / f"{file_type}-dequantized.gguf")
    for source, out, number in (
        (path, made.path, gguf.LlamaFileType[f"MOSTLY_{file_type}"]),
        (made.path, made.dequantized, gguf.LlamaFileType.ALL_F32),
    ):
        llama_cpp(do="quantize", path=str(source), out=str(out), file_type=number)
    return made


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of float32 weights."""
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"
    peer.write_gguf(peer.hf_model(peer.WIDE), path)
    return path


@pytest.fixture(scope="module")
def unquantized(llama_cpp: LlamaCpp, wide: Path) -> np.ndarray:
    """llama.cpp's logits of the float32 weights."""
    return evaluated(llama_cpp, wide)["logits"]


@pytest.fixture(scope="module", params=MIXTURES)
def quantized(request: pytest.FixtureRequest, llama_cpp: LlamaCpp, wide: Path) -> Quantized:
    return quantize(llama_cpp, wide, request.param, wide.parent)


def test_every_supported_type_is_in_one_of_the_mixtures() -> None:
    assert {"F32"}.union(*MIXTURES.values()) == {kind.name for kind in SUPPORTED_TYPES}


def test_weights_that_llama_cpp_quantized_are_what_it_dequantizes_them_to(
    quantized: Quantized, wide: Path, measured: Measured
) -> None:
    ours, theirs, original = GGUFFile(quantized.path), GGUFFile(quantized.dequantized), GGUFFile(wide)
    assert {tensor.dtype for tensor in ours.tensors.values()} == MIXTURES[quantized.file_type] | {"F32"}
    assert {tensor.dtype for tensor in theirs.tensors.values()} == {"F32"}
    assert ours.tensors.keys() == theirs.tensors.keys() == original.tensors.keys()
    errors = []
    for name in original.tensors:
        read, before = ours.read(name).astype(np.float32), original.read(name)
        np.testing.assert_array_equal(read, theirs.read(name), err_msg=name)
        errors.append(relative(read, before))
    measured(error_of_quantization=max(errors))


def test_a_file_that_llama_cpp_quantized_gives_the_logits_of_its_weights(
    llama_cpp: LlamaCpp, unquantized: np.ndarray, quantized: Quantized, measured: Measured
) -> None:
    loaded = load_model(quantized.path, exact=True)
    assert loaded.description.endswith(f" {quantized.file_type}")
    ours = np.concatenate(peer.our_logits(loaded, "paged", peer.texts_to_score()))
    # The same weights as float32: llama.cpp does not round activations.
    same_weights = evaluated(llama_cpp, quantized.dequantized)["logits"]
    theirs = evaluated(llama_cpp, quantized.path)["logits"]
    measured(
        same_weights=np.abs(ours - same_weights).max(),
        difference=np.abs(ours - theirs).max(),
        relative=relative(ours, theirs),
        kl=divergence(ours, theirs),
        of_quantization=relative(theirs, unquantized),
    )
    np.testing.assert_allclose(ours, same_weights, rtol=0, atol=1e-4)
    # Measured: up to 0.042 and 0.0034 nats.
    assert relative(ours, theirs) < 0.1
    assert divergence(ours, theirs) < 0.01


@pytest.mark.parametrize(
    "quantized",
    [name for name, types in MIXTURES.items() if not types & {"F16", "BF16", "Q4_1", "Q5_1"}],
    indirect=True,
)
def test_rounding_of_activations_explains_llama_cpps_logits(
    llama_cpp: LlamaCpp, quantized: Quantized, measured: Measured
) -> None:
    file, model = GGUFFile(quantized.path), peer.hf_model(peer.WIDE)
    types = {name: file.tensors[peer.gguf_name(model, name)].dtype for name in model.state_dict()}
    weights = peer.read_gguf(model, quantized.dequantized)
    rounded = peer.rounding_activations(peer.with_weights(model, weights), types)
    explained = np.concatenate(peer.hf_logits(rounded, peer.texts_to_score()))
    theirs = evaluated(llama_cpp, quantized.path)["logits"]
    # Halfway between two integers the last bit of a sum decides, and another rounding changes all later positions,
    # too. Without rounding no position agrees; measured: 0.41 to 1 of them.
    met = float((np.abs(explained - theirs).max(-1) < 1e-4).mean())
    measured(met=met)
    assert met > 0.2


def test_the_embedded_model_as_q4_k_m_gives_the_logits_and_greedy_tokens_of_its_weights(
    llama_cpp: LlamaCpp, tmp_path: Path, measured: Measured
) -> None:
    """Trained weights, and rows of 640 numbers, no multiple of a K-quant's block: llama.cpp uses other types."""
    quantized = quantize(llama_cpp, tiny.PATH, "Q4_K_M", tmp_path)
    types = {tensor.dtype for tensor in GGUFFile(quantized.path).tensors.values()}
    assert types == {"F32", "Q4_K", "Q6_K", "Q5_0", "Q8_0"}
    loaded = load_model(quantized.path, exact=True)
    ours = np.concatenate(peer.our_logits(loaded, "paged", peer.texts_to_score()))
    same_weights = evaluated(llama_cpp, quantized.dequantized, steps=peer.GREEDY_STEPS)
    theirs = evaluated(llama_cpp, quantized.path)["logits"]
    measured(same_weights=np.abs(ours - same_weights["logits"]).max(), relative=relative(ours, theirs))
    np.testing.assert_allclose(ours, same_weights["logits"], rtol=0, atol=1e-4)
    assert relative(ours, theirs) < 0.1
    starts = peer.prompts()
    greedy = [same_weights[f"greedy{i}"].tolist() for i in range(len(starts))]
    assert peer.greedy_by_steps(loaded, "paged", starts) == greedy


@pytest.mark.parametrize("file_type", ["IQ3_S", "TQ1_0", "TQ2_0"])
def test_a_type_that_is_not_supported_is_named(llama_cpp: LlamaCpp, wide: Path, file_type: str) -> None:
    path = quantize(llama_cpp, wide, file_type, wide.parent).path
    message = rf"{path}: tensor type {file_type} \(\d+ tensors\) is not supported; supported are F32, .*$"
    with pytest.raises(ModelError, match=message) as error:
        load_model(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("parse_special", [False, True])
@pytest.mark.parametrize("path", sorted(VOCABULARIES.glob("*.gguf")), ids=lambda path: path.stem)
def test_vocabularies_tokenize_as_in_llama_cpp(llama_cpp: LlamaCpp, path: Path, parse_special: bool) -> None:
    theirs = llama_cpp(do="tokenize", path=str(path), texts=TEXTS, special=parse_special)
    tokenizer = Tokenizer.from_gguf(GGUFFile(path).metadata)
    for i, text in enumerate(TEXTS):
        assert tokenizer.encode(text, parse_special=parse_special) == theirs[f"{i}"].tolist(), text
