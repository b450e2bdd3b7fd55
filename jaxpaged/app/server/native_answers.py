"""Responses in llama-server's format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpaged.app.server.answering import Answer
from jaxpaged.app.server.generation import Choice, Generation, Update, gathered
from jaxpaged.app.server.native_schema import NativeRequest
from jaxpaged.app.server.sampling_schema import DEFAULT_SAMPLERS, breakers_of
from jaxpaged.app.server.state import ServedModel, ServerState
from jaxpaged.engine.request import EngineRequest, TokenLogprobs
from jaxpaged.generation.sampling_params import RANGES

_SMALLEST = -1e30
"""Stands for -inf, which JSON does not have, as in llama-server."""
_NOT_SERVED: dict[str, Any] = {
    "adaptive_target": -1.0,
    "adaptive_decay": 0.9,
    "min_keep": 0,
    "grammar": "",
    "lora": [],
    "post_sampling_probs": False,
}
"""Settings that are not supported, with values that mean off; clients read them."""


def settings(
    request: EngineRequest, *, breakers: Sequence[str] = (), stops: Sequence[str] = (), stream: bool = False
) -> dict[str, Any]:
    """``generation_settings``: sampling parameters under llama-server's names."""
    limit = -1 if request.max_new_tokens is None else request.max_new_tokens
    return {
        "n_predict": limit,
        "max_tokens": limit,
        "seed": request.seed,
        **{name: getattr(request, name) for name in RANGES},
        "dry_sequence_breakers": list(breakers),
        "stop": list(stops),
        "n_keep": request.n_keep,
        "n_discard": request.n_discard,
        "ignore_eos": not request.stop_ids,
        "stream": stream,
        # null stands for -inf, as in llama-server
        "logit_bias": [
            {"token": token, "bias": bias if math.isfinite(bias) else None}
            for token, bias in request.logit_bias.items()
        ],
        "n_probs": request.num_logprobs or 0,
        "samplers": list(DEFAULT_SAMPLERS),
        **_NOT_SERVED,
    }


@dataclass
class NativeAnswer(Answer):
    """Responses to a ``/completion`` request."""

    state: ServerState
    model: ServedModel
    generation: Generation
    body: NativeRequest

    def whole(self, updates: Sequence[Update]) -> Any:
        """The response: an object, or a list if there are several choices."""
        parts = gathered(self.generation.choices, updates)
        answers = [
            self._final(choice, part.text, part.tokens if self.body.return_tokens else [], part.logprobs)
            for choice, part in zip(self.generation.choices, parts, strict=True)
        ]
        return answers[0] if len(answers) == 1 else answers

    def chunks(self, update: Update) -> Iterator[dict[str, Any]]:
        choice, part = update.choice, update.part
        if part.text or part.tokens:
            chunk: dict[str, Any] = {
                "index": choice.index,
                "content": part.text,
                "tokens": part.tokens,
                "stop": False,
                "id_slot": choice.slot,
                "tokens_predicted": choice.num_tokens,
                "tokens_evaluated": choice.num_prompt,
            }
            if part.logprobs:
                chunk["completion_probabilities"] = [self._entry(entry) for entry in part.logprobs]
            if self.body.timings_per_token:
                chunk["timings"] = choice.timings()
            yield chunk
        if choice.stop_type is not None:
            yield self._final(choice, "", [], [])

    def _final(
        self, choice: Choice, content: str, tokens: list[int], logprobs: list[TokenLogprobs]
    ) -> dict[str, Any]:
        request = self.generation.requests[choice.prompt]
        decode = self.model.tokenizer.decode
        answer: dict[str, Any] = {
            "index": choice.index,
            "content": content,
            "tokens": tokens,
            "id_slot": choice.slot,
            "stop": True,
            "model": self.model.names[0],
            "tokens_predicted": choice.num_tokens,
            "tokens_evaluated": choice.num_prompt,
            "generation_settings": settings(
                request,
                breakers=breakers_of(self.body, self.state.options),
                stops=self.body.stops,
                stream=self.body.stream,
            ),
            "prompt": decode(request.prompt, skip_special=False),
            "has_new_line": choice.has_new_line,
            "truncated": choice.truncated,
            "stop_type": choice.stop_type,
            "stopping_word": choice.stopped_by or "",
            "tokens_cached": choice.num_cached,
            "timings": choice.timings(),
        }
        if logprobs:
            answer["completion_probabilities"] = [self._entry(entry) for entry in logprobs]
        return _chosen(answer, self.body.response_fields) if self.body.response_fields else answer

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(token, value) for token, value in entry.top]
        return self._token(entry.token, entry.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.model.tokenizer.token_bytes(token)
        return {
            "id": token,
            "token": data.decode(errors="replace"),
            "bytes": list(data),
            "logprob": max(float(logprob), _SMALLEST),
        }


def _chosen(answer: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The requested fields that exist; ``a/b`` is field b of a."""
    chosen = {}
    for path in fields:
        value: Any = answer
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            chosen[path] = value
    return chosen
