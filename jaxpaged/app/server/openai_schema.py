"""OpenAI's requests: ``/v1/completions`` and ``/v1/chat/completions``.

All of OpenAI's parameters are known. Unsupported ones are refused unless their value is neutral,
because clients send neutral values too; those that do not change the text are accepted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from jaxpaged.app.server.chat_schema import NamedTool, ReasoningFormat, TemplateFields
from jaxpaged.app.server.format_schema import Format, response_format
from jaxpaged.app.server.sampling_schema import (
    MAX_STOPS,
    Limit,
    SamplingFields,
    StopString,
    StrictModel,
    TokenId,
    refuse_empty_prompt,
)
from jaxpaged.engine.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_SAMPLES

MAX_PROMPTS = 128
_MAX_NAMES = 16

Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class StreamOptions(StrictModel):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class OpenAIFields(SamplingFields):
    """Parameters of both completion and chat requests."""

    # name -> its neutral values
    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: Annotated[str | None, Field(max_length=1024)] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_SAMPLES)] = None
    max_tokens: Limit | None = None
    n_predict: Limit | None = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=1e6, allow_inf_nan=False)] = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    logit_bias: Annotated[dict[str, Bias] | None, Field(max_length=MAX_LOGIT_BIAS)] = None
    stream: bool | None = None  # type: ignore[assignment]  # some clients send null for false
    stream_options: StreamOptions | None = None
    user: Annotated[str | None, Field(max_length=1024)] = None
    verbose: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> OpenAIFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.repeat_penalty is not None and self.repetition_penalty is not None:
            raise ValueError("repeat_penalty and repetition_penalty are one parameter; give one of them")
        for name, neutral in self.unserved.items():
            value = getattr(self, name)
            if not any(value == nothing and type(value) is type(nothing) for nothing in (None, *neutral)):
                allowed = " or ".join(map(repr, neutral))
                raise ValueError(f"{name} is not supported here" + (f", except {allowed}" if allowed else ""))
        self.repeat_penalty = self.repeat_penalty or self.repetition_penalty
        return self

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def biases(self) -> Iterable[tuple[str | int, float]]:
        return (self.logit_bias or {}).items()

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        limit = self.n_predict if self.max_tokens is None else self.max_tokens
        return None if limit is None or limit < 0 else limit

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(OpenAIFields):
    """``POST /v1/completions``."""

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {"suffix": ("",)}

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)
        ]
    )
    echo: bool | None = None
    logprobs: Logprobs | None = None
    best_of: Annotated[int | None, Field(ge=1, le=MAX_SAMPLES)] = None
    suffix: Any = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    _prompt_is_not_empty = field_validator("prompt", mode="before")(refuse_empty_prompt)

    @model_validator(mode="after")
    def _servable(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must equal n; request n samples with logprobs instead")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported: prompts have no log-probabilities")
        return self


class ChatRequest(OpenAIFields, TemplateFields):
    """``POST /v1/chat/completions``."""

    unserved: ClassVar[dict[str, tuple[Any, ...]]] = {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "verbosity": (),
        "moderation": (),
    }

    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    functions: Any = None
    function_call: Any = None
    response_format: dict[str, Any] | None = None
    modalities: Any = None
    service_tier: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    verbosity: Any = None
    moderation: Any = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_format: ReasoningFormat | None = None
    """Format of thoughts: none = a part of the content; else ``reasoning_content``."""
    reasoning_budget: Limit | None = None
    """Tokens of thoughts, at most; 0 = none, -1 = any number."""
    store: bool | None = None
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None,
        Field(max_length=_MAX_NAMES),
    ] = None
    safety_identifier: Annotated[str | None, Field(max_length=1024)] = None
    prompt_cache_key: Annotated[str | None, Field(max_length=1024)] = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    prompt_cache_options: None = None

    @model_validator(mode="after")
    def _servable(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.max_tokens is None:
            self.max_tokens = self.max_completion_tokens
        chosen = self.chosen_function
        if chosen is not None and chosen not in {tool.function.name for tool in self.tools or ()}:
            raise ValueError(f"tool_choice: none of the tools has the name {chosen!r}")
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice: required needs tools")
        return self

    def _formats(self) -> dict[str, Format | None]:
        return super()._formats() | {"response_format": response_format(self.response_format)}

    @property
    def chosen_function(self) -> str | None:
        """The function that the model must call."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
