"""The first hour of somebody who has Python, a wheel and nothing else: each step works, and what it shows is calm.

The steps of one Python follow each other, in one environment.
"""

from __future__ import annotations

import re
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, WHEEL, Newcomer, Shown

import jaxpaged

pytestmark = pytest.mark.slow

CORE = {"jax", "jaxlib", "jaxpaged", "ml-dtypes", "numpy", "opt-einsum", "scipy"}
"""What `pip install jaxpaged` brings: jax and numpy, and what jax needs."""
OWN_CODE = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PROMPT = "def read_lines(path):"
NUMBERS = re.compile(r" *(load|compile|prompt eval|eval|total) time = | +KV cache = ")
"""Lines of timings and memory, in llama.cpp's form."""
CLIENT = """
import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
model = client.models.list().data[0].id
message = {"role": "user", "content": "Hello"}
whole = client.chat.completions.create(model=model, messages=[message], max_tokens=8, temperature=0)
assert whole.usage.completion_tokens <= 8
chunks = client.chat.completions.create(model=model, messages=[message], max_tokens=8, temperature=0, stream=True)
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert streamed == whole.choices[0].message.content
text = client.completions.create(model=model, prompt="def f(", max_tokens=8, temperature=0)
assert text.choices[0].text
print("answered")
"""


def calm(shown: Shown) -> Shown:
    """Checks that a command succeeded, and that its stderr has lines of its own alone: no warning, no traceback."""
    assert shown.status == 0, shown.stderr
    for line in shown.stderr.splitlines():
        assert line.startswith("jaxpaged: ") or NUMBERS.match(line), shown.stderr
        assert "warning" not in line.lower(), shown.stderr
    return shown


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


# The core alone


def test_pip_installs_jax_and_numpy_alone(newcomer: Newcomer):
    assert newcomer.install(str(WHEEL)).status == 0
    listed = newcomer.run("python", "-m", "pip", "list", "--format", "freeze").stdout
    names = {line.partition("==")[0].lower().replace("_", "-") for line in listed.splitlines()}
    assert names - {"pip", "setuptools", "wheel"} == CORE


def test_own_code_runs(newcomer: Newcomer):
    assert OWN_CODE is not None
    (newcomer.folder / "own.py").write_text(OWN_CODE[1])
    shown = newcomer.run("python", "-W", "error", "own.py", note="README's step in own code")
    assert (shown.status, shown.stdout, shown.stderr) == (0, "[2 3 1 0] 2\n", "")


@pytest.mark.parametrize("command", ["", "generate -p x", "serve", "--version"])
def test_without_the_extras_a_command_says_what_to_install(newcomer: Newcomer, command: str):
    extra = "serve" if command == "serve" else "model"
    needs = f"this command needs the package 'click': pip install 'jaxpaged[{extra}]'"
    assert newcomer.run("jaxpaged", *command.split()).refusal == needs


def test_without_the_extras_an_import_says_what_to_install(newcomer: Newcomer):
    last = newcomer.run("python", "-c", "from jaxpaged_model import load_model").stderr.splitlines()[-1]
    assert last.endswith("jaxpaged_model needs the package 'gguf': pip install 'jaxpaged[model]'")


# The command line


def test_pip_installs_the_extras(newcomer: Newcomer):
    assert newcomer.install(f"{WHEEL}[serve]").status == 0
    assert newcomer.run("python", "-m", "pip", "check").status == 0


def test_the_program_says_what_it_can_do(newcomer: Newcomer):
    shown = calm(newcomer.run("jaxpaged"))
    assert "jaxpaged generate -p" in shown.stdout and "serve " in shown.stdout
    assert shown == newcomer.run("jaxpaged", "--help")
    versions = newcomer.run("jaxpaged", "--version").stdout
    assert re.fullmatch(rf"jaxpaged {jaxpaged.__version__}, jax [\d.]+, Python 3\.[\d.]+\n", versions)


def test_generate_answers_and_compiles_only_once(newcomer: Newcomer):
    command = ("jaxpaged", "generate", "-p", PROMPT, "-n", "40", "--temp", "0")
    first = calm(newcomer.run(*command, note="jaxpaged generate, cold"))
    assert first.stdout.startswith(PROMPT) and len(first.stdout) > len(PROMPT) + 40
    kept = files(newcomer.folder / "home")
    assert calm(newcomer.run(*command, note="jaxpaged generate, warm")).stdout == first.stdout
    assert kept and files(newcomer.folder / "home") == kept


