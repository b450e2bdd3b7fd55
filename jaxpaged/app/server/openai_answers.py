"""Responses in OpenAI's formats, whole and in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxpaged.app.server.answering import Answer
from jaxpaged.app.server.blocks import Block, BlockEvent, ChatText, finish_reason
from jaxpaged.app.server.generation import Choice, Generation, Update, gathered
from jaxpaged.app.server.native_answers import settings
from jaxpaged.app.server.openai_schema import OpenAIFields
from jaxpaged.app.server.state import ServedModel, ServerState
from jaxpaged.app.server.text import TextPart
from jaxpaged.engine.request import TokenLogprobs

_FORBIDDEN = -9999.0
"""Stands for -inf, which JSON does not have, as in OpenAI's API."""


@dataclass
class OpenAIAnswer(Answer):
    """Common part of completion and chat responses."""

    state: ServerState
    model: ServedModel
    generation: Generation
    id: str
    created: int
    body: OpenAIFields
    kind: str = ""
    chunk_kind: str = ""
    end: ClassVar[bytes] = b"data: [DONE]\n\n"

    def whole(self, updates: Sequence[Update]) -> dict[str, Any]:
        parts = gathered(self.generation.choices, updates)
        choices = [
            self.choice(choice, part) for choice, part in zip(self.generation.choices, parts, strict=True)
        ]
        timings = self.generation.choices[0].timings()
        answer = self._wrap(self.kind, choices) | {"usage": self.usage(), "timings": timings}
        return answer | ({"__verbose": self._verbose()} if self.body.verbose else {})

    def _verbose(self) -> dict[str, Any]:
        """llama-server's ``__verbose``, for debugging chat templates."""
        request = self.generation.requests[0]
        return {
            "prompt": self.model.tokenizer.decode(request.prompt, skip_special=False),
            "generation_settings": settings(request, stops=self.body.stops, stream=False),
        }

    def choice(self, choice: Choice, part: TextPart) -> dict[str, Any]:
        """A whole choice."""
        raise NotImplementedError

    def closing(self) -> list[dict[str, Any]]:
        """Chunks after the last token: the token counts, if requested."""
        if not self.body.include_usage:
            return []
        timings = self.generation.choices[0].timings()
        return [self._wrap(self.chunk_kind, []) | {"usage": self.usage(), "timings": timings}]

    def _wrap(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A response or chunk with these choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.names[0],
            "system_fingerprint": self.state.build,
            "choices": choices,
            **({"usage": None} if self.body.include_usage else {}),
        }

    def usage(self) -> dict[str, Any]:
        """Token counts; a prompt counts once for all its samples."""
        firsts = {choice.prompt: choice for choice in reversed(self.generation.choices)}.values()
        prompt = sum(choice.num_prompt for choice in firsts)
        completion = sum(choice.num_tokens for choice in self.generation.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(choice.num_cached for choice in firsts)},
        }

    def token_text(self, token: int) -> str:
        """A token as text; a part of a character as ``bytes:\\xf0\\x9f``, like OpenAI."""
        data = self.model.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass
