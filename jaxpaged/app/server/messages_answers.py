"""Answers in the format of Anthropic's ``/v1/messages``, whole and as typed events."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxpaged.app.server.answering import Answer
from jaxpaged.app.server.blocks import Block, BlockEvent, ChatText
from jaxpaged.app.server.errors import ApiError, anthropic_body
from jaxpaged.app.server.generation import Generation, Update
from jaxpaged.app.server.state import ServedModel


@dataclass
class MessagesAnswer(Answer):
    """A ``message``."""

    named_events: ClassVar[bool] = True

    model: ServedModel
    generation: Generation
    text: ChatText
    id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    _started: bool = False

    def whole(self, updates: Sequence[Update]) -> dict[str, Any]:
        for update in updates:
            self.text.read(update)
        content = [self._content(block) for block in self.text.blocks]
        return self._message(content) | self._end() | {"usage": self._usage()}

    def chunks(self, update: Update) -> Iterator[dict[str, Any]]:
        if not self._started:  # not before the first token: only then is the number of cached tokens known
            self._started = True
            message = self._message([]) | {"stop_reason": None, "stop_sequence": None}
            yield {"type": "message_start", "message": message | {"usage": self._usage()}}
        for event in self.text.events(update):
            yield self._event(event)

    def closing(self) -> list[dict[str, Any]]:
        end = {"type": "message_delta", "delta": self._end(), "usage": self._usage()}
        return [end, {"type": "message_stop"}]

    def failure(self, error: ApiError) -> dict[str, Any]:
        """The event of an error in a stream."""
        return anthropic_body(error)

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model.names[0],
            "content": content,
        }

    def _end(self) -> dict[str, Any]:
        choice = self.generation.choices[0]
        reason = {"eos": "end_turn", "word": "stop_sequence", "limit": "max_tokens", None: None}[
            choice.stop_type
        ]
        if self.text.calls and choice.stop_type == "eos":
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": choice.stopped_by}

    def _usage(self) -> dict[str, Any]:
        """Token counts; those of the prompt that were not cached count as input, as at Anthropic."""
        choice = self.generation.choices[0]
        return {
            "input_tokens": choice.num_prompt - choice.num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": choice.num_cached,
            "output_tokens": choice.num_tokens,
        }

    def _event(self, event: BlockEvent) -> dict[str, Any]:
        block, index = event.block, event.block.index
        if event.what == "begin":
            return {"type": "content_block_start", "index": index, "content_block": self._content(block)}
        if event.what == "end":
            return {"type": "content_block_stop", "index": index}
        match block.kind:
            case "reasoning":
                delta = {"type": "thinking_delta", "thinking": event.text}
            case "text":
                delta = {"type": "text_delta", "text": event.text}
            case _:
                delta = {"type": "input_json_delta", "partial_json": event.text}
        return {"type": "content_block_delta", "index": index, "delta": delta}

    def _content(self, block: Block) -> dict[str, Any]:
        match block.kind:
            case "reasoning":
                return {"type": "thinking", "thinking": block.text, "signature": ""}
            case "text":
                return {"type": "text", "text": block.text}
            case _:
                return {
                    "type": "tool_use",
                    "id": block.call_id,
                    "name": block.name,
                    "input": _arguments(block.text),
                }


def _arguments(text: str) -> Any:
    """Arguments of a call; empty if the answer was cut inside of them."""
    try:
        return json.loads(text) if text else {}
    except ValueError:
        return {}
