"""Agents and their frameworks against a real server of a real checkpoint: a turn with a tool call each.

The model is small, so a grammar makes the call: the clients' own choice of tools, or a proxy's.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import anthropic
import openai
import pytest
from narrowing_proxy import narrowing_proxy
from pydantic import BaseModel
from test_real_clients import KEY, Process

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
AGENTS = {"codex": "@openai/codex@0.171.0", "claude": "@anthropic-ai/claude-code@2.1.197"}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
ASK = "What is the weather in Rome?"


class Forecast(BaseModel):
    """An answer of a fixed form."""

    city: str
    degrees: int
    sunny: bool


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    if not MODEL.exists():
        made = subprocess.run(
            ["make", str(MODEL.relative_to(ROOT))], cwd=ROOT, capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"no checkpoint: {made.stderr.strip()[-200:]}")
    flags = (
        "-m",
        str(MODEL),
        "-c",
        "32768",
        "-np",
        "2",
        "-ctk",
        "q8_0",
        "-ctv",
        "q8_0",
        "--kv-memory",
        "1G",
        "--temp",
        "0.2",
        "-n",
        "256",
    )
    process = Process(tmp_path_factory.mktemp("server"), *flags)
    yield process
    process.popen.terminate()
    assert process.popen.wait(60) == 0, process.log.read_text()
    assert "Traceback" not in process.log.read_text()


@pytest.fixture(scope="module")
def client(server: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: Process) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as client:
        yield client


def checked(arguments: str | dict) -> dict:
    """The arguments of a call, which must be those that the schema allows."""
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert set(given) == {"city", "days"} and given["city"] in ("Rome", "Oslo") and 1 <= given["days"] <= 9
    return given


def test_openai_chat_with_tools(client):
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}
    messages = [{"role": "user", "content": ASK}]
    whole = client.chat.completions.create(
        model="any",
        messages=messages,
        tools=[tool],
        tool_choice="required",
        temperature=0,
        parallel_tool_calls=False,
    )
    (call,) = whole.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and whole.choices[0].finish_reason == "tool_calls"
    checked(call.function.arguments)
    with client.chat.completions.stream(
        model="any",
        messages=messages,
        tools=[tool],
        tool_choice="required",
        temperature=0,
        parallel_tool_calls=False,
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    messages += [
        whole.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny, 25 degrees"},
    ]
    answer = client.chat.completions.create(
        model="any", messages=messages, tools=[tool], tool_choice="none", max_tokens=24
    )
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls
    assert answer.usage.prompt_tokens_details.cached_tokens > 100  # the turn before


def test_openai_parse(client):
    parsed = client.chat.completions.parse(
        model="any",
        messages=[{"role": "user", "content": "The weather in Rome, as JSON."}],
        response_format=Forecast,
        max_tokens=100,
    )
    assert isinstance(parsed.choices[0].message.parsed, Forecast)


def test_openai_responses(client):
    tool = {"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": True}
    with client.responses.stream(
        model="any", input=ASK, tools=[tool], tool_choice={"type": "function", "name": "get_weather"}
    ) as stream:
        kinds = [event.type for event in stream]
        response = stream.get_final_response()
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    (call,) = response.output
    checked(call.arguments)
    history = [
        {"role": "user", "content": ASK},
        call.model_dump(exclude_none=True, exclude={"parsed_arguments"}),
    ]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    answer = client.responses.create(
        model="any", input=history, tools=[tool], tool_choice="none", max_output_tokens=24
    )
    assert answer.output_text and answer.usage.input_tokens_details.cached_tokens > 100
    assert isinstance(
        client.responses.parse(model="any", input="The weather as JSON.", text_format=Forecast).output_parsed,
        Forecast,
    )


def test_anthropic(claude):
    tool = {"name": "get_weather", "description": "The weather", "input_schema": WEATHER}
    given = {"model": "any", "tools": [tool], "max_tokens": 200}
    messages = [{"role": "user", "content": ASK}]
    with claude.messages.stream(
        messages=messages, tool_choice={"type": "tool", "name": "get_weather"}, **given
    ) as stream:
        message = stream.get_final_message()
    (call,) = [block for block in message.content if block.type == "tool_use"]
    checked(call.input)
    assert message.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = claude.messages.create(
        messages=messages, tool_choice={"type": "none"}, **given | {"max_tokens": 24}
    )
    assert answer.content[0].text and answer.usage.cache_read_input_tokens > 100
    counted = claude.messages.count_tokens(
        model="any", messages=messages, tools=[tool], tool_choice={"type": "none"}
    )
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    with pytest.raises(anthropic.BadRequestError, match="image"):
        image = {"type": "image", "source": {"type": "url", "url": "http://x"}}
        claude.messages.create(model="any", max_tokens=5, messages=[{"role": "user", "content": [image]}])


def test_langchain_tools(server):
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, model="any", temperature=0, max_tokens=200
    )
    tool = {"type": "function", "function": {"name": "get_weather", "description": "", "parameters": WEATHER}}
    (call,) = chat.bind_tools([tool], tool_choice="get_weather").invoke(ASK).tool_calls
    checked(call["args"])


def test_pydantic_ai(server):
    pytest.importorskip("pydantic_ai")
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async def ask() -> Forecast:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            model = OpenAIChatModel("any", provider=OpenAIProvider(openai_client=client))
            agent = Agent(model, output_type=Forecast)
            return (await agent.run("The weather in Rome: 25 degrees and sunny.")).output

    assert isinstance(asyncio.run(ask()), Forecast)


def agent(name: str) -> str:
    """The program of an agent, from the PATH or the npm registry."""
    if found := shutil.which(name):
        return found
    folder = Path(os.environ.get("JAXPAGED_AGENTS", ROOT / ".venv" / "agents"))
    program = folder / "node_modules" / ".bin" / name
    if not program.exists():
        if shutil.which("npm") is None:
            pytest.skip(f"npm cannot install {AGENTS[name]}: there is no npm")
        install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), AGENTS[name]]
        try:
            subprocess.run(install, capture_output=True, text=True, timeout=300, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"npm cannot install {AGENTS[name]}: {error}")
    return str(program)


def run_agent(command: list[str], folder: Path, **environment: str) -> str:
    """The output of an agent, run in a folder with one file."""
    (folder / "work").mkdir()
    (folder / "work" / "unmistakable.txt").write_text("x")
    done = subprocess.run(
        command,
        cwd=folder / "work",
        env={**os.environ, "HOME": str(folder), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_codex(server, tmp_path):
    def narrow(path: str, body: dict) -> dict:
        if "/responses" not in path:
            return body
        called = any(item.get("type") == "function_call_output" for item in body["input"])
        body["tools"] = [tool for tool in body["tools"] if tool.get("name") == "exec_command"]
        parameters = {"type": "object", "properties": {"cmd": {"const": "ls"}}, "required": ["cmd"]}
        body["tools"][0]["parameters"] = parameters | {"additionalProperties": False}
        if called:
            return body | {"tool_choice": "none", "structured_outputs": {"choice": ["There is one file."]}}
        return body | {"tool_choice": {"type": "function", "name": "exec_command"}}

    with narrowing_proxy(server.url, narrow) as (url, seen):
        (tmp_path / "config.toml").write_text(
            'model = "any"\nmodel_provider = "local"\n[model_providers.local]\nname = "local"\n'
            f'base_url = "{url}/v1"\nwire_api = "responses"\nenv_key = "LOCAL_KEY"\n'
        )
        command = [
            agent("codex"),
            "exec",
            "--skip-git-repo-check",
            "--json",
            "--dangerously-bypass-approvals-and-sandbox",
        ]
        said = run_agent([*command, "List the files here"], tmp_path, CODEX_HOME=str(tmp_path), LOCAL_KEY=KEY)
    events = [json.loads(line) for line in said.splitlines()]
    ran = [event["item"] for event in events if event["type"] == "item.completed"]
    commands = [item for item in ran if item["type"] == "command_execution"]
    assert commands and "unmistakable.txt" in commands[0]["aggregated_output"]
    assert any(item["type"] == "agent_message" and item["text"] for item in ran)
    outputs = [
        item for _, body in seen for item in body["input"] if item.get("type") == "function_call_output"
    ]
    assert any("unmistakable.txt" in str(item["output"]) for item in outputs)


def test_claude_code(server, tmp_path):
    def narrow(path: str, body: dict) -> dict:
        if not path.startswith("/v1/messages") or "tools" not in body:
            return body
        blocks = [b for m in body["messages"] if isinstance(m["content"], list) for b in m["content"]]
        called = any(block.get("type") == "tool_result" for block in blocks)
        body["tools"] = [tool for tool in body["tools"] if tool["name"] == "Bash"]
        properties = {"command": {"const": "ls"}, "description": {"const": "List files"}}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        body["tools"][0]["input_schema"] = schema | {"additionalProperties": False}
        if called:
            answer = {"type": "json_schema", "schema": {"const": "There is one file."}}
            return body | {"tool_choice": {"type": "none"}, "output_config": {"format": answer}}
        return body | {"tool_choice": {"type": "tool", "name": "Bash"}}

    with narrowing_proxy(server.url, narrow) as (url, seen):
        said = run_agent(
            [agent("claude"), "-p", "List the files here", "--model", "any", "--allowedTools", "Bash(ls)"],
            tmp_path,
            ANTHROPIC_BASE_URL=url,
            ANTHROPIC_API_KEY=KEY,
            DISABLE_TELEMETRY="1",
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        )
    assert said.strip()
    results = [
        block
        for _, body in seen
        for message in body.get("messages", ())
        if isinstance(message["content"], list)
        for block in message["content"]
        if block.get("type") == "tool_result"
    ]
    assert any("unmistakable.txt" in str(block["content"]) for block in results)


@pytest.mark.parametrize("page", ["docs/getting_started.md", "docs/guides/serving.md"])
def test_the_clients_of_the_docs(server, page, capsys):
    """Each block is a program; only the address and the key are others."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    ours = [code for code in blocks if "base_url" in code]
    assert ours
    for code in ours:
        if "langchain" in code:
            pytest.importorskip("langchain_openai")
        exec(code.replace("http://127.0.0.1:8080", server.url).replace('"none"', repr(KEY)), {})
        assert capsys.readouterr().out or "print" not in code
