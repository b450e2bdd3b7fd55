"""A long chat with a model whose layers see windows: tokens computed and time to the first token, by turn.

    python -m tpu_scripts.bench.chat_turns
    python -m tpu_scripts.bench.chat_turns --llama-server llama.cpp/build/bin/llama-server

Needs: pip install -e ".[serve]".

Each server serves one conversation, whose every turn sends all of the text so far. "windows" keeps of layers with a
window what it reaches, "swa-full" all tokens in all layers; llama-server, where it is given, is started with the flags
that its name shows. Servers are measured one after the other, each in a process of its own; prompts are token ids, so
that all of them read the same text but for what they generated. Without -m, the model has random weights in the shape
of Gemma 3 270M (Q8_0), with windows of 1,024 tokens.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from jaxpaged.app.bench_serve.servers import HOST, Variant, serving
from tpu_scripts import common
from tpu_scripts.bench.models import GEMMA_3_270M, write_random_model
from tpu_scripts.common import Parser, positive

_SHOWN = (1, 2, 10, 20, 30, 40)
"""Turns in the table."""
START_SECONDS = 300.0


@contextmanager
def llama_server(program: Path, flags: list[str]) -> Iterator[str]:
    """Runs llama-server inside the context, and yields its address."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    url = f"http://{HOST}:{port}"
    command = [str(program), *flags, "--host", HOST, "--port", str(port), "--no-webui"]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _is_healthy(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(
                        f"llama-server did not start: {log.read()[-500:].decode(errors='replace')}"
                    )
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False, timeout=5.0).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def chat(url: str, turns: int, said: int, answered: int, vocab_size: int) -> list[dict[str, Any]]:
    """Has a conversation; a row a turn.

    Args:
      url: the server's.
      turns: number of turns.
      said, answered: tokens of each message and each answer.
      vocab_size: ids are drawn below it.
    """
    rng = np.random.default_rng(0)
    text: list[int] = []
    rows = []
    with httpx.Client(base_url=url, timeout=600.0, trust_env=False) as client:
        for turn in range(1, turns + 1):
            text += rng.integers(3, min(vocab_size, 250), said).tolist()
            given = {
                "prompt": text, "n_predict": answered, "temperature": 0.0, "ignore_eos": True, "cache_prompt": True,
                "return_tokens": True, "id_slot": 0,
            }  # fmt: skip
            response = client.post("/completion", json=given)
            response.raise_for_status()
            found = response.json()
            timings = found["timings"]
            rows.append(
                {
                    "turn": turn,
                    "tokens": len(text),
                    "computed": timings["prompt_n"],
                    "first_token_ms": timings["prompt_ms"],
                    "decode_ms": timings["predicted_per_token_ms"],
                }
            )
            text += found["tokens"]
    return rows


def main() -> None:
    parser = Parser(__doc__, model_file=None, repeat=1, json=None)
    parser.add("--turns", "turns of the conversation", positive, 40)
    parser.add("--said", "tokens of each message", positive, 160)
    parser.add("--answered", "tokens of each answer", positive, 45)
    parser.add("--llama-server", "llama.cpp's server, to compare with", Path)
    args = parser.parse()
    context = args.turns * (args.said + args.answered) + 64
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder, "gemma3.gguf")
        if args.model is None:
            write_random_model(model, GEMMA_3_270M)
        flags = ["-m", str(model), "-c", str(context), "-np", "1"]
        servers: dict[str, Any] = {
            "windows": lambda: serving(Variant("windows", (*flags, "--log-disable")), START_SECONDS),
            "swa-full": lambda: serving(Variant("swa-full", (*flags, "--swa-full")), START_SECONDS),
        }
        if args.llama_server is not None:
            servers["llama-server"] = lambda: llama_server(args.llama_server, flags)
            servers["llama-server --swa-full"] = lambda: llama_server(
                args.llama_server, [*flags, "--swa-full"]
            )
        shown = [turn for turn in _SHOWN if turn <= args.turns]
        print(
            common.head("server", *(f"turn {turn}: computed, ms" for turn in shown), "ms a token"), flush=True
        )
        for _ in range(args.repeat):
            for name, serve in servers.items():
                with serve() as url:
                    found = chat(url, args.turns, args.said, args.answered, GEMMA_3_270M.vocab_size)
                rows += [{"server": name, **row} for row in found]
                cells = [
                    f"{row['computed']}, {row['first_token_ms']:.0f}" for row in found if row["turn"] in shown
                ]
                print(common.row(name, *cells, f"{found[-1]['decode_ms']:.1f}"), flush=True)
    common.write_json(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
