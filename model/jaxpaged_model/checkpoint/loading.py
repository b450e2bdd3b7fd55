"""``load_model``: a GGUF file or a Hugging Face folder, as configuration, params and tokenizer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxpaged.generation.loop import LimitVocab
from jaxpaged.sharding.mesh import TENSOR
from jaxpaged_model.checkpoint.fingerprint import fingerprint
from jaxpaged_model.checkpoint.gguf_file import GGUFFile
from jaxpaged_model.checkpoint.read_config import config_from_gguf, config_from_huggingface
from jaxpaged_model.checkpoint.safetensors_folder import SafetensorsFolder
from jaxpaged_model.checkpoint.shards import load_shards
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
      config: its sizes and switches.
      params: its weights.
      function: the model, a pure function of ``params``.
      exact_function: the same with exact products, see ``load_model``; ``function`` itself where it has no others.
      tokenizer: its tokenizer.
      path: the file or folder it came from.
      size_bytes: bytes of the weight files.
      description: such as ``"llama 135M Q8_0"``.
      seconds: what loading took, by its parts.
      fingerprint: 64 hexadecimal digits that no other model has; see ``model.fingerprint``.
      mesh: the devices that it is spread over; None = one. ``function`` is then what each of them runs, see
        ``jaxpaged.sharding.mesh``.
    """

    config: ModelConfig
    params: Params
    function: ModelFn
    exact_function: ModelFn
    tokenizer: Tokenizer
    path: Path
    size_bytes: int
    description: str
    fingerprint: str
    seconds: Mapping[str, float]
    mesh: Mesh | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token ids, and of logits; ``config.vocab_size``, the rows of the embedding, may be larger."""
        return self.tokenizer.vocab_size

    @property
    def local_config(self) -> ModelConfig:
        """Configuration of the part of the model that one device holds."""
        return self.config if self.mesh is None else self.config.shard(self.mesh.shape[TENSOR])


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of the model that ``load_model(path)`` would load; no weight is read.

    Raises:
      ModelError: as ``load_model``.
    """
    path = _existing(Path(path))
    if path.is_dir():
        folder = SafetensorsFolder(_with_config(path))
        return _naming_the_file(path / "config.json", lambda: config_from_huggingface(folder.config))
    return read_gguf_config(GGUFFile(path))


Weights = Literal["auto", "stored", "dequantized"]


@dataclass(frozen=True)
class _Wanted:
    """How a model is to be in memory."""

    dtype: Any
    stored: bool
    exact: bool
    progress: Progress | None
    mesh: Mesh | None


