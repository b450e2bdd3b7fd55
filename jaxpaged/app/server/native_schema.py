"""llama-server's own requests: ``/completion``, ``/tokenize``, ``/detokenize``, ``/apply-template``, ``/slots``."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, StringConstraints, model_validator

from jaxpaged.app.server.openai_schema import MAX_PROMPTS, TemplateFields
from jaxpaged.app.server.sampling_schema import (
    MAX_STOP_LENGTH,
    MAX_STOPS,
    Count,
    SamplingFields,
    StrictModel,
    TokenId,
)
from jaxpaged.engine.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_SAMPLES

DEFAULT_SAMPLERS = ("penalties", "top_k", "top_p", "min_p", "temperature")
"""What there is, in the order it is applied in."""

Mixed = list[str | TokenId]
_Bias = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)] | bool


class NativeRequest(SamplingFields):
    """``POST /completion``."""

    # name -> the values that ask for nothing; anything else would change the text in a way that is not offered
    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {
        "dynatemp_range": (0,),
        "typical_p": (1,),
        "top_n_sigma": (-1, 0),
        "xtc_probability": (0,),
        "dry_multiplier": (0,),
        "mirostat": (0,),
        "n_indent": (0,),
        "min_keep": (0, 1),
        "grammar": ("",),
        "json_schema": (),
        "lora": ([],),
        "post_sampling_probs": (False,),
        "return_progress": (False,),
        "samplers": ([], list(DEFAULT_SAMPLERS)),
    }

    prompt: (
        str
        | Annotated[Mixed, Field(min_length=1)]
        | Annotated[
            list[str | Annotated[Mixed, Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)
        ]
    )
    model: Annotated[str | None, Field(max_length=1024)] = None
    n_predict: Annotated[int | None, Field(ge=-2, le=2**31 - 1)] = None
    max_tokens: Count | None = None
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
    # Settings of what is off, and hints: llama.cpp's clients send them always.
    dynatemp_exponent: float | None = None
    xtc_threshold: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: Annotated[list[str] | None, Field(max_length=64)] = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    n_cache_reuse: int | None = None
    sse_ping_interval: int | None = None
    dynatemp_range: Any = None
    typical_p: Any = None
    top_n_sigma: Any = None
    xtc_probability: Any = None
    dry_multiplier: Any = None
    mirostat: Any = None
    n_indent: Any = None
    min_keep: Any = None
    grammar: Any = None
    json_schema: Any = None
    lora: Any = None
    post_sampling_probs: Any = None
    return_progress: Any = None
    samplers: Any = None

    @model_validator(mode="after")
    def _servable(self) -> NativeRequest:
        for name, neutral in self.unserved.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                raise ValueError(f"{name} is not supported here")
        for pair in self.logit_bias if isinstance(self.logit_bias, list) else ():
            if not isinstance(pair[0], int | str) or isinstance(pair[0], bool) or isinstance(pair[1], str):
                raise ValueError("logit_bias: each entry is [token or text, number or false]")
            if pair[1] is True:
                raise ValueError("logit_bias: true means nothing; false forbids a token")
        if isinstance(self.logit_bias, dict) and True in (
            v for v in self.logit_bias.values() if isinstance(v, bool)
        ):
            raise ValueError("logit_bias: true means nothing; false forbids a token")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; empty ones, which llama-server passes over too, left out."""
        given = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return tuple(filter(None, given))

    @property
    def biases(self) -> list[tuple[str | int, float]]:
        """The biases; false forbids a token."""
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, dict) else self.logit_bias or ()
        return [(name, float("-inf") if value is False else float(value)) for name, value in pairs]  # type: ignore[misc]

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most; None = as many as fit."""
        limit = self.n_predict if self.n_predict is not None else self.max_tokens
        return None if limit is None or limit < 0 else limit

    @property
    def samples(self) -> int:
        """Samples of each prompt."""
        return self.n_cmpl or self.n or 1


class TokenizeRequest(StrictModel):
    """``POST /tokenize``."""

    content: str | Mixed = ""
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(StrictModel):
    """``POST /detokenize``."""

    tokens: list[TokenId] = Field(default_factory=list)


class TemplateRequest(TemplateFields):
    """``POST /apply-template``."""

    model: Annotated[str | None, Field(max_length=1024)] = None


class SlotFile(StrictModel):
    """The body of saving and restoring a slot: a name in the folder of ``--slot-save-path``, and no path."""

    filename: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")]
