"""Small random models of transformers, the same models as GGUF files, and our logits for both."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import torch
import transformers
from jaxpaged_model.checkpoint.loading import LoadedModel
from jaxpaged_model.config import ModelConfig

from jaxpaged.cache.contiguous import ContiguousKVCache
from jaxpaged.cache.paged import PagedKVCache
from jaxpaged.generation.api import generate

VOCAB_SIZE = 300
# One prompt is longer than a prefill step, one than every sliding window, one is a single token.
PROMPT_LENS = (21, 1, 34)
PREFILL_CHUNK = 16
DECODE_STEPS = 8
GREEDY_STEPS = 64
MAX_LENGTH = 104
"""Tokens of a prompt and ``GREEDY_STEPS`` more."""


@dataclass(frozen=True)
class Variant:
    """A model: its ``model_type``, what differs from the small default, and whether GGUF can say it."""

    architecture: str
    changes: dict[str, Any] = field(default_factory=dict)
    in_gguf: bool = True


def rope(kind: str, **values: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


# Original contexts are chosen so that every rule has frequencies on both sides of its ramp, and on it.
LINEAR = rope("linear", factor=3.0)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=1024)
LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256
)
ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 9, "tie_word_embeddings": True}
FACTORS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 0.5,
}
OLMO_ROPES = {
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
PHI_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}}
SHORT, LONG = [1.0, 1.1, 1.2, 1.4, 1.6, 2.0, 2.5, 3.0], [1.5, 2.0, 3.0, 4.0, 6.0, 9.0, 13.0, 20.0]
TEMPERATURE = rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=16,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.3,
)
COHERE = {"sliding_window": 9, "logit_scale": 0.5, "layer_norm_eps": 2.0**-18}
WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}

VARIANTS = {
    "llama": Variant("llama"),
    "llama-linear": Variant("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, **LINEAR}),
    "llama-yarn": Variant("llama", {"head_dim": 32, **YARN}),
    "llama-llama3": Variant("llama", {"head_dim": 32, **LLAMA3}),
    "llama-biases": Variant(
        "llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "num_key_value_heads": 1}
    ),
    "mistral-window": Variant("mistral", {"sliding_window": 9, "head_dim": 32}),
    "qwen2": Variant("qwen2"),
    "qwen2-window": Variant("qwen2", {"num_hidden_layers": 3, **WINDOW}),
    "qwen2-yarn": Variant("qwen2", {"hidden_size": 128, "tie_word_embeddings": True, **YARN}),
    "qwen3": Variant("qwen3", {"head_dim": 32}),
    "qwen3-window": Variant("qwen3", {"head_dim": 16, "attention_bias": True, **WINDOW}),
    # Six layers and two of the next period; another factor of attention, which GGUF does not have.
    "gemma3": Variant("gemma3_text", {**GEMMA, "num_hidden_layers": 8, "rope_parameters": ROPES}),
    "gemma3-other": Variant(
        "gemma3_text",
        {
            **GEMMA,
            "query_pre_attn_scalar": 20,
            "final_logit_softcapping": 4.0,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "num_hidden_layers": 3,
        },
        in_gguf=False,
    ),
    "gemma2": Variant(
        "gemma2",
        {**GEMMA, "num_hidden_layers": 3, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    ),
    "gemma2-other": Variant("gemma2", {**GEMMA, "query_pre_attn_scalar": 20, "head_dim": 16}, in_gguf=False),
    "smollm3": Variant("smollm3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "smollm3-window": Variant(
        "smollm3",
        {
            "num_hidden_layers": 3,
            "no_rope_layers": [1, 0, 1],
            "attention_bias": True,
            "mlp_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
        },
        in_gguf=False,
    ),
    "granite": Variant("granite", {**FACTORS, "tie_word_embeddings": True}),
    "granite-biases": Variant("granite", {**FACTORS, "attention_bias": True, "mlp_bias": True}),
    "olmo2": Variant("olmo2"),
    "olmo3": Variant("olmo3", {"num_hidden_layers": 5, "sliding_window": 9, "rope_parameters": OLMO_ROPES}),
    "phi3": Variant("phi3", {"sliding_window": 9, "head_dim": 16, **PHI_ROPE}),
    "phi3-long": Variant(
        "phi3",
        {
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 8,
            **rope("longrope", short_factor=SHORT, long_factor=LONG),
        },
    ),
    "phi3-short": Variant(
        "phi3",
        {
            "original_max_position_embeddings": 4096,
            **rope("longrope", short_factor=SHORT, long_factor=LONG),
        },
    ),
    "ministral3": Variant("ministral3", {"head_dim": 32, **TEMPERATURE}),
    "ministral3-window": Variant(
        "ministral3", {"head_dim": 16, "sliding_window": 9, **TEMPERATURE}, in_gguf=False
    ),
    "seed_oss": Variant("seed_oss", {"head_dim": 24}),
    "seed_oss-biases": Variant(
        "seed_oss",
        {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        in_gguf=False,
    ),
    "exaone4": Variant("exaone4", {"num_hidden_layers": 5, "sliding_window": 9}),
    "exaone4-full": Variant(
        "exaone4",
        {
            "sliding_window": None,
            "layer_types": ["full_attention"] * 2,
            "tie_word_embeddings": True,
            **LLAMA3,
        },
    ),
    "cohere2": Variant("cohere2", {"num_hidden_layers": 5, "tie_word_embeddings": True, **COHERE}),
    "cohere2-other": Variant(
        "cohere2",
        {
            "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention"],
            **COHERE,
        },
        in_gguf=False,
    ),
    "gemma": Variant("gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "cohere": Variant(
        "cohere", {"tie_word_embeddings": True, "logit_scale": 0.5, "layer_norm_eps": 2.0**-18}
    ),
    "arcee": Variant("arcee", {"head_dim": 24}),
    "arcee-biases": Variant(
        "arcee", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, in_gguf=False
    ),
    "ernie4_5": Variant("ernie4_5", {"head_dim": 24, "tie_word_embeddings": True}),
    "ernie4_5-biases": Variant("ernie4_5", {"head_dim": 16, "use_bias": True}, in_gguf=False),
    "glm4": Variant("glm4", {"head_dim": 16}),
}
ONE_OF_EACH = (
    "llama", "mistral-window", "qwen2-window", "qwen3-window", "gemma3", "gemma2", "smollm3", "granite", "olmo3",
    "phi3", "ministral3", "seed_oss", "exaone4", "cohere2", "gemma", "cohere", "arcee", "ernie4_5", "glm4",
)  # fmt: skip
"""A variant of each architecture, with a window if supported; few, because programs take seconds to compile."""
WIDE = "llama-wide"
"""A llama with rows of whole blocks of 256, as K-quants need; no variant, because wider rows test nothing else."""
_MODELS = VARIANTS | {WIDE: Variant("llama", {"hidden_size": 256, "intermediate_size": 512})}


@functools.cache
def hf_model(name: str) -> transformers.PreTrainedModel:
    """The variant with random weights for which every part changes the logits, biases and norms included."""
    variant = _MODELS[name]
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 2.0
        ** -20,  # Exact in float32, which GGUF keeps it in: both files give one configuration.
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }
    config = transformers.AutoConfig.for_model(variant.architecture, **{**settings, **variant.changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("norm.weight"):
                mean = 0 if variant.architecture in _LESS_ONE else 1
                weight.copy_(mean + 0.2 * torch.randn_like(weight))
            elif weight.ndim == 1:
                weight.copy_(0.3 * torch.randn_like(weight))
            elif "embed" in key or "lm_head" in key:
                weight.copy_(torch.randn_like(weight) * (2 / math.sqrt(weight.shape[1])))
            else:
                weight.copy_(torch.randn_like(weight) * (1.5 / math.sqrt(weight.shape[1])))
    return model


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB_SIZE, n).tolist() for n in PROMPT_LENS]


def texts_to_score() -> list[list[int]]:
    """The prompts, each followed by fixed tokens for decode steps."""
    rng = np.random.default_rng(2)
    return [[*p, *rng.integers(0, VOCAB_SIZE, DECODE_STEPS).tolist()] for p in prompts()]


def hf_logits(model: transformers.PreTrainedModel, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Logits f32[length, vocab] of each text, all tokens at once."""
    with torch.no_grad():
        return [model(torch.tensor([list(text)])).logits[0].numpy() for text in texts]