def load_model(
    path: str | Path,
    *,
    dtype: DTypeLike = "f32",
    weights: Weights = "auto",
    exact: bool = False,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
) -> LoadedModel:
    """Loads a model of the Llama family.

    Args:
      path: a GGUF file (the first of its parts, when split), or a folder with ``config.json``, safetensors
        and a tokenizer.
      dtype: what the model computes in, and of the weights that are not quantized.
      weights: "stored": quantized weights of a GGUF file stay so in memory, and products read them there;
        "dequantized": all become ``dtype``; "auto": stored where a kernel reads them, which is on CPUs with numba.
      exact: products with stored weights take activations as they are. Else the CPU's take them as whole numbers of 16
        bits, with a scale for each 32 of them: about twice as fast, and off by less than 1e-4.
      progress: called with (bytes done, bytes in all) after each tensor.
      mesh: devices to spread the model over (``jaxpaged.sharding.mesh.make_mesh``); a process reads its own parts.

    Raises:
      MeshError: the model's heads cannot be dealt to the mesh's devices.
      ModelError: the file is missing or damaged, or its model is not supported; one line that says which.
      ValueError: ``weights`` is none of the three.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be one of {', '.join(get_args(Weights))}, got {weights!r}")
    path = _existing(Path(path))
    stored = weights == "stored" or (weights == "auto" and product.choose() == "cpu")
    load = _load_folder if path.is_dir() else _load_gguf
    return load(path, _Wanted(float_dtype(dtype), stored, exact, progress, mesh))


def _existing(path: Path) -> Path:
    """The path, if it may be a model."""
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    if path.is_file() and path.suffix in (".safetensors", ".bin", ".json"):
        raise ModelError(
            f"{path}: name a GGUF file, or the folder that holds config.json and the safetensors files"
        )
    return path


def _with_config(path: Path) -> Path:
    """The folder, if it has a configuration."""
    if (path / "config.json").is_file():
        return path
    files = sorted(p.name for p in path.glob("*.gguf"))
    hint = (
        f"; name the GGUF file: {path / files[0]}" if files else "; a model folder or a GGUF file is needed"
    )
    raise ModelError(f"{path}: has no config.json{hint}")


def read_gguf_config(file: GGUFFile) -> ModelConfig:
    """The configuration of an open GGUF file."""
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    factors = file.tensors.get("rope_freqs.weight")
    rope_factors = None if factors is None else file.read("rope_freqs.weight").astype("float32")
    return _naming_the_file(file.path, lambda: config_from_gguf(file.metadata, shapes, rope_factors))


def _load_gguf(path: Path, wanted: _Wanted) -> LoadedModel:
    clock = _Clock()
    file = GGUFFile(path)
    config = read_gguf_config(file)
    clock.lap("metadata")
    tokenizer = _naming_the_file(path, lambda: Tokenizer.from_gguf(file.metadata))
    clock.lap("tokenizer")
    return _with_weights(file, "gguf", config, tokenizer, _file_type(file), wanted, clock)


def _load_folder(path: Path, wanted: _Wanted) -> LoadedModel:
    clock = _Clock()
    folder = SafetensorsFolder(_with_config(path))
    config = _naming_the_file(path / "config.json", lambda: config_from_huggingface(folder.config))
    clock.lap("metadata")
    tokenizer = _naming_the_file(path, lambda: Tokenizer.from_folder(path, num_rows=config.vocab_size))
    clock.lap("tokenizer")
    kind = _commonest(folder)
    return _with_weights(folder, "huggingface", config, tokenizer, kind, wanted, clock)


def _with_weights(
    source: GGUFFile | SafetensorsFolder,
    naming: Naming,
    config: ModelConfig,
    tokenizer: Tokenizer,
    kind: str,
    wanted: _Wanted,
    clock: _Clock,
) -> LoadedModel:
    """Reads the weights, which is the last thing that is missing."""

    def planned(config: ModelConfig, source: TensorSource) -> WeightPlan:
        if naming != "gguf" or not wanted.stored:
            return WeightPlan()
        return weight_plan(config, source, naming, exact=wanted.exact, layout=product.layout_for())

    how: dict[str, Any] = {"dtype": wanted.dtype, "progress": wanted.progress}
    local, axis, mesh = config, None, wanted.mesh
    if mesh is None:
        plan = planned(config, source)
        params = load_params(config, source, naming, plan=plan, **how)
    else:
        local, axis = config.shard(mesh.shape[TENSOR]), TENSOR
        params, plan = load_shards(config, source, naming, mesh, plan=planned, **how)
    jax.block_until_ready(params)
    clock.lap("weights")

    def limited(plan: WeightPlan) -> ModelFn:
        function = functional(local, wanted.dtype, plan, axis)
        num_tokens = tokenizer.vocab_size
        return function if num_tokens == config.vocab_size else LimitVocab(function, num_tokens)

    return LoadedModel(
        config=config,
        params=params,
        function=limited(plan),
        exact_function=limited(plan.exactly()),
        tokenizer=tokenizer,
        path=source.path,
        size_bytes=source.size_bytes,
        description=_describe(config, kind),
        fingerprint=fingerprint(config, source),
        seconds=clock.laps,
        mesh=mesh,
    )


class _Clock:
    """Seconds of the parts of what is done, one after the other."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends a part."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def _naming_the_file(path: Path, read: Any) -> Any:
    try:
        return read()
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _file_type(file: GGUFFile) -> str:
    """``general.file_type`` in the words people use ("Q4_K_M"), else the type of most bytes."""
    number = Metadata(file.metadata, file=str(file.path)).integer("general.file_type", None, least=0)
    if number in set(gguf.LlamaFileType):
        name = gguf.LlamaFileType(number).name
        if name != "GUESSED":
            return name.removeprefix("MOSTLY_").removeprefix("ALL_")
    return _commonest(file)


def _commonest(source: TensorSource) -> str:
    types: Counter[str] = Counter()
    for tensor in source.tensors.values():
        types[tensor.dtype] += tensor.num_bytes
    return types.most_common(1)[0][0]


def _describe(config: ModelConfig, kind: str) -> str:
    return f"{config.architecture} {_count(config.num_parameters())} {kind}"


def _count(number: int) -> str:
    """135M, 1.1B: as model names have it."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            short = number / size
            return f"{short:.1f}{letter}" if short < 10 else f"{short:.0f}{letter}"
    return str(number)
