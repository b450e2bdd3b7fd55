"""Answers in the format of ``/v1/responses``, whole and as typed events."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar

from jaxpaged.app.server.answering import Answer
from jaxpaged.app.server.blocks import Block, BlockEvent, ChatText
from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.generation import Generation, Update
from jaxpaged.app.server.responses_schema import ResponsesRequest
from jaxpaged.app.server.state import ServedModel

_PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}


@dataclass
class ResponsesAnswer(Answer):
    """A ``response``."""

    named_events: ClassVar[bool] = True

    model: ServedModel
    generation: Generation
    created: int
    body: ResponsesRequest
    text: ChatText
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(24)}")
    _ids: dict[int, str] = field(default_factory=dict)
    _numbers: count[int] = field(default_factory=count)

    def whole(self, updates: Sequence[Update]) -> dict[str, Any]:
        for update in updates:
            self.text.read(update)
        return self._response(self._status())

    def opening(self) -> list[dict[str, Any]]:
        response = self._response("in_progress")
        return [self._event(f"response.{name}", response=response) for name in ("created", "in_progress")]

    def chunks(self, update: Update) -> Iterator[dict[str, Any]]:
        for event in self.text.events(update):
            yield from self._events(event)

    def closing(self) -> list[dict[str, Any]]:
        status = self._status()
        return [self._event(f"response.{status}", response=self._response(status))]

    def failure(self, error: ApiError) -> dict[str, Any]:
        """The event of an error in a stream."""
        failed = self._response("failed") | {"error": {"code": "server_error", "message": error.message}}
        return self._event("response.failed", response=failed)

    def _status(self) -> str:
        return "incomplete" if self.generation.choices[0].stop_type == "limit" else "completed"

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}

    def _events(self, event: BlockEvent) -> Iterator[dict[str, Any]]:
        block = event.block
        at = {"item_id": self._id(block), "output_index": block.index}
        part = at | {"content_index": 0}
        if event.what == "begin":
            item = self._item(block, "in_progress")
            yield self._event("response.output_item.added", output_index=block.index, item=item)
            if block.kind == "text":
                yield self._event("response.content_part.added", **part, part=_output_text(""))
        elif event.what == "grow":
            match block.kind:
                case "reasoning":
                    yield self._event("response.reasoning_text.delta", **part, delta=event.text)
                case "text":
                    yield self._event("response.output_text.delta", **part, delta=event.text, logprobs=[])
                case "call":
                    yield self._event("response.function_call_arguments.delta", **at, delta=event.text)
        else:
            match block.kind:
                case "reasoning":
                    yield self._event("response.reasoning_text.done", **part, text=block.text)
                case "text":
                    yield self._event("response.output_text.done", **part, text=block.text, logprobs=[])
                    yield self._event("response.content_part.done", **part, part=_output_text(block.text))
                case "call":
                    yield self._event(
                        "response.function_call_arguments.done", **at, name=block.name, arguments=block.text
                    )
            item = self._item(block, self._status())
            yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _id(self, block: Block) -> str:
        return self._ids.setdefault(block.index, f"{_PREFIXES[block.kind]}_{secrets.token_hex(24)}")

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        begun = status == "in_progress"
        item: dict[str, Any] = {"id": self._id(block), "status": status}
        match block.kind:
            case "reasoning":
                content = [] if begun else [{"type": "reasoning_text", "text": block.text}]
                return item | {
                    "type": "reasoning",
                    "summary": [],
                    "content": content,
                    "encrypted_content": None,
                }
            case "text":
                content = [] if begun else [_output_text(block.text)]
                return item | {"type": "message", "role": "assistant", "content": content}
            case "call":
                called = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
                return item | {"type": "function_call"} | called

    def _response(self, status: str) -> dict[str, Any]:
        body, choice = self.body, self.generation.choices[0]
        request = self.generation.requests[0]
        done = status != "in_progress"
        usage = {
            "input_tokens": choice.num_prompt,
            "input_tokens_details": {"cached_tokens": choice.num_cached},
            "output_tokens": choice.num_tokens,
            "output_tokens_details": {"reasoning_tokens": self.text.num_reasoning},
            "total_tokens": choice.num_prompt + choice.num_tokens,
        }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.model.names[0],
            "output": [self._item(block, status) for block in self.text.blocks] if done else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": request.temperature,
            "text": {"format": body.text.format if body.text else {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": usage if done else None,
            "user": None,
            "metadata": body.metadata or {},
            **({"timings": choice.timings()} if done else {}),
        }


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