def hf_hidden_states(model: transformers.PreTrainedModel, text: Sequence[int]) -> np.ndarray:
    """Hidden states behind the last norm, f32[number of tokens, hidden_size]."""
    with torch.no_grad():
        return model.base_model(torch.tensor([list(text)])).last_hidden_state[0].numpy()


def margin(logits: Sequence[np.ndarray]) -> float:
    """The smallest margin of a likeliest token: greedy tokens are equal if the error is smaller."""
    best = [np.partition(rows, -2, axis=-1)[:, -2:] for rows in logits]
    return min(float((pair[:, 1] - pair[:, 0]).min()) for pair in best)


def hf_greedy(model: transformers.PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """The continuation by transformers' own ``generate``, with its own cache."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=GREEDY_STEPS
    )
    return out[0, len(prompt) :].tolist()


def hf_logits_behind(
    model: transformers.PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]
) -> np.ndarray:
    """f32[tokens, vocab]: what transformers chooses each of the tokens from.

    By induction these are the greedy ones exactly when each is the likeliest: one pass instead of one a token.
    """
    (logits,) = hf_logits(model, [[*prompt, *tokens]])
    return logits[len(prompt) - 1 : -1]


# --- Ours --------------------------------------------------------------------------------------------------


def empty_cache(config: ModelConfig, kind: str, max_seqs: int) -> PagedKVCache | ContiguousKVCache:
    sizes = {
        "num_layers": config.num_layers,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_seqs": max_seqs,
    }
    if kind == "contiguous":
        return ContiguousKVCache.create(**sizes, max_length=MAX_LENGTH)
    pages = -(-MAX_LENGTH // 8)
    return PagedKVCache.create(**sizes, num_pages=max_seqs * pages, max_seq_len=MAX_LENGTH, page_size=8)


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def _step(model: Any, params: Any, cache: Any, tokens: jax.Array, num_new: jax.Array) -> tuple[Any, Any, Any]:
    cache, batch, ok = cache.reserve(num_new, num_tokens=tokens.shape[0])
    logits, cache = model(params, tokens, cache, batch, jnp.arange(tokens.shape[0]))
    return logits, cache, ok


class Run:
    """Several sequences: ragged prefill in steps, then one token of each per step."""

    def __init__(self, loaded: LoadedModel, kind: str, count: int) -> None:
        self.model, self.params = loaded.function, loaded.params
        self.cache = empty_cache(loaded.config, kind, count)
        self.rows: list[list[np.ndarray]] = [[] for _ in range(count)]

    def step(self, new: Sequence[Sequence[int]], num_tokens: int) -> None:
        """Computes these tokens of each sequence, in a step of ``num_tokens`` rows, and stores their logits."""
        tokens = [token for part in new for token in part]
        padded = jnp.asarray(tokens + [0] * (num_tokens - len(tokens)), jnp.int32)
        num_new = jnp.asarray([len(part) for part in new], jnp.int32)
        logits, self.cache, ok = _step(self.model, self.params, self.cache, padded, num_new)
        assert ok
        end = 0
        for rows, part in zip(self.rows, new, strict=True):
            rows.append(np.asarray(logits[end : end + len(part)]))
            end += len(part)

    def prefill(self, texts: Sequence[Sequence[int]]) -> None:
        """Prefills in steps with chunks of several prompts, split anywhere."""
        left = [list(text) for text in texts]
        while any(left):
            new, room = [], PREFILL_CHUNK
            for text in left:
                count = min(len(text), room, PREFILL_CHUNK // 2 + 1)
                new.append(text[:count])
                del text[:count]
                room -= count
            self.step(new, PREFILL_CHUNK)

    def decode(self, tokens: Sequence[int]) -> None:
        self.step([[token] for token in tokens], len(tokens))

    def logits(self) -> list[np.ndarray]:
        """Logits f32[length, vocab] of each sequence."""
        return [np.concatenate(rows) for rows in self.rows]


def our_logits(
    loaded: LoadedModel, kind: str, texts: Sequence[Sequence[int]], decode: int = DECODE_STEPS
) -> list[np.ndarray]:
    """Logits f32[length, vocab] of each text, with the last ``decode`` tokens one by one."""
    run = Run(loaded, kind, len(texts))
    run.prefill([text[: len(text) - decode] for text in texts])
    for i in range(-decode, 0):
        run.decode([text[i] for text in texts])
    return run.logits()


def greedy_by_steps(loaded: LoadedModel, kind: str, starts: Sequence[Sequence[int]]) -> list[list[int]]:
    """``GREEDY_STEPS`` tokens after each prompt by argmax of the logits; compiles nothing more."""
    run = Run(loaded, kind, len(starts))
    run.prefill(starts)
    tokens: list[list[int]] = [[] for _ in starts]
    while len(tokens[0]) < GREEDY_STEPS:
        for mine, rows in zip(tokens, run.rows, strict=True):
            mine.append(int([row for part in rows for row in part][-1].argmax()))
        run.decode([mine[-1] for mine in tokens])
    return tokens


def our_greedy(loaded: LoadedModel, kind: str, starts: Sequence[Sequence[int]]) -> list[list[int]]:
    """``GREEDY_STEPS`` tokens after each prompt, by ``jaxpaged.generate``."""
    result, _ = generate(
        loaded.function,
        loaded.params,
        empty_cache(loaded.config, kind, len(starts)),
        starts,
        max_new_tokens=GREEDY_STEPS,
        batch_size=PREFILL_CHUNK,
    )
    return np.asarray(result.tokens)[:, :GREEDY_STEPS].tolist()


# --- Files -------------------------------------------------------------------------------------------------


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes as, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(rest)) for b in range(256)]


def vocabulary() -> tuple[list[str], list[str]]:
    """(300 tokens, merges): bytes, 43 pairs, and an end of text."""
    pairs = [(a, b) for a in "\u0120theando" for b in "theandisr"][:43]
    tokens = [*byte_alphabet(), *dict.fromkeys(a + b for a, b in pairs)]
    tokens += [f"<|unused{i}|>" for i in range(VOCAB_SIZE - 1 - len(tokens))]
    return [*tokens, "<|endoftext|>"], [f"{a} {b}" for a, b in pairs]


def save_folder(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """A Hugging Face folder: ``save_pretrained`` and a tokenizer."""
    model.save_pretrained(folder)
    tokens, merges = vocabulary()
    bpe = tokenizers.models.BPE(
        vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges]
    )
    library = tokenizers.Tokenizer(bpe)
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


GGUF_ARCHITECTURES = {
    "mistral": "llama",
    "gemma3_text": "gemma3",
    "olmo3": "olmo2",
    "ministral3": "mistral3",
    "cohere": "command-r",
}
"""GGUF's architecture of each ``model_type``, where the names differ."""
_LLAMAS = ("llama", "mistral", "smollm3", "granite", "ministral3", "arcee")
"""Model types that llama.cpp converts as Llama: with interleaved rows of queries and keys."""
_LESS_ONE = ("gemma", "gemma2", "gemma3_text")
"""Model types whose norms are stored less 1, to which llama.cpp's converter adds it."""


def architecture_of(model: transformers.PreTrainedModel) -> str:
    """GGUF's architecture of the model."""
    return GGUF_ARCHITECTURES.get(model.config.model_type, model.config.model_type)


def gguf_name(model: transformers.PreTrainedModel, name: str) -> str:
    """GGUF's name of the weight that transformers calls ``name``, as llama.cpp's converter finds it."""
    architecture = architecture_of(model)
    arch = next(one for one, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Interleaves the two halves of each head, as in llama's GGUF files."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _heads(model: transformers.PreTrainedModel, name: str) -> int:
    """Number of heads with interleaved rows in the file's weight; 0 if the rows are in order."""
    if model.config.model_type not in _LLAMAS:
        return 0
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    return heads.get(name.split(".")[-2], 0)


def write_gguf(model: transformers.PreTrainedModel, path: Path, quantization: str = "F32") -> dict[str, Any]:
    """Writes the model as llama.cpp's convert_hf_to_gguf.py does, with the ``gguf`` package alone.

    Returns:
      The weights as they stand in the file, dequantized, under transformers' names.
    """
    c = model.config
    writer = gguf.GGUFWriter(path, architecture_of(model))
    _write_config(writer, c)
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    types = [gguf.TokenType.CONTROL if t.startswith("<|") else gguf.TokenType.NORMAL for t in tokens]
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_bos_token_id(len(tokens) - 1)
    kind = gguf.GGMLQuantizationType[quantization]
    in_file = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        weight = tensor.numpy()
        heads = _heads(model, name)
        stored = _interleaved(weight, heads) if heads else weight
        if c.model_type in _LESS_ONE and name.endswith("norm.weight"):
            stored = weight + np.float32(1)
        type_ = gguf.GGMLQuantizationType.F32 if weight.ndim == 1 else kind
        data = gguf.quantize(stored, type_)
        writer.add_tensor(gguf_name(model, name), data, raw_dtype=type_)
        # Interleaving moves whole rows and blocks are parts of rows: the order of the two operations is irrelevant.
        in_file[name] = torch.tensor(gguf.dequantize(gguf.quantize(weight, type_), type_))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return in_file


def _write_config(writer: gguf.GGUFWriter, c: Any) -> None:
    """The keys of a model's configuration, and tensors that follow from it."""
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    if c.model_type != "granite":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if c.model_type in ("cohere", "cohere2"):
        writer.add_layer_norm_eps(c.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if c.model_type == "gemma":
        return
    if c.model_type == "gemma2":  # no rotary embedding and no pattern: the architecture has them
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
        writer.add_sliding_window(c.sliding_window)
        return
    ropes = c.rope_parameters
    rope = ropes.get("full_attention", ropes)
    if c.model_type == "gemma3_text":
        if c.final_logit_softcapping:
            writer.add_final_logit_softcapping(c.final_logit_softcapping)
        writer.add_sliding_window(c.sliding_window)
    elif c.model_type == "cohere2":
        writer.add_logit_scale(c.logit_scale)
        writer.add_sliding_window(c.sliding_window)
        writer.add_vocab_size(c.vocab_size)
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    elif c.model_type == "cohere":
        writer.add_logit_scale(c.logit_scale)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    elif c.model_type == "glm4":
        writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
    elif c.model_type == "phi3":
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
        writer.add_sliding_window(c.sliding_window or 0)
    else:
        writer.add_rope_dimension_count(head_dim)
        writer.add_vocab_size(c.vocab_size)
        _write_windows(writer, c)
    if c.model_type == "granite":
        writer.add_attention_scale(c.attention_multiplier)
        writer.add_embedding_scale(c.embedding_multiplier)
        writer.add_residual_scale(c.residual_multiplier)
        writer.add_logit_scale(c.logits_scaling)
    if c.model_type == "ministral3":
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    _write_rope(writer, rope, head_dim, c.max_position_embeddings)
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])


def _write_windows(writer: gguf.GGUFWriter, c: Any) -> None:
    types = getattr(c, "layer_types", None)
    if getattr(c, "sliding_window", None) and "sliding_attention" in (types or ["sliding_attention"]):
        writer.add_sliding_window(c.sliding_window)
        if types is not None:
            writer.add_sliding_window_pattern([t == "sliding_attention" for t in types])


def read_gguf(model: transformers.PreTrainedModel, path: Path) -> dict[str, Any]:
    """The weights of a file with float32 weights as ``write_gguf`` returns them, read by the ``gguf`` package."""
    in_file = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    weights = {}
    for name in model.state_dict():
        weight = in_file[gguf_name(model, name)]
        if heads := _heads(model, name):
            pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        weights[name] = torch.tensor(weight)
    return weights


def _write_rope(writer: gguf.GGUFWriter, rope: dict[str, Any], head_dim: int, context: int) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "attention_factor" in rope:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
    elif kind == "longrope":
        original = rope["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        scale = context / original
        own = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(own)
        for name in ("long", "short"):
            factors = np.array(rope[f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)
    elif kind == "llama3":
        # Llama 3.1's rule becomes a tensor of the divisors of frequencies.
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        context, factors = rope["original_max_position_embeddings"], []
        for i in range(0, head_dim, 2):
            wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
            if wavelength < context / high:
                factors.append(1.0)
            elif wavelength > context / low:
                factors.append(rope["factor"])
            else:
                smooth = (context / wavelength - low) / (high - low)
                factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))


def with_weights(
    model: transformers.PreTrainedModel, weights: dict[str, Any]
) -> transformers.PreTrainedModel:
    """A copy of the model with other weights."""
    other = transformers.AutoModelForCausalLM.from_config(
        model.config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    other.tie_weights()
    return other


class _GeluOfATable(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def with_gelu_of_a_table(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A copy of the model whose GELU is that of llama.cpp's CPU kernels: a table of float16, by float16."""
    other = with_weights(model, model.state_dict())
    for layer in other.model.layers:
        layer.mlp.act_fn = _GeluOfATable()
    return other


def _rounded(x: np.ndarray, weight_type: str) -> np.ndarray:
    """Rounds activations as llama.cpp's kernels do before a product with such weights."""
    if not (weight_type.endswith("_K") or weight_type == "IQ4_XS"):
        q8_0 = gguf.GGMLQuantizationType.Q8_0
        return gguf.dequantize(gguf.quantize(x.reshape(-1, x.shape[-1]), q8_0), q8_0).reshape(x.shape)
    # Q8_K: bytes with a scale in float32. The gguf package does not write it.
    blocks = x.reshape(-1, 256)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    inverse = np.float32(-127) / largest
    return (np.minimum(np.rint(inverse * blocks), 127) * (1 / inverse)).reshape(x.shape)


def rounding_activations(
    model: transformers.PreTrainedModel, types: dict[str, str]
) -> transformers.PreTrainedModel:
    """The model with the input of each linear layer rounded, as in llama.cpp's CPU kernels.

    They multiply whole numbers: a row of activations is quantized before a product with quantized weights, to Q8_K
    (blocks of 256) for K-quants and IQ4_XS, to Q8_0 (blocks of 32) for the others. Beside Q4_1 and Q5_1 they keep
    sums in float16 too, which is not imitated here.

    Args:
      types: of each weight in the file, by transformers' names.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            kind = types[f"{name}.weight"]
            module.register_forward_pre_hook(
                lambda _, arguments, kind=kind: (torch.tensor(_rounded(arguments[0].numpy(), kind)),)
            )
    return model
