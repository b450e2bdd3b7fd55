"""``load_model``: loads configuration, params and tokenizer of a GGUF file or a Hugging Face folder."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import gguf
import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxpaged.generation.loop import LimitVocab
from jaxpaged.sharding.mesh import TENSOR
from jaxpaged_model.checkpoint.fingerprint import fingerprint
from jaxpaged_model.checkpoint.gguf_config import ROPE_FACTORS, config_from_gguf
from jaxpaged_model.checkpoint.gguf_file import GGUFFile
from jaxpaged_model.checkpoint.huggingface_config import config_from_huggingface
from jaxpaged_model.checkpoint.pooling import Pooling, Reranker, pooling_of, reranker_of
from jaxpaged_model.checkpoint.safetensors_folder import SafetensorsFolder
from jaxpaged_model.checkpoint.shards import load_shards
from jaxpaged_model.checkpoint.tensor_view import tensor_view
from jaxpaged_model.checkpoint.weights import Naming, Progress, TensorSource, load_params, weight_plan
from jaxpaged_model.config import ModelConfig
from jaxpaged_model.llama import ModelFn, Params, float_dtype, functional
from jaxpaged_model.metadata import Metadata, ModelError
from jaxpaged_model.quantized import product
from jaxpaged_model.quantized.linear import WeightPlan
from jaxpaged_model.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
      config: its hyperparameters.
      params: its weights.
      function: the model, a pure function of ``params``; its logits are f32[R, vocab_size].
      exact_function: the same with exact products, see ``load_model``; equal to ``function`` if no
        weights are quantized.
      hidden_function: the same, but it returns hidden states behind the last norm, f32[R, hidden_size].
      tokenizer: its tokenizer.
      pooling: how its file makes an embedding of a text's hidden states; None = it does not say.
      reranker: its head that scores a document for a query, if it has one.
      path: its file or folder.
      size_bytes: size of the weight files.
      description: such as ``"llama 135M Q8_0"``.
      seconds: loading time by phase.
      skips_padding: True if its products skip rows of padding, so that steps of one size serve any
        number of tokens: stored weights on a CPU.
      fingerprint: 64 hexadecimal digits, see ``checkpoint.fingerprint``.
      mesh: the devices over which the model is sharded; None = one device. ``function`` is then the
        function of each of them, see ``jaxpaged.sharding.mesh``.
    """

    config: ModelConfig
    params: Params
    function: ModelFn
    exact_function: ModelFn
    hidden_function: ModelFn
    tokenizer: Tokenizer
    path: Path
    size_bytes: int
    description: str
    fingerprint: str
    seconds: Mapping[str, float]
    skips_padding: bool = False
    mesh: Mesh | None = None
    pooling: Pooling | None = None
    reranker: Reranker | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token ids, and of logits; the embedding may be padded to more rows (``config.vocab_size``)."""
        return self.tokenizer.vocab_size

    @property
    def local_config(self) -> ModelConfig:
        """Configuration of the part of the model that one device holds."""
        return self.config if self.mesh is None else self.config.shard(self.mesh.shape[TENSOR])


def read_config(path: str | Path) -> ModelConfig:
    """Reads the configuration of the model at ``path``, but no weights.

    Raises:
      ModelError: as ``load_model``.
    """
    return config_of(_open(Path(path)))


def config_of(source: GGUFFile | SafetensorsFolder) -> ModelConfig:
    """Reads the configuration of an open file or folder.

    Raises:
      ModelError: as ``load_model``.
    """
    if isinstance(source, SafetensorsFolder):
        with _naming(source.path / "config.json"):
            return config_from_huggingface(source.config)
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    factors = {name: source.read(name).astype("float32") for name in ROPE_FACTORS if name in shapes}
    with _naming(source.path):
        return config_from_gguf(source.metadata, shapes, factors)


Weights = Literal["auto", "stored", "dequantized"]


def load_model(
    path: str | Path,
    *,
    dtype: DTypeLike = "f32",
    weights: Weights = "auto",
    exact: bool = False,
    context_length: int | None = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
) -> LoadedModel:
    """Loads a language model.

    Args:
      path: a GGUF file (of a split model the first part), or a folder with ``config.json``, safetensors
        and a tokenizer.
      dtype: dtype of computations and of dense weights: "f32", "bf16", "f16", or the same by numpy's or
        JAX's name.
      weights: "stored": weights stay in memory as in the file, on CPUs with numba of any type, elsewhere
        of a quantized one; "dequantized": all weights are converted to ``dtype``, and ``function`` has
        gradients; "auto": stored if a kernel reads them, which is on CPUs with numba.
      exact: True for float32 activations in products with quantized weights. Otherwise the CPU kernel
        rounds them to 16-bit integers with a scale for each 32: about twice as fast, error below 1e-4.
      context_length: positions that will be used, at most; None = all that the model has. It decides
        which factors a model with LongRoPE has, see ``RopeScaling``, and changes no other one.
      progress: called with (bytes done, total bytes) after each tensor.
      mesh: devices over which to shard the model (``jaxpaged.sharding.mesh.make_mesh``); each process
        reads its own parts.

    Raises:
      MeshError: the model's heads cannot be split over the mesh's devices.
      ModelError: the file is missing or damaged, or its model is not supported; one line.
      ValueError: another ``weights`` or ``dtype``.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be one of {', '.join(get_args(Weights))}, got {weights!r}")
    dtype = float_dtype(dtype)
    stored = weights == "stored" or (weights == "auto" and product.choose() == "cpu")
    clock = _Clock()
    source = _open(Path(path))
    naming: Naming = "huggingface" if isinstance(source, SafetensorsFolder) else "gguf"
    config = config_of(source)
    scaling = config.rope_scaling
    if context_length is not None and scaling is not None and scaling.kind == "longrope":
        config = replace(config, context_length=min(context_length, config.context_length))
    clock.lap("metadata")
    with _naming(source.path):
        if isinstance(source, SafetensorsFolder):
            tokenizer, kind = (
                Tokenizer.from_folder(source.path, num_rows=config.vocab_size),
                _most_bytes(source),
            )
        else:
            tokenizer, kind = Tokenizer.from_gguf(source.metadata), _file_type(source)
    clock.lap("tokenizer")
    tensors = tensor_view(config, source, naming)

    def planned(config: ModelConfig, source: TensorSource) -> WeightPlan:
        if not stored:
            return WeightPlan()
        return weight_plan(config, source, naming, exact=exact, layout=product.layout_for())

    if mesh is None:
        local, axis, plan = config, None, planned(config, tensors)
        product.prepare((kind for _, kind in plan.formats), exact=exact)
        params = load_params(config, tensors, naming, dtype=dtype, plan=plan, progress=progress)
    else:
        local, axis = config.shard(mesh.shape[TENSOR]), TENSOR
        params, plan = load_shards(
            config, tensors, naming, mesh, plan=planned, dtype=dtype, progress=progress
        )
    jax.block_until_ready(params)
    clock.lap("weights")

    def limited(plan: WeightPlan) -> ModelFn:
        function, num_tokens = functional(local, dtype, plan, axis), tokenizer.vocab_size
        return function if num_tokens == config.vocab_size else LimitVocab(function, num_tokens)

    return LoadedModel(
        config=config,
        params=params,
        function=limited(plan),
        exact_function=limited(plan.exactly()),
        hidden_function=functional(local, dtype, plan, axis, head=False),
        tokenizer=tokenizer,
        path=source.path,
        size_bytes=source.size_bytes,
        description=f"{config.architecture} {_rounded(config.num_parameters())} {kind}",
        fingerprint=fingerprint(config, source),
        seconds=clock.laps,
        skips_padding=bool(plan.formats) and product.choose() == "cpu",
        mesh=mesh,
        pooling=pooling_of(source),
        reranker=reranker_of(source),
    )


