"""Conversations with tools, as chat requests of all dialects bring them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from jaxpaged.app.server.sampling_schema import StrictModel

MAX_MESSAGES = 4096
MAX_TOOLS = 512
_MAX_CALLS = 128
_MAX_NAMES = 16
_MAX_ANNOTATIONS = 1024
_OWN_VARIABLES = frozenset({"messages", "tools", "bos_token", "eos_token"})
"""Variables of a chat template that come from the request itself."""

FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
ReasoningFormat = Literal["none", "auto", "deepseek", "deepseek-legacy"]


class FunctionDefinition(StrictModel):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments; None = any object."""
    strict: bool | None = None


class Tool(StrictModel):
    """A tool; functions are supported."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(StrictModel):
    """The name of a function."""

    name: FunctionName


class NamedTool(StrictModel):
    """A choice of one tool."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(StrictModel):
    """A function's name and arguments in the history."""

    name: FunctionName
    arguments: str | dict[str, Any] = "{}"

    @field_validator("arguments")
    @classmethod
    def _is_json_object(cls, arguments: str | dict[str, Any]) -> dict[str, Any]:
        if isinstance(arguments, dict):
            return arguments
        try:
            value = json.loads(arguments or "{}")
        except ValueError as error:
            raise ValueError(f"messages: a tool call's arguments are not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError("messages: a tool call's arguments are JSON, but not an object")
        return value


class ToolCall(StrictModel):
    """A call in an assistant's message."""

    id: Annotated[str | None, Field(max_length=256)] = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # clients that joined a stream's deltas keep it


class TextPart(StrictModel):
    """A part of a message; images and audio are not supported."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None  # a hint of proxies for Anthropic's API


class RefusalPart(StrictModel):
    """A refusal in an assistant's message."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class Message(StrictModel):
    """A message of a conversation; an assistant's may have all fields of a response."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | RefusalPart] | None = None
    name: Annotated[str | None, Field(max_length=256)] = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any] | None, Field(max_length=_MAX_ANNOTATIONS)] = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[ToolCall] | None, Field(max_length=_MAX_CALLS)] = None
    tool_call_id: Annotated[str | None, Field(max_length=256)] = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        answers = self.role == "assistant" and (self.refusal or self.tool_calls or self.reasoning_content)
        if self.content is None and not answers:
            raise ValueError("messages: content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("messages: only the assistant's have tool_calls")
        return self

    def plain(self) -> dict[str, Any]:
        """The message for a chat template; parts on separate lines, as in llama.cpp and vLLM.

        Arguments of tool calls are objects.
        """
        text = self.refusal or "" if self.content is None else self.content
        if not isinstance(text, str):
            text = "\n".join(part.text for part in text)
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text,
        }
        extras = {
            "name": self.name,
            "reasoning_content": self.reasoning_content,
            "tool_call_id": self.tool_call_id,
            "tool_calls": [call.model_dump(exclude={"index"}, exclude_none=True) for call in self.tool_calls]
            if self.tool_calls
            else None,
        }
        return message | {key: value for key, value in extras.items() if value is not None}


class TemplateFields(StrictModel):
    """Input of a chat template."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    tools: Annotated[list[Tool] | None, Field(max_length=MAX_TOOLS)] = None
    add_generation_prompt: bool | None = None
    """False: nothing after the messages; else the beginning of an answer, or one to continue."""
    continue_final_message: bool | None = None
    """True: continue the last message; None: continue it if it is the assistant's."""
    reasoning_effort: Effort | None = None
    chat_template_kwargs: Annotated[
        dict[VariableName, bool | int | float | str | None] | None, Field(max_length=_MAX_NAMES)
    ] = None
    """More variables of the template."""

    @model_validator(mode="after")
    def _one_conversation(self) -> TemplateFields:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message: the last message is not the assistant's")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"tools: two functions have the name {twice!r}")
        return self

    @field_validator("chat_template_kwargs")
    @classmethod
    def _free(cls, arguments: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in _OWN_VARIABLES.intersection(arguments or {}):
            raise ValueError(f"chat_template_kwargs: {name!r} comes from the request itself")
        for name in {"enable_thinking", "add_generation_prompt"}.intersection(arguments or {}):
            if not isinstance((arguments or {})[name], bool):
                raise ValueError(f"chat_template_kwargs: {name} must be true or false")
        return arguments

    @property
    def plain_tools(self) -> list[dict[str, Any]]:
        """The tools for a chat template."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]


def merged_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with one system message at the most at the beginning: most templates refuse a second one."""
    count = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if count < 2:
        return list(messages)
    text = "\n\n".join(message["content"] for message in messages[:count])
    return [messages[0] | {"content": text}, *messages[count:]]


def without_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose instructions are the user's words: before those that follow, or else behind the last ones."""
    found: list[dict[str, Any]] = []
    for message in messages:
        message = message | {"role": "user"} if message["role"] == "system" else dict(message)
        if found and found[-1]["role"] == message["role"] == "user":
            found[-1]["content"] += "\n\n" + message["content"]
        else:
            found.append(message)
    return found
