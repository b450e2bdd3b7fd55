"""Parts of an assistant's answer in their order: thoughts, text and tool calls, as they grow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxpaged_model.text.answer_parser import AnswerDelta, AnswerParser, ToolCallDelta

from jaxpaged.app.server.generation import Choice, Update


@dataclass
class Block:
    """A part of an answer."""

    kind: Literal["reasoning", "text", "call"]
    index: int
    """Its place among the parts of the answer."""
    text: str = ""
    """Text, or the arguments of a call as JSON."""
    name: str = ""
    """Function of a call."""
    call_id: str = ""


@dataclass(frozen=True)
class BlockEvent:
    """A part that began, grew or ended."""

    what: Literal["begin", "grow", "end"]
    block: Block
    text: str = ""
    """New text of a part that grew."""


@dataclass
class ChatText:
    """The answer of one sample, parsed as it arrives."""

    parser: AnswerParser
    blocks: list[Block] = field(default_factory=list)
    num_reasoning: int = 0
    """Tokens of thoughts."""
    _open: Block | None = None
    _call: int = -1

    def delta(self, update: Update) -> AnswerDelta:
        """The parsed text of an update."""
        delta = self.parser.push(update.part.text)
        return delta + self.parser.finish() if update.is_last else delta

    def events(self, update: Update) -> Iterator[BlockEvent]:
        """Changes of the parts of the answer; they are as the event says when it is taken."""
        delta = self.delta(update)
        if delta.reasoning:
            self.num_reasoning += len(update.part.tokens)
            yield from self._grow("reasoning", delta.reasoning)
        if delta.content:
            yield from self._grow("text", delta.content)
        for call in delta.tool_calls:
            yield from self._grow_call(call)
        if update.is_last:
            yield from self._close()

    def read(self, update: Update) -> None:
        """Adds an update to the parts of the answer."""
        for _ in self.events(update):
            pass

    def _grow(self, kind: Literal["reasoning", "text"], text: str) -> Iterator[BlockEvent]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(kind)
        yield self._add(text)

    def _grow_call(self, call: ToolCallDelta) -> Iterator[BlockEvent]:
        if self._open is None or self._open.kind != "call" or call.index != self._call:
            self._call = call.index
            yield from self._begin("call", name=call.name or "", call_id=call.id or "")
        if call.arguments:
            yield self._add(call.arguments)

    def _begin(self, kind: Any, **call: str) -> Iterator[BlockEvent]:
        yield from self._close()
        self._open = Block(kind, len(self.blocks), **call)
        self.blocks.append(self._open)
        yield BlockEvent("begin", self._open)

    def _add(self, text: str) -> BlockEvent:
        assert self._open is not None
        self._open.text += text
        return BlockEvent("grow", self._open, text)

    def _close(self) -> Iterator[BlockEvent]:
        if self._open is not None:
            block, self._open = self._open, None
            yield BlockEvent("end", block)

    def joined(self, kind: Literal["reasoning", "text"]) -> str:
        """The text of all parts of a kind."""
        return "".join(block.text for block in self.blocks if block.kind == kind)

    @property
    def calls(self) -> list[Block]:
        """The tool calls."""
        return [block for block in self.blocks if block.kind == "call"]


def finish_reason(choice: Choice, text: ChatText) -> str | None:
    """OpenAI's finish reason of an answer with tool calls."""
    reason = choice.finish_reason
    return "tool_calls" if reason == "stop" and text.calls else reason
