"""Parameters common to all generation requests, and their conversion for the engine."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any, ClassVar, Self

from jaxpaged_model.text.tokenizer import Tokenizer
from pydantic import BaseModel, ConfigDict, Field, model_validator

from jaxpaged.app.breakers import breaker_tokens
from jaxpaged.app.errors import say
from jaxpaged.app.sampling_options import SMALLEST_TOP_P
from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.format_schema import Format, Schema, StructuredOutputs, one_format
from jaxpaged.app.server.options import ServeOptions
from jaxpaged.engine.constraint import Constraint
from jaxpaged.engine.request import MAX_LOGIT_BIAS, MAX_SALT, MAX_STOP_IDS, EngineRequest

_INT32 = 2**31 - 1
DEFAULT_SAMPLERS = (
    "penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature",
)  # fmt: skip
"""The samplers, in the order of their application."""
MAX_STOPS = 16
MAX_STOP_LENGTH = 512

TokenId = Annotated[int, Field(ge=0, le=_INT32)]
Count = Annotated[int, Field(ge=0, le=_INT32)]
Limit = Annotated[int, Field(ge=-1, le=_INT32)]
"""Tokens to generate at most; -1 = as many as fit."""
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Number = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


class StrictModel(BaseModel):
    """Strict types and names: "5", 5.0 and true are not integers, and unknown names are errors."""

    model_config = ConfigDict(strict=True, extra="forbid")


def refuse_empty_prompt(prompt: Any) -> Any:
    """Refuses an empty list with a message of its own; a union of types would list all its members."""
    if isinstance(prompt, list) and (not prompt or [] in prompt):
        raise ValueError("prompt: an empty list; give a text, or a list of at least one token or text")
    return prompt


class SamplingFields(StrictModel):
    """Parameters of all generation requests; None = the server's default."""

    # name -> its neutral values; other values are not supported
    off: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n_indent": (0,),
        "min_keep": (0, 1),
        "adaptive_target": (-1,),
        "lora": ([],),
        "post_sampling_probs": (False,),
        "samplers": ([], list(DEFAULT_SAMPLERS)),
    }

    biases_by_text: ClassVar[bool] = False

    stream: bool = False
    temperature: Annotated[float | None, Field(ge=-1e6, le=1e6, allow_inf_nan=False)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=_INT32)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    typical_p: Annotated[float | None, Field(ge=0, le=1e6, allow_inf_nan=False)] = None
    top_n_sigma: Number | None = None
    xtc_probability: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    xtc_threshold: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    dynatemp_range: Number | None = None
    dynatemp_exponent: Number | None = None
    repeat_penalty: Annotated[float | None, Field(gt=0, le=1e6, allow_inf_nan=False)] = None
    repeat_last_n: Annotated[int | None, Field(ge=-1, le=_INT32)] = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    dry_multiplier: Number | None = None
    dry_base: Number | None = None
    dry_allowed_length: Count | None = None
    dry_penalty_last_n: Annotated[int | None, Field(ge=-1, le=_INT32)] = None
    dry_sequence_breakers: Annotated[list[str] | None, Field(max_length=64)] = None
    mirostat: Annotated[int | None, Field(ge=0, le=2)] = None
    mirostat_tau: Annotated[float | None, Field(ge=0, le=1e6, allow_inf_nan=False)] = None
    mirostat_eta: Annotated[float | None, Field(ge=0, le=1e6, allow_inf_nan=False)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), le=2**64 - 1)] = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId] | None, Field(max_length=MAX_STOP_IDS)] = None
    cache_salt: Annotated[str | None, Field(max_length=MAX_SALT)] = None
    cache_prompt: bool | None = None
    priority: Annotated[int, Field(ge=-_INT32, le=_INT32)] = 0
    n_keep: Annotated[int | None, Field(ge=-1, le=_INT32)] = None
    n_discard: Count = 0
    id_slot: Annotated[int, Field(ge=-1, le=_INT32)] = -1
    timings_per_token: bool = False
    grammar: str | None = None
    """The answer's grammar, in llama.cpp's notation."""
    json_schema: Schema | None = None
    structured_outputs: StructuredOutputs | None = None
    # Sent by llama-server's clients with every request: parameters of samplers that are off, and
    # hints.
    adaptive_decay: float | None = None
    n_cache_reuse: int | None = None
    sse_ping_interval: int | None = None
    return_progress: bool | None = None
    n_indent: Any = None
    min_keep: Any = None
    adaptive_target: Any = None
    lora: Any = None
    post_sampling_probs: Any = None
    samplers: Any = None

    @model_validator(mode="after")
    def _nothing_that_is_off(self) -> Self:
        for name, neutral in self.off.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                raise ValueError(f"{name} is not supported here")
        return self

    @model_validator(mode="after")
    def _one_format(self) -> Self:
        _ = self.format
        return self

    @property
    def format(self) -> Format | None:
        """Format of the answer, if the request asks for one."""
        return one_format(**self._formats())

    def _formats(self) -> dict[str, Format | None]:
        """Formats by the parameter that asks for them."""
        return {
            "grammar": ("gbnf", self.grammar) if self.grammar else None,
            "json_schema": None if self.json_schema is None else ("json", self.json_schema),
            "structured_outputs": self.structured_outputs.format if self.structured_outputs else None,
        }

    @property
    def samples(self) -> int:
        """Samples of each prompt."""
        return 1

    @property
    def limit(self) -> int | None:
        """Tokens to generate, at most; None = as many as fit."""
        return None

    @property
    def seconds(self) -> float | None:
        """Time limit: a sample with a line break ends at its first token after it."""
        return None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return ()

    @property
    def num_logprobs(self) -> int | None:
        """Log-probabilities per token, beside its own; None = not even that."""
        return None

    @property
    def biases(self) -> Iterable[tuple[str | int, float]]:
        """Logit biases by token id, or by text if ``biases_by_text``."""
        return ()