def test_a_bare_generate_says_what_to_give(newcomer: Newcomer):
    assert newcomer.run("jaxpaged", "generate").refusal.startswith("no prompt: give -p TEXT")
    status, shown = newcomer.on_a_terminal("jaxpaged", "generate")
    assert status == 2 and "cannot chat: try -p 'class Counter:'" in shown and "Traceback" not in shown


def test_a_chat_from_a_pipe(newcomer: Newcomer):
    chat = (
        "jaxpaged",
        "generate",
        "-cnv",
        "--chat-template",
        "chatml",
        "-n",
        "12",
        "--temp",
        "0",
        "--ignore-eos",
    )
    both = calm(newcomer.run(*chat, stdin="Hello\nWho are you?\n"))
    first = calm(newcomer.run(*chat, stdin="Hello\n"))
    assert both.stdout.startswith(first.stdout) and len(both.stdout) > len(first.stdout) > 0


@pytest.mark.parametrize("moment", ["loading", "compiling", "jaxpaged: seed", PROMPT])
def test_ctrl_c_is_clean(newcomer: Newcomer, moment: str):
    command = ("jaxpaged", "generate", "-p", PROMPT, "-n", "-1", "-c", "100000", "--no-kv-cache-paged")
    status, shown = newcomer.on_a_terminal(*command, "--ignore-eos", interrupt_at=moment)
    assert status == 130 and "Traceback" not in shown


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("generate -m missing.gguf -p x", "missing.gguf: no such file or folder; -m takes a GGUF file"),
        ("generate -m own.py -p x", "own.py: not a GGUF file"),
        ("generate -m . -p x", "has no config.json"),
        ("generate -p x --tmep 0", "No such option '--tmep'. Did you mean '--temp'?"),
        ("generate -p x -n many", "Invalid value for '-n'"),
        ("generat -p x", "No such command 'generat'. Did you mean 'generate'?"),
        ("serve -m missing.gguf --port 0", "missing.gguf: no such file or folder"),
        ("perplexity -f missing.txt", "missing.txt: No such file or directory"),
        ("bench -m missing.gguf", "missing.gguf: no such file or folder"),
        ("explain -m own.py", "own.py: not a GGUF file"),
    ],
)
def test_a_wrong_input_is_one_line(newcomer: Newcomer, command: str, said: str):
    shown = newcomer.run("jaxpaged", *command.split(), online=True)
    assert said in shown.refusal and "Traceback" not in shown.stderr


def test_the_measuring_commands(newcomer: Newcomer):
    assert "cpu:0" in calm(newcomer.run("jaxpaged", "devices")).stdout
    assert "cpu_numba" in calm(newcomer.run("jaxpaged", "explain")).stdout
    measured = calm(
        newcomer.run("jaxpaged", "perplexity", "--chunks", "1", note="jaxpaged perplexity, 1 chunk")
    )
    assert "Final estimate: PPL = " in measured.stdout
    measured = calm(
        newcomer.run("jaxpaged", "bench", "-p", "32", "-n", "8", "-b", "1", "-r", "1", note="jaxpaged bench")
    )
    assert "pp32" in measured.stdout and "tg8" in measured.stdout


# The server


def test_a_server_answers_openais_client(newcomer: Newcomer):
    client = Newcomer(newcomer.folder, newcomer.python, newcomer.times, venv="client")
    client.make_venv()
    assert client.install("openai").status == 0
    for note in ("cold", "warm"):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        process = subprocess.Popen(
            [newcomer.program("jaxpaged"), "serve", "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            cwd=newcomer.folder,
            env=newcomer.environment,
        )
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if line.startswith("listening on "):
                    break
            seconds = time.perf_counter() - start
            url = said[-1].split()[-1]
            if note == "cold":
                shown = client.run("python", "-W", "error", "-c", CLIENT, f"{url}/v1")
                assert (shown.status, shown.stdout) == (0, "answered\n"), shown.stderr
                port = url.rpartition(":")[2]
                refused = newcomer.run("jaxpaged", "serve", "--port", port, online=True).refusal
                assert refused == f"cannot listen on 127.0.0.1 port {port}: Address already in use"
            process.send_signal(signal.SIGINT)
            said += process.stderr.readlines()
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
        newcomer.took(f"jaxpaged serve, {note} (ready: {seconds:.1f} s)", start, before)
        own = ("jaxpaged: ", "listening on ", "try: curl ", "     or open ")
        assert all(line.startswith(own) for line in said if line.strip()), said
    with socket.socket() as free:
        free.bind(("127.0.0.1", int(port)))
