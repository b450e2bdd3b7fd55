"""Memory of servers with 8 and 32 slots: allotted to keys and values, and of the process, idle and under load.

    python -m tpu_scripts.bench.slots -m model.gguf
    python -m tpu_scripts.bench.slots -m model.gguf --llama-server llama.cpp/build/bin/llama-server

Needs: pip install -e ".[serve]", and Linux.

Each server has contexts of -c tokens in its slots, and is asked by as many clients as it has slots, at once, to prefill
-p tokens and generate -n. "contiguous" reserves every slot's context, as llama-server does; "paged" has a pool of the
same size, whose pages take memory when they are written. Keys and values are float16 in all of them. Memory is the
resident memory of the server's process: after the start, and its peak under the load. Tokens a second are those
generated, of all clients together.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from jaxpaged.app.bench_serve.servers import Variant, serving
from tpu_scripts import common
from tpu_scripts.bench.chat_turns import START_SECONDS, llama_server
from tpu_scripts.common import Parser, each, positive

MIB = 2**20


def children() -> set[int]:
    """Processes that this one started and that run."""
    return {
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }


def memory(pid: int, key: str) -> float:
    """Resident memory of a process in MiB: ``VmRSS`` now, ``VmHWM`` at its peak."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(f"process {pid} has no {key}")


def load(url: str, clients: int, prompt: int, answered: int) -> float:
    """Sends one request of each client at once; tokens generated a second."""
    rng = np.random.default_rng(0)
    requests = [
        {
            "prompt": rng.integers(300, 2000, prompt).tolist(), "n_predict": answered, "temperature": 0.0,
            "ignore_eos": True,
        }
        for _ in range(clients)
    ]  # fmt: skip

    def ask(request: dict[str, Any]) -> int:
        response = httpx.post(f"{url}/completion", json=request, timeout=1200.0, trust_env=False)
        response.raise_for_status()
        return int(response.json()["tokens_predicted"])

    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(ask, requests))
    return tokens / (time.perf_counter() - begin)


def main() -> None:
    parser = Parser(__doc__, model_file=None, repeat=1, json=None)
    parser.add("--slots", "numbers of slots, comma-separated", each(positive), [8, 32])
    parser.add("-c --ctx-size", "tokens of each slot's context", positive, 2048)
    parser.add("-p --prompt", "tokens of each prompt", positive, 700)
    parser.add("-n --steps", "tokens that each client generates", positive, 100)
    parser.add("--llama-server", "llama.cpp's server, to compare with", Path)
    args = parser.parse()
    if args.prompt + args.steps > args.ctx_size:
        parser.error(f"-p and -n need {args.prompt + args.steps} tokens, a slot has {args.ctx_size} (-c)")
    model = ["-m", str(args.model)] if args.model else []
    rows = []
    names = [f"{what}, {slots} slots" for slots in args.slots for what in ("idle MiB", "peak MiB", "t/s")]
    print(common.head("server", *names), flush=True)
    for name in ("llama-server", "contiguous", "paged"):
        if name == "llama-server" and args.llama_server is None:
            continue
        cells = []
        for slots in args.slots:
            own = [*model, "-np", str(slots), "-ctk", "f16", "-ctv", "f16"]
            found = []
            for _ in range(args.repeat):
                before = children()
                if name == "llama-server":
                    server = llama_server(args.llama_server, [*own, "-c", str(slots * args.ctx_size)])
                else:
                    pages = "--kv-cache-paged" if name == "paged" else "--no-kv-cache-paged"
                    server = serving(Variant(name, (*own, "-c", str(args.ctx_size), pages)), START_SECONDS)
                with server as url:
                    (pid,) = children() - before
                    idle = memory(pid, "VmRSS")
                    rate = load(url, slots, args.prompt, args.steps)
                    found.append({"idle": idle, "peak": memory(pid, "VmHWM"), "rate": rate})
            rows += [{"server": name, "slots": slots, **row} for row in found]
            cells += [
                f"{statistics.median(row[key] for row in found):,.0f}" for key in ("idle", "peak", "rate")
            ]
        print(common.row(name, *cells), flush=True)
    common.write_json(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