class CompletionAnswer(OpenAIAnswer):
    """``text_completion``."""

    echoes: list[str] = field(default_factory=list)
    """Texts of the prompts, if the response repeats them."""
    kind: str = "text_completion"
    chunk_kind: str = "text_completion"

    def choice(self, choice: Choice, part: TextPart) -> dict[str, Any]:
        return self._choice(choice, self._echo(choice) + part.text, self._logprobs(part))

    def opening(self) -> list[dict[str, Any]]:
        if not self.echoes:
            return []
        choices = self.generation.choices
        return [
            self._wrap(self.chunk_kind, [self._choice(choice, self._echo(choice), None)])
            for choice in choices
        ]

    def chunks(self, update: Update) -> Iterator[dict[str, Any]]:
        choice, part = update.choice, update.part
        if part.text or part.logprobs:
            delta = self._choice(choice, part.text, self._logprobs(part))
            yield self._wrap(self.chunk_kind, [delta | {"finish_reason": None}])
        if choice.stop_type is not None:
            yield self._wrap(self.chunk_kind, [self._choice(choice, "", None)])

    def _choice(self, choice: Choice, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }

    def _echo(self, choice: Choice) -> str:
        return self.echoes[choice.prompt] if self.echoes else ""

    def _logprobs(self, part: TextPart) -> dict[str, Any] | None:
        if not part.logprobs:
            return None
        return {
            "tokens": [self.token_text(entry.token) for entry in part.logprobs],
            "token_logprobs": [_finite(entry.logprob) for entry in part.logprobs],
            "top_logprobs": [self._top(entry) for entry in part.logprobs],
            "text_offset": part.offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Log-probabilities by text; of several tokens with one text, all but the first by id."""
        top: dict[str, float] = {}
        for token, value in (dict(entry.top) | {entry.token: entry.logprob}).items():
            text = self.token_text(token)
            top[f"token_id:{token}" if text in top else text] = _finite(value)
        return top


@dataclass
class ChatAnswer(OpenAIAnswer):
    """``chat.completion``."""

    texts: list[ChatText] = field(default_factory=list)
    """One a choice."""
    kind: str = "chat.completion"
    chunk_kind: str = "chat.completion.chunk"

    def whole(self, updates: Sequence[Update]) -> dict[str, Any]:
        for update in updates:
            self.texts[update.choice.index].read(update)
        return super().whole(updates)

    def choice(self, choice: Choice, part: TextPart) -> dict[str, Any]:
        text = self.texts[choice.index]
        thoughts, content = text.joined("reasoning"), text.joined("text")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if thoughts:
            message["reasoning_content"] = thoughts
        if text.calls:
            message["content"] = content or None
            message["tool_calls"] = [
                _call(block) | {"function": {"name": block.name, "arguments": block.text}}
                for block in text.calls
            ]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(part),
            "finish_reason": finish_reason(choice, text),
        }

    def opening(self) -> list[dict[str, Any]]:
        return [
            self._chunk(choice, {"role": "assistant", "content": None}) for choice in self.generation.choices
        ]

    def chunks(self, update: Update) -> Iterator[dict[str, Any]]:
        choice, text = update.choice, self.texts[update.choice.index]
        logprobs = self._logprobs(update.part)
        for event in text.events(update):
            delta = self._delta(text, event)
            if delta:
                yield self._chunk(choice, delta, logprobs)
                logprobs = None
        if logprobs:  # of tokens whose text is held back, or was a marker
            yield self._chunk(choice, {"content": ""}, logprobs)
        if choice.stop_type is not None:
            yield self._chunk(choice, {}, finish=finish_reason(choice, text))

    def _delta(self, text: ChatText, event: BlockEvent) -> dict[str, Any]:
        if event.block.kind != "call":
            key = "content" if event.block.kind == "text" else "reasoning_content"
            return {key: event.text} if event.what == "grow" else {}
        index = {"index": text.calls.index(event.block)}
        match event.what:
            case "begin":
                function = {"name": event.block.name, "arguments": ""}
                return {"tool_calls": [index | _call(event.block) | {"function": function}]}
            case "grow":
                return {"tool_calls": [index | {"function": {"arguments": event.text}}]}
            case _:
                return {}

    def _chunk(
        self,
        choice: Choice,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        one = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._wrap(self.chunk_kind, [one])

    def _logprobs(self, part: TextPart) -> dict[str, Any] | None:
        if not part.logprobs:
            return None
        return {"content": [self._entry(entry) for entry in part.logprobs], "refusal": None}

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(token, value) for token, value in entry.top]
        return self._token(entry.token, entry.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.model.tokenizer.token_bytes(token)
        return {
            "token": data.decode(errors="replace"),
            "logprob": _finite(logprob),
            "bytes": list(data),
        }


def _call(block: Block) -> dict[str, Any]:
    return {"id": block.call_id, "type": "function"}


def _finite(logprob: float) -> float:
    return max(float(logprob), _FORBIDDEN)
