"""jaxpaged_model: Flax transformers that run on jaxpaged's cache, from GGUF and Hugging Face checkpoints.

Names are imported when they are first used, so that ``import jaxpaged_model`` does not import JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxpaged_model.checkpoint.export import write_gguf
    from jaxpaged_model.checkpoint.loading import LoadedModel, load_model, read_config
    from jaxpaged_model.config import ModelConfig
    from jaxpaged_model.llama import Llama, functional, random_params
    from jaxpaged_model.metadata import ModelError
    from jaxpaged_model.text.chat import ChatTemplateError, render_chat
    from jaxpaged_model.text.tokenizer import Tokenizer

__all__ = [
    "ChatTemplateError",
    "Llama",
    "LoadedModel",
    "ModelConfig",
    "ModelError",
    "Tokenizer",
    "functional",
    "load_model",
    "random_params",
    "read_config",
    "render_chat",
    "write_gguf",
]

_MODULES = {
    "checkpoint.export": ("write_gguf",),
    "checkpoint.loading": ("LoadedModel", "load_model", "read_config"),
    "config": ("ModelConfig",),
    "llama": ("Llama", "functional", "random_params"),
    "metadata": ("ModelError",),
    "text.chat": ("ChatTemplateError", "render_chat"),
    "text.tokenizer": ("Tokenizer",),
}

if not TYPE_CHECKING:  # a type checker would take this for a module that has every name

    def __getattr__(name: str) -> Any:
        for module, names in _MODULES.items():
            if name in names:
                try:
                    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
                except ModuleNotFoundError as error:
                    if (error.name or "jaxpaged").startswith("jaxpaged"):
                        raise
                    needs = f"jaxpaged_model needs the package {error.name!r}: pip install 'jaxpaged[model]'"
                    raise ModuleNotFoundError(needs, name=error.name) from None
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
