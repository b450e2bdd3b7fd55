"""llama-server's own requests: completion, tokenization, chat templates, slot files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, StringConstraints, field_validator, model_validator

from jaxpaged.app.server.chat_schema import TemplateFields
from jaxpaged.app.server.openai_schema import MAX_PROMPTS
from jaxpaged.app.server.sampling_schema import (
    MAX_STOP_LENGTH,
    MAX_STOPS,
    Limit,
    SamplingFields,
    StrictModel,
    TokenId,
    refuse_empty_prompt,
)
from jaxpaged.engine.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_SAMPLES

Mixed = list[str | TokenId]


class PromptObject(StrictModel):
    """A prompt in the form of llama-server's multimodal clients, without media."""

    prompt_string: str
    multimodal_data: Annotated[list[str] | None, Field(max_length=0)] = None


_Bias = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)] | bool


class NativeRequest(SamplingFields):
    """``POST /completion``."""

    biases_by_text: ClassVar[bool] = True

    prompt: (
        str
        | PromptObject
        | Annotated[Mixed, Field(min_length=1)]
        | Annotated[
            list[str | PromptObject | Annotated[Mixed, Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    )
    model: Annotated[str | None, Field(max_length=1024)] = None
    n_predict: Annotated[int | None, Field(ge=-2, le=2**31 - 1)] = None
    max_tokens: Limit | None = None
    n_cmpl: Annotated[int | None, Field(ge=1, le=MAX_SAMPLES)] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_SAMPLES)] = None
    stop: (
        Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
        | Annotated[list[Annotated[str, Field(max_length=MAX_STOP_LENGTH)]], Field(max_length=MAX_STOPS)]
        | None
    ) = None
    logit_bias: (
        Annotated[dict[str, _Bias], Field(max_length=MAX_LOGIT_BIAS)]
        | Annotated[
            list[Annotated[list[str | TokenId | _Bias], Field(min_length=2, max_length=2)]],
            Field(max_length=MAX_LOGIT_BIAS),
        ]
        | None
    ) = None
    n_probs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    return_tokens: bool = False
    t_max_predict_ms: Annotated[int, Field(ge=-1, le=2**31 - 1)] = 0
    response_fields: Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=64)] | None = (
        None
    )

    _prompt_is_not_empty = field_validator("prompt", mode="before")(refuse_empty_prompt)

    @model_validator(mode="after")
    def _servable(self) -> NativeRequest:
        for pair in self.logit_bias if isinstance(self.logit_bias, list) else ():
            if not isinstance(pair[0], int | str) or isinstance(pair[0], bool) or isinstance(pair[1], str):
                raise ValueError("logit_bias: each entry is [token or text, number or false]")
            if pair[1] is True:
                raise ValueError("logit_bias: true is not allowed; false forbids a token")
        if isinstance(self.logit_bias, dict) and True in (
            v for v in self.logit_bias.values() if isinstance(v, bool)
        ):
            raise ValueError("logit_bias: true is not allowed; false forbids a token")
        return self

    @property
    def prompts(self) -> list[Mixed]:
        """The prompts. A list of texts is several prompts; one with a token in it is one prompt."""
        several: Sequence[Any] = [self.prompt] if isinstance(self.prompt, str | PromptObject) else self.prompt
        if any(isinstance(part, int) for part in several):
            several = [several]
        texts = [part.prompt_string if isinstance(part, PromptObject) else part for part in several]
        return [[part] if isinstance(part, str) else part for part in texts]

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; empty ones are ignored, as in llama-server."""
        given = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return tuple(filter(None, given))

    @property
    def biases(self) -> list[tuple[str | int, float]]:
        """The biases; false forbids a token."""
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, dict) else self.logit_bias or ()
        return [(name, float("-inf") if value is False else float(value)) for name, value in pairs]  # type: ignore[misc]

    @property
    def limit(self) -> int | None:
        limit = self.n_predict if self.n_predict is not None else self.max_tokens
        return None if limit is None or limit < 0 else limit

    @property
    def seconds(self) -> float | None:
        return self.t_max_predict_ms / 1e3 if self.t_max_predict_ms > 0 else None

    @property
    def num_logprobs(self) -> int | None:
        return self.n_probs or None

    @property
    def samples(self) -> int:
        return self.n_cmpl or self.n or 1


class TokenizeRequest(StrictModel):
    """``POST /tokenize``."""

    content: str | Mixed = ""
    model: Annotated[str | None, Field(max_length=1024)] = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(StrictModel):
    """``POST /detokenize``."""

    tokens: list[TokenId] = Field(default_factory=list)
    model: Annotated[str | None, Field(max_length=1024)] = None


class TemplateRequest(TemplateFields):
    """``POST /apply-template``."""

    model: Annotated[str | None, Field(max_length=1024)] = None


class ModelName(StrictModel):
    """``POST /models/load`` and ``/models/unload``."""

    model: Annotated[str, Field(max_length=1024)]


class SlotFile(StrictModel):
    """``POST /slots/N``: a file name, not a path, in the folder of ``--slot-save-path``."""

    filename: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")] | None = None