def _open(path: Path) -> GGUFFile | SafetensorsFolder:
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix in (".safetensors", ".bin", ".json"):
            raise ModelError(
                f"{path}: name a GGUF file, or the folder that holds config.json and the safetensors files"
            )
        return GGUFFile(path)
    if (path / "config.json").is_file():
        return SafetensorsFolder(path)
    files = sorted(path.glob("*.gguf"))
    hint = f"name the GGUF file: {files[0]}" if files else "a model folder or a GGUF file is needed"
    raise ModelError(f"{path}: has no config.json; {hint}")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the path before the message of a ModelError."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


class _Clock:
    """Durations of consecutive phases, in seconds."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends a phase."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def _file_type(file: GGUFFile) -> str:
    """Name of ``general.file_type`` ("Q4_K_M"), else the type of most bytes."""
    number = Metadata(file.metadata, file=str(file.path)).integer("general.file_type", None, least=0)
    if number in set(gguf.LlamaFileType):
        name = gguf.LlamaFileType(number).name
        if name != "GUESSED":
            return name.removeprefix("MOSTLY_").removeprefix("ALL_")
    return _most_bytes(file)


def _most_bytes(source: TensorSource) -> str:
    """The type of most bytes of the weights."""
    types: Counter[str] = Counter()
    for tensor in source.tensors.values():
        types[tensor.dtype] += tensor.num_bytes
    return types.most_common(1)[0][0]


def _rounded(number: int) -> str:
    """A number as in names of models: 135M, 1.1B."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            short = number / size
            return f"{short:.1f}{letter}" if short < 10 else f"{short:.0f}{letter}"
    return str(number)
