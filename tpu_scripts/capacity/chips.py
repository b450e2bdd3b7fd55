"""Memory of a replica and time of a step, calculated from data sheets, the model's shape, and a roofline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from jaxpaged_model.checkpoint.huggingface_config import config_from_huggingface
from jaxpaged_model.checkpoint.loading import read_config
from jaxpaged_model.config import ModelConfig
from jaxpaged_model.metadata import ModelError

from jaxpaged import PagedKVCache
from jaxpaged.pages.formats import LANES
from tpu_scripts.bench.models import MODEL_SHAPES
from tpu_scripts.common import number, option

_GB, _GIB = 10**9, 2**30
SHARE = number(0.01, 1)
"""Parser of shares."""


@dataclass(frozen=True)
class Chip:
    """Data sheet of one chip."""

    name: str
    platform: str
    hbm: float
    """Bytes of memory."""
    bandwidth: float
    """Bytes per second of its memory."""
    flops: float
    """bfloat16 operations per second, dense."""
    links: float
    """Bytes per second to other chips, both directions and all links together."""
    most_linked: int
    """Chips that reach each other at that speed."""
    devices: int = 1
    """JAX devices per chip; each has its share of everything above."""


# TPUs: the specification tables of cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x; HBM is in GB or GiB as in
# the newest of them; where two pages differ the newest is taken. /tpu7x says that programs see a chip as two devices,
# one per chiplet. GPUs: NVIDIA's data sheets of H100 and H200, the SXM boards; 989 teraFLOPS are
# without sparsity (the sheets' 1,979 are with it), and 8 GPUs share an NVLink switch in HGX boards.
_CHIPS = (
    Chip("v5e", "tpu", 16 * _GB, 819e9, 197e12, 400e9, 256),
    Chip("v6e", "tpu", 32 * _GIB, 1638e9, 918e12, 800e9, 256),
    Chip("v5p", "tpu", 95 * _GIB, 2765e9, 459e12, 1200e9, 6144),
    Chip("tpu7x", "tpu", 192 * _GIB, 7380e9, 2307e12, 1200e9, 9216, devices=2),
    Chip("h100", "gpu", 80 * _GB, 3350e9, 989e12, 900e9, 8),
    Chip("h200", "gpu", 141 * _GB, 4800e9, 989e12, 900e9, 8),
)
CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in _CHIPS}

_LLAMA_8B = replace(MODEL_SHAPES["Llama-3-8B"], name="llama-3.1-8b", context_length=131072)
_WIDER = {"hidden_size": 8192, "intermediate_size": 28672, "num_layers": 80, "num_q_heads": 64}
_MODELS = (
    _LLAMA_8B,
    replace(_LLAMA_8B, name="llama-3.1-70b", **_WIDER),
    replace(MODEL_SHAPES["Qwen3-8B"], name="qwen3-8b"),
    replace(MODEL_SHAPES["SmolLM2-135M"], name="smollm2-135m"),
)
MODELS: Mapping[str, ModelConfig] = {model.name: model for model in _MODELS}


def model_shape(name: str) -> ModelConfig:
    """Reads the shape of a model: a name of ``MODELS``, a GGUF file, a Hugging Face folder or a ``config.json``.

    Raises:
      ModelError: there is no such model, or it is not supported; one line.
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name)
    if not path.exists():
        raise ModelError(f"unknown model {name!r}: no such file, and known shapes are {', '.join(MODELS)}")
    if path.suffix != ".json":
        return replace(read_config(path), name=path.name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: an object is needed")
    try:
        return replace(config_from_huggingface(values), name=str(path))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def page_bytes(
    config: ModelConfig, chip: Chip, *, k_format: str, v_format: str, page_size: int, slots: int
) -> tuple[int, int]:
    """``(bytes of a page, bytes of residual pages)`` of one device, as the real cache has them there.

    Args:
      config: one device's share of the model (``ModelConfig.shard``).
      chip: decides the layout of pages.
      k_format, v_format: names of page formats.
      page_size: tokens of a page.
      slots: sequences; residual formats have a residual page for each.

    Raises:
      ValueError: a format does not fit the model's heads.
    """
    lanes = chip.platform == "tpu" and page_size * config.head_dim >= LANES
    # Shapes alone: nothing is allocated.
    cache = jax.eval_shape(
        lambda: PagedKVCache.create(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_pages=1,
            max_seqs=slots,
            page_size=page_size,
            max_seq_len=1,
            k_dtype=k_format,
            v_dtype=v_format,
            layout="lanes" if lanes else "plain",
        )
    )
    return cache.bytes_per_page, cache.bytes_of_staging


@dataclass(frozen=True)
class Assumptions:
    """Numbers that no data sheet has. The defaults are round numbers, measured nowhere."""

    memory_efficiency: float = option(
        "--memory-efficiency", "share of the memory bandwidth that a step reaches", SHARE, "0.7"
    )
    compute_efficiency: float = option(
        "--compute-efficiency", "share of the peak operations that a step reaches", SHARE, "0.5"
    )
    # A ring on a torus does not use all links.
    link_efficiency: float = option(
        "--link-efficiency", "share of the links' bandwidth that an all-reduce reaches", SHARE, "0.5"
    )
    reduce_seconds: float = option(
        "--reduce-us", "microseconds of an all-reduce of nothing", number(0, 1e6, 1e-6), "5"
    )
    host_seconds: float = option(
        "--host-ms",
        "milliseconds of the host per scheduling, in which the device waits",
        number(0, 1e4, 1e-3),
        "1",
    )
    weight_bits: float = option(
        "--weight-bits",
        "bits per parameter; below 16 is hypothetical: this project keeps weights quantized on CPUs alone",
        number(1, 32),
        "16",
    )
    utilization: float = option(
        "--utilization",
        "share of the memory for weights and pages; the rest is for activations, logits and programs",
        SHARE,
        "0.9",
    )


@dataclass(frozen=True)
class StepTimes:
    """Seconds of the parts of a step on one device; the devices of a replica work in parallel."""

    weights: float
    """Reading every weight once."""
    kv_token: float
    """Reading keys and values of one token, all layers."""
    row: float
    """Operations of one token outside attention and head."""
    logits: float
    """Operations of the head for one token; the head is replicated."""
    pair: float
    """Operations of one query with one key, all layers."""
    reduce_row: float
    """Moving one token's share of all all-reduces."""
    reduce: float
    """Latency of the all-reduces of a step."""
    host: float
    """One scheduling on the host; the device waits."""

    def step(self, rows: int, logit_rows: int, read: float, pairs: float) -> float:
        """Seconds of one run of the model.

        Args:
          rows: tokens that the program was compiled for.
          logit_rows: rows with logits.
          read: tokens of keys and values that are read; a chunk of a prompt reads each once.
          pairs: queries times the keys that they see.
        """
        memory = self.weights + read * self.kv_token
        compute = rows * self.row + logit_rows * self.logits + pairs * self.pair
        return max(memory, compute) + rows * self.reduce_row + self.reduce


def step_times(
    config: ModelConfig, chip: Chip, tensor: int, token_bytes: float, given: Assumptions
) -> StepTimes:
    """The roofline of a model on ``tensor`` devices.

    Args:
      config: the whole model.
      chip: the chip that each device is, or is a part of.
      tensor: devices that split each layer; embedding, norms and head are replicated, as in
        ``jaxpaged_model.checkpoint.shards``.
      token_bytes: keys and values of one token on one device.
      given: efficiencies and so on.

    Raises:
      MeshError: the model cannot be split over so many devices.
    """
    local = config.shard(tensor)
    table = config.vocab_size * config.hidden_size
    embeddings = table * (1 if config.tie_embeddings else 2)
    in_layers = local.num_parameters() - embeddings - config.hidden_size
    # Few rows of the embedding are read; a tied one is also the head.
    read_each_step = in_layers + config.hidden_size + table
    bandwidth = chip.bandwidth / chip.devices * given.memory_efficiency
    flops = chip.flops / chip.devices * given.compute_efficiency
    # A ring sends 2 (tp - 1) / tp times the sum's bytes, in one direction: half of the data sheet's number.
    link = chip.links / chip.devices / 2 * given.link_efficiency
    reduces = 2 * config.num_layers if tensor > 1 else 0
    sent = 2 * (tensor - 1) / tensor * 2 * config.hidden_size  # bfloat16
    return StepTimes(
        weights=read_each_step * given.weight_bits / 8 / bandwidth,
        kv_token=token_bytes / bandwidth,
        row=2 * in_layers / flops,
        logits=2 * table / flops,
        pair=4 * local.num_q_heads * local.head_dim * config.num_layers / flops,
        reduce_row=reduces * sent / link,
        reduce=reduces * given.reduce_seconds,
        host=given.host_seconds,
    )


def weight_bytes(config: ModelConfig, tensor: int, weight_bits: float) -> float:
    """Bytes of weights on each of ``tensor`` devices."""
    return config.shard(tensor).num_parameters() * weight_bits / 8
