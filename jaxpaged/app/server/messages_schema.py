"""Anthropic's ``POST /v1/messages`` and ``/v1/messages/count_tokens``: a request becomes a chat request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictFloat, StrictInt

from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.foreign import Lenient, as_chat_request, joined_text
from jaxpaged.app.server.openai_schema import ChatRequest

_BILLING = "x-anthropic-billing-header:"
"""Beginning of a system block with numbers that change with every request: no text for a model, and
no prompt would ever be found in the prefix cache."""


class Thinking(Lenient):
    """Thoughts before the answer."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int | None, Field(ge=0)] = None


class ToolChoice(Lenient):
    """Tools that the model may, or must, use."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputConfig(Lenient):
    """Effort that an answer takes, and its format."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class InputMessage(Lenient):
    """A message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class CountRequest(Lenient):
    """``POST /v1/messages/count_tokens``."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None
    stream: bool | None = None

    def chat(self) -> ChatRequest:
        """The chat request.

        Raises:
          ApiError: it names what is not supported.
        """
        given: dict[str, Any] = {
            "model": self.model,
            "messages": [*self._system(), *self._messages()],
            "tools": [tool for one in self.tools or () if (tool := _tool(one)) is not None] or None,
            "stream": self.stream,
        }
        if self.tool_choice is not None and given["tools"]:
            given |= _choice(self.tool_choice)
        if self.thinking is not None:
            if self.thinking.type != "adaptive":
                given["chat_template_kwargs"] = {"enable_thinking": self.thinking.type == "enabled"}
            given["reasoning_budget"] = self.thinking.budget_tokens
        output = self.output_config or OutputConfig()
        given["reasoning_effort"] = output.effort
        schema = output.format or self.output_format
        if schema is not None:
            given["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema.get("schema"), "strict": True},
            }
        given |= self._own()
        return as_chat_request({name: value for name, value in given.items() if value is not None})

    def _own(self) -> dict[str, Any]:
        """Parameters that only requests for an answer have."""
        return {}

    def _system(self) -> list[dict[str, Any]]:
        blocks = (
            [{"type": "text", "text": self.system}] if isinstance(self.system, str) else self.system or []
        )
        kept = [block for block in blocks if not str(block.get("text", "")).startswith(_BILLING)]
        return [{"role": "system", "content": joined_text(kept, "system")}] if kept else []

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        for i, message in enumerate(self.messages):
            place = f"messages[{i}].content"
            if isinstance(message.content, str):
                messages.append({"role": message.role, "content": message.content})
            elif message.role == "assistant":
                messages.append(_assistant(message.content, place))
            else:
                messages += _user(message.role, message.content, place)
        return messages


class MessagesRequest(CountRequest):
    """``POST /v1/messages``. Unknown parameters are ignored: agents send those of beta versions."""

    max_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[StrictFloat | StrictInt | None, Field(ge=0, le=2)] = None
    top_p: Annotated[StrictFloat | StrictInt | None, Field(ge=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1)] = None
    stop_sequences: list[str] | None = None
    metadata: dict[str, Any] | None = None

    def _own(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            # Others strip stops of spaces alone, which Anthropic's server refuses.
            "stop": self.stop_sequences or None,
        } | {
            name: value
            for name, value in (self.model_extra or {}).items()
            if name in ("seed", "min_p", "cache_salt", "id_slot", "cache_prompt", "ignore_eos")
        }


def _tool(tool: dict[str, Any]) -> dict[str, Any] | None:
    """A function in the form of chat requests; None for a tool that Anthropic's server, or the client
    alone, knows."""
    if tool.get("type", "custom") not in ("custom", None) and "input_schema" not in tool:
        return None
    names = {"name": "name", "description": "description", "input_schema": "parameters", "strict": "strict"}
    return {
        "type": "function",
        "function": {own: tool[name] for name, own in names.items() if tool.get(name) is not None},
    }


def _choice(choice: ToolChoice) -> dict[str, Any]:
    chosen: Any = {"auto": "auto", "any": "required", "none": "none"}.get(choice.type)
    if choice.type == "tool":
        chosen = {"type": "function", "function": {"name": choice.name}}
    parallel = False if choice.disable_parallel_tool_use else None
    return {"tool_choice": chosen, "parallel_tool_calls": parallel}


def _assistant(blocks: list[dict[str, Any]], place: str) -> dict[str, Any]:
    """An assistant's message of content blocks."""
    texts, thoughts, calls = [], [], []
    for block in blocks:
        match block.get("type"):
            case "thinking":
                thoughts.append(block.get("thinking", ""))
            case "redacted_thinking":
                pass  # encrypted for Anthropic's server
            case "tool_use":
                function = {"name": block.get("name"), "arguments": block.get("input") or {}}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case _:
                texts.append(block)
    message: dict[str, Any] = {"role": "assistant", "content": joined_text(texts, place)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})


def _user(role: str, blocks: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    """Messages of a user's content blocks: results of tools, then text."""
    results, texts = [], []
    for i, block in enumerate(blocks):
        if block.get("type") == "tool_result":
            content = block.get("content") or ""
            text = content if isinstance(content, str) else joined_text(content, f"{place}[{i}].content")
            failed = "Error: " if block.get("is_error") and not text.lower().startswith("error") else ""
            results.append(
                {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": failed + text}
            )
        else:
            texts.append(block)
    if not blocks:
        raise ApiError(400, f"{place}: it is empty", param="messages")
    return [*results, *([{"role": role, "content": joined_text(texts, place)}] if texts else [])]
