"""OpenAI's ``POST /v1/responses``, without stored state: a request becomes a chat request."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict, Field

from jaxpaged.app.server.chat_schema import Effort
from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.foreign import Lenient, as_chat_request, joined_text
from jaxpaged.app.server.openai_schema import ChatRequest

_KEPT_NOWHERE = {
    "previous_response_id": "send the whole conversation as input",
    "conversation": "send the whole conversation as input",
    "prompt": "send the text of the prompt as instructions and input",
}
"""Parameters that name what a server keeps."""


class Reasoning(Lenient):
    """Amount of thoughts."""

    effort: Effort | None = None
    summary: Any = None


class TextOptions(Lenient):
    """Format of the text."""

    format: dict[str, Any] = Field(default_factory=lambda: {"type": "text"})
    verbosity: Any = None


class ResponsesRequest(Lenient):
    """``POST /v1/responses``. Parameters of chat requests go there; unknown ones are ignored, because
    agents send what only the official server knows."""

    model_config = ConfigDict(extra="allow")
    taken: ClassVar[frozenset[str]] = frozenset({"messages", "n", "stream_options", "logprobs"})
    """Parameters of chat requests that are none here."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    background: bool | None = None
    metadata: dict[str, str] | None = None

    def chat(self) -> ChatRequest:
        """The chat request.

        Raises:
          ApiError: it asks for what the server does not keep, or names what is not supported.
        """
        extras = dict(self.model_extra or {})
        for name, instead in _KEPT_NOWHERE.items():
            if extras.pop(name, None) is not None:
                raise ApiError(
                    400, f"{name} is not supported: this server keeps no responses; {instead}", param=name
                )
        if self.background:
            raise ApiError(
                400, "background is not supported: this server keeps no responses", param="background"
            )
        known = {
            name: value
            for name, value in extras.items()
            if name in ChatRequest.model_fields and name not in self.taken and value is not None
        }
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        given = {
            "model": self.model,
            "messages": [*messages, *_messages(self.input)],
            "tools": [tool for one in self.tools or () if (tool := _tool(one)) is not None] or None,
            "parallel_tool_calls": self.parallel_tool_calls,
            "max_tokens": self.max_output_tokens,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "response_format": _response_format(self.text.format) if self.text else None,
            "stream": self.stream,
        }
        given |= _choice(self.tool_choice, given)
        return as_chat_request(known | {name: value for name, value in given.items() if value is not None})


def _tool(tool: dict[str, Any]) -> dict[str, Any] | None:
    """A function in the form of chat requests; None for a tool of another type, which only the official
    server runs, or the client alone knows."""
    if tool.get("type") != "function":
        return None
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if name in tool}}


def _choice(choice: str | dict[str, Any] | None, given: dict[str, Any]) -> dict[str, Any]:
    """``tool_choice``, and the tools that it allows."""
    if not isinstance(choice, dict):
        return {"tool_choice": choice} if given["tools"] else {}
    if choice.get("type") == "function":
        return {"tool_choice": {"type": "function", "function": {"name": choice.get("name")}}}
    if choice.get("type") == "allowed_tools":
        names = {tool.get("name") for tool in choice.get("tools", ())}
        tools = [tool for tool in given["tools"] or () if tool["function"].get("name") in names]
        return {"tools": tools, "tool_choice": choice.get("mode", "auto")} if tools else {"tools": None}
    return {}


def _response_format(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {k: v for k, v in given.items() if k != "type"}}


def _messages(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of input items; thoughts and calls become parts of one assistant's message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(given):
        kind, role = item.get("type", "message"), item.get("role")
        match kind:
            case "message" if role == "assistant":
                _assistant(messages, "content")["content"] = _text(item, i)
            case "message":
                messages.append({"role": role, "content": _text(item, i)})
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                _assistant(messages).setdefault("tool_calls", []).append(call)
            case "function_call_output":
                output = item.get("output")
                text = output if isinstance(output, str) else joined_text(output or [], f"input[{i}].output")
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
            case "reasoning":
                thoughts = joined_text(item.get("content") or item.get("summary") or [], f"input[{i}]")
                if thoughts:
                    _assistant(messages, "content", "tool_calls")["reasoning_content"] = thoughts
            case str() if kind.endswith(("_call", "_call_output")) or kind.startswith("mcp_"):
                pass  # of tools that only the official server runs
            case _:
                raise ApiError(
                    400, f"input[{i}]: items of type {str(kind)[:100]!r} are not supported", param="input"
                )
    return messages


def _assistant(messages: list[dict[str, Any]], *begins: str) -> dict[str, Any]:
    """The assistant's message at the end; a new one if there is none, or it has one of ``begins`` already."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or any(name in last for name in begins):
        messages.append(last := {"role": "assistant"})
    return last


def _text(item: dict[str, Any], index: int) -> str:
    content = item.get("content")
    return content if isinstance(content, str) else joined_text(content or [], f"input[{index}].content")
