"""Requests of other APIs, and what agents sent, as chat requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jaxpaged_model.text.chat import BUILTIN_TEMPLATES

from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.messages_schema import CountRequest, MessagesRequest
from jaxpaged.app.server.openai_schema import ChatRequest
from jaxpaged.app.server.responses_schema import ResponsesRequest

RECORDINGS = Path(__file__).parent / "recordings"
TOOL = {"name": "get_weather", "description": "The weather", "parameters": {"type": "object"}}
assert BUILTIN_TEMPLATES


def responses(**fields):
    return ResponsesRequest.model_validate({"input": "Hello", **fields}).chat()


def messages(*given, **fields):
    body = {"messages": list(given) or [{"role": "user", "content": "Hello"}], "max_tokens": 5}
    return MessagesRequest.model_validate(body | fields).chat()


def plain(chat):
    return [message.plain() for message in chat.messages]


def test_what_codex_sends():
    chat = ResponsesRequest.model_validate(json.loads((RECORDINGS / "codex.json").read_text())).chat()
    assert [message.role for message in chat.messages] == ["developer", "developer", "user", "user"]
    assert chat.messages[-1].content == "List the files here"
    assert [tool.function.name for tool in chat.tools] == [
        "exec_command"
    ]  # web_search and namespaces are skipped
    assert chat.tool_choice == "auto" and chat.stream and chat.parallel_tool_calls


def test_what_claude_code_sends():
    given = json.loads((RECORDINGS / "claude_code.json").read_text())
    chat = MessagesRequest.model_validate(given).chat()
    assert [message.role for message in chat.messages] == ["system", "user", "system"]
    assert "billing" not in chat.messages[0].content
    assert [tool.function.name for tool in chat.tools] == ["Bash", "Read", "Edit"] or len(chat.tools) == 3
    assert chat.limit == 32000 and chat.reasoning_effort == "high" and chat.stream
    assert CountRequest.model_validate(given).chat().messages == chat.messages


def test_items_of_a_turn_become_one_message_of_the_assistant():
    chat = responses(
        instructions="Be brief",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "ask"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Wait."}]},
            {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": '{"city": "Rome"}'},
            {"type": "function_call", "call_id": "b", "name": "get_weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "sun"},
            {
                "type": "function_call_output",
                "call_id": "b",
                "output": [{"type": "input_text", "text": "rain"}],
            },
            {"type": "web_search_call", "id": "x", "status": "completed"},
        ],
    )
    system, user, assistant, first, second = plain(chat)
    assert (system["content"], user["content"]) == ("Be brief", "Weather?")
    assert assistant["content"] == "Wait." and assistant["reasoning_content"] == "ask"
    assert [call["function"]["arguments"] for call in assistant["tool_calls"]] == [{"city": "Rome"}, {}]
    assert (first["tool_call_id"], first["content"], second["content"]) == ("a", "sun", "rain")


def test_content_blocks_become_messages():
    call = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Rome"}}
    chat = messages(
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, call]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sun"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "no such city", "is_error": True},
                {"type": "text", "text": "And?"},
            ],
        },
        system=[{"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral"}}],
    )
    system, _, assistant, first, second, user = plain(chat)
    assert system["content"] == "Be brief" and user == {"role": "user", "content": "And?"}
    assert assistant["reasoning_content"] == "hm" and assistant["tool_calls"][0]["id"] == "t1"
    assert (first["content"], second["content"]) == ("sun", "Error: no such city")


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        ({"type": "auto"}, "auto", None),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", None),
        ({"type": "tool", "name": "get_weather"}, "get_weather", None),
    ],
)
def test_tools_and_choices_of_messages(choice, expected, parallel):
    tools = [
        {"name": "get_weather", "description": "The weather", "input_schema": {"type": "object"}},
        {"type": "web_search_20250305", "name": "web_search"},
    ]
    chat = messages(tools=tools, tool_choice=choice)
    assert [tool.function.model_dump(exclude_none=True) for tool in chat.tools] == [TOOL]
    assert (chat.chosen_function or chat.tool_choice) == expected and chat.parallel_tool_calls is parallel


def test_parameters_of_responses():
    schema = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    chat = responses(
        text={"format": schema, "verbosity": "low"},
        max_output_tokens=7,
        reasoning={"effort": "low", "summary": "auto"},
        temperature=0.5,
        top_k=3,
        tools=[{"type": "function", **TOOL}, {"type": "function", **TOOL, "name": "other"}],
        tool_choice={
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "other"}],
        },
        metadata={"a": "b"},
        client_metadata={"anything": [1]},
    )
    assert (chat.limit, chat.reasoning_effort, chat.temperature, chat.top_k) == (7, "low", 0.5, 3)
    assert chat.tool_choice == "required" and [tool.function.name for tool in chat.tools] == ["other"]
    assert responses(tools=[{"type": "web_search"}], tool_choice="auto").tools is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input_image",
        ),
        ({"input": [{"role": "user", "content": 5}]}, "neither a text nor a list"),
        ({"input": [{"type": "reasoning", "summary": [5]}]}, "only text"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": {"x": 1}}]}, "neither a text"),
        ({"tools": [{"type": "function", "parameters": {}}]}, "name"),
        ({"tools": [{"type": "function", **TOOL}], "tool_choice": {"type": "function", "name": "f"}}, "'f'"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}]}, "not JSON"),
    ],
)
def test_what_responses_refuse(fields, named):
    with pytest.raises(ApiError) as error:
        responses(**fields)
    assert error.value.status_code == 400 and named in error.value.message


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([{"role": "user", "content": []}], "empty"),
        ([{"role": "user", "content": [{"type": "image", "source": {}}]}], "image"),
        ([{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "input": {}}]}], "name"),
    ],
)
def test_what_messages_refuse(given, named):
    with pytest.raises(ApiError) as error:
        messages(*given)
    assert error.value.status_code == 400 and named in error.value.message


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": {"description": "no name"}}],
        [{"type": "function", "function": {"name": ""}}],
        [{"type": "retrieval"}],
        [{"type": "function", "function": {"name": "f"}}] * 2,
    ],
)
def test_tools_that_are_none(tools):
    with pytest.raises(ValueError, match="tools"):
        ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "tools": tools})