def engine_request(
    request_id: str,
    prompt: Sequence[int],
    fields: SamplingFields,
    options: ServeOptions,
    tokenizer: Tokenizer,
    *,
    seed: int,
    constraint: Constraint | None = None,
) -> EngineRequest:
    """Makes the engine's request.

    Raises:
      RefusedError: a value that the engine refuses.
      ApiError: a token outside the vocabulary.
    """
    sampling = {
        name: default if getattr(fields, name) is None else getattr(fields, name)
        for name, default in options.sampling_values().items()
    }
    sampling["top_p"] = max(sampling["top_p"], SMALLEST_TOP_P)
    if sampling["dry_base"] < 1:  # as in llama-server
        sampling["dry_base"] = options.dry_base
    breakers = breakers_of(fields, options) if sampling["dry_multiplier"] else ()
    logit_bias = _biases(fields, tokenizer)
    max_new_tokens = fields.limit
    ignore_eos = options.ignore_eos if fields.ignore_eos is None else fields.ignore_eos
    stop_ids = frozenset(fields.stop_token_ids or ()) | special_stops(fields.stops, tokenizer).keys()
    if ignore_eos:  # as in llama.cpp, end-of-text tokens are forbidden
        logit_bias = logit_bias | dict.fromkeys(tokenizer.stop_ids - stop_ids, float("-inf"))
    else:
        stop_ids |= tokenizer.stop_ids
    _check_tokens("stop_token_ids", stop_ids, tokenizer)
    _check_tokens("logit_bias", logit_bias, tokenizer)
    if max_new_tokens is None and options.predict >= 0:
        max_new_tokens = options.predict
    keep = options.keep if fields.n_keep is None else fields.n_keep
    begins = tokenizer.bos_id is not None and prompt[0] == tokenizer.bos_id
    if begins and options.log and len(prompt) > 1 and prompt[1] == tokenizer.bos_id:
        bos = tokenizer.token_bytes(prompt[0]).decode(errors="replace")
        say(
            f"warning: a prompt begins with two BOS tokens; leave {bos!r} out of the text, the tokenizer adds it"
        )
    return EngineRequest(
        request_id=request_id,
        prompt=tuple(prompt),
        max_new_tokens=max_new_tokens,
        n=fields.samples,
        **sampling,
        dry_breakers=breaker_tokens(breakers, tokenizer),
        seed=seed,
        stop_ids=stop_ids,
        logit_bias=logit_bias,
        constraint=constraint,
        num_logprobs=fields.num_logprobs,
        priority=fields.priority,
        cache_salt=fields.cache_salt or "",
        cache_prompt=fields.cache_prompt is not False and options.prefix_cache,
        # As in llama-server, BOS is kept in addition.
        n_keep=keep if keep < 0 else keep + begins,
        n_discard=fields.n_discard,
        slot=fields.id_slot if fields.id_slot >= 0 else None,
    )


def breakers_of(fields: SamplingFields, options: ServeOptions) -> Sequence[str]:
    """Sequence breakers of a request, which DRY looks for."""
    own = fields.dry_sequence_breakers
    return options.dry_sequence_breakers if own is None else own


def special_stops(stops: Iterable[str], tokenizer: Tokenizer) -> dict[int, str]:
    """Stop strings that are special tokens, which have no text to find them in, by id."""
    found = {}
    for stop in stops:
        ids = tokenizer.encode(stop, add_special=False, parse_special=True)
        hidden = len(ids) == 1 and not tokenizer.stream(at_start=False).push(ids[0])
        if hidden and tokenizer.token_bytes(ids[0]) == stop.encode():
            found[ids[0]] = stop
    return found


def seed_of(fields: SamplingFields, options: ServeOptions) -> int:
    """Seed of a request's first sample: random for -1 or, by default, no seed."""
    seed = fields.seed if fields.seed is not None else options.seed
    return secrets.randbits(32) if seed == -1 else seed % 2**32


def _biases(fields: SamplingFields, tokenizer: Tokenizer) -> dict[int, float]:
    """Logit biases by token id; that of a text goes to all its tokens.

    Raises:
      ApiError: an invalid key, or too many tokens.
    """
    bias: dict[int, float] = {}
    for name, value in fields.biases:
        if isinstance(name, int):
            bias[name] = value
        elif name.isascii() and name.isdecimal() and len(name) <= 10:
            bias[int(name)] = value
        elif fields.biases_by_text:
            bias.update(dict.fromkeys(tokenizer.encode(name, add_special=False), value))
        else:
            raise ApiError(400, "logit_bias: keys are token ids", param="logit_bias")
    if len(bias) > MAX_LOGIT_BIAS:
        raise ApiError(
            400,
            f"logit_bias names {len(bias)} tokens; at most {MAX_LOGIT_BIAS} are allowed",
            param="logit_bias",
        )
    return bias


def _check_tokens(name: str, tokens: Collection[int], tokenizer: Tokenizer) -> None:
    for token in tokens:
        if not 0 <= token < tokenizer.vocab_size:
            message = f"{name}: token {token} is outside the vocabulary of {tokenizer.vocab_size} tokens"
            raise ApiError(400, message, param=name)
