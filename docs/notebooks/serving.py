# %% [markdown]
# # Serving many clients
#
# This notebook starts `jaxpaged serve` on a free port of this machine, sends it requests from several OpenAI clients
# at once, and draws what happened: when each request waited, was read and was answered, and how full the pool of
# pages was. The model is the one that comes with the package; `MODEL=model.gguf` in the environment takes another.

# %%
import atexit
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
from openai import OpenAI

from jaxpaged_model import tiny

plt.style.use("style.mplstyle")

# %% [markdown]
# ## Start
#
# On the command line this is `jaxpaged serve -m model.gguf -np 4 -c 512 --kv-pages 40 --metrics`: four sequences at
# once, 512 tokens for each, and a pool of 40 pages, fewer than four whole contexts need (4 x 16). The first start
# compiles all programs; the next one finds them in the user's cache folder.

# %%
flags = "-np 4 -c 512 --kv-pages 40 -b 64 --decode-steps 4 --metrics --port 0"
model = os.environ.get("MODEL", str(tiny.PATH))
server = subprocess.Popen(
    [sys.executable, "-m", "jaxpaged.app.cli", "serve", "-m", model, *flags.split()],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
)
atexit.register(server.terminate)
lines = []
for line in server.stdout:  # ends when the server does
    lines.append(line)
    if found := re.search(r"listening on (http://\S+)", line):
        break
else:
    raise RuntimeError("".join(lines))
address = found[1]
print("listening on", re.sub(r"\d+$", "PORT", address))

# %% [markdown]
# ## One client
#
# Any OpenAI client works; here is a stream. `usage` says how many tokens there were, and how many of the prompt were
# found in the cache.

# %%
client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
stream = client.completions.create(
    model="any",
    prompt="class Stack:\n    def __init__(self):\n",
    max_tokens=40,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].text, end="")
    else:
        usage = chunk.usage
print(
    "\n---\n",
    usage.prompt_tokens,
    "tokens of prompt,",
    usage.completion_tokens,
    "generated",
)

# %% [markdown]
# ## A JSON schema, and a tool
#
# With `response_format` the answer follows a schema whatever the model knows: tokens that would leave it are masked
# in the compiled step. A tool call is the same thing with the schema of the tool's arguments. The tiny model has never
# seen a chat, so that the values are arbitrary, and the form is right all the same.

# %%
schema = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Bern", "Lima", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
messages = [{"role": "user", "content": "Where to, and for how long?"}]
answer = client.chat.completions.create(
    model="any",
    messages=messages,
    max_tokens=128,
    temperature=0,
    response_format={
        "type": "json_schema",
        "json_schema": {"name": "trip", "schema": schema},
    },
)
trip = json.loads(answer.choices[0].message.content)
print("schema:", trip)
assert trip["city"] in {"Bern", "Lima", "Oslo"} and 1 <= trip["days"] <= 9

answer = client.chat.completions.create(
    model="any",
    messages=messages,
    max_tokens=128,
    temperature=0,
    tools=[{"type": "function", "function": {"name": "book", "parameters": schema}}],
    tool_choice="required",
    parallel_tool_calls=False,
)
call = answer.choices[0].message.tool_calls[0].function
print("tool:  ", call.name, call.arguments)
assert call.name == "book" and json.loads(call.arguments).keys() == {"city", "days"}

# %% [markdown]
# ## Ten clients at once
#
# Ten requests, one every 20 ms, each in a thread of its own. They share a beginning of some hundred tokens, as
# requests with one system prompt do. Meanwhile another thread reads `/metrics`. The last chunk of a stream says how
# long the prefill took; with the moment of the first token that is the time in the queue, too.

# %%
shared = "".join(
    f"def {name}(path, mode='r'):\n    with open(path, mode) as file:\n        return file.{name}()\n\n\n"
    for name in (
        "read",
        "readline",
        "readlines",
        "fileno",
        "tell",
        "isatty",
        "seekable",
    )
)
begun = time.perf_counter()


def ask(number):
    """One request: when it was sent, scheduled, had its first token, and ended; and its usage."""
    time.sleep(0.02 * number)
    sent = time.perf_counter() - begun
    first = None
    stream = client.completions.create(
        model="any",
        prompt=shared + f"def function_{number}(path):\n",
        max_tokens=60 + 37 * number % 140,
        seed=number,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    for chunk in stream:
        first = first or time.perf_counter() - begun
        if not chunk.choices:
            usage, timings = chunk.usage, chunk.model_extra["timings"]
    scheduled = max(sent, first - timings["prompt_ms"] / 1e3)
    return sent, scheduled, first, time.perf_counter() - begun, usage


def metrics():
    """Values of /metrics by name."""
    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    return {
        name: float(value)
        for name, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)
    }


samples, done = [], threading.Event()


def watch():
    while not done.wait(0.01):
        samples.append((time.perf_counter() - begun, metrics()))


watcher = threading.Thread(target=watch)
before = metrics()
watcher.start()
try:
    with ThreadPoolExecutor(10) as clients:
        requests = list(clients.map(ask, range(10)))
finally:
    done.set()
    watcher.join()
after = metrics()

generated = sum(usage.completion_tokens for *_, usage in requests)
assert generated == sum(60 + 37 * number % 140 for number in range(10))
assert (
    after["jaxpaged_generated_tokens_total"] - before["jaxpaged_generated_tokens_total"]
    == generated
)
assert (
    after["jaxpaged_kv_pages_used"] == 0
)  # all pages are free, or in the prefix cache
cached = [usage.prompt_tokens_details.cached_tokens for *_, usage in requests]
for number, (sent, scheduled, first, _, usage) in enumerate(requests):
    print(
        f"{number}: {usage.prompt_tokens} tokens of prompt, {cached[number]:3} of them cached; waited "
        f"{1e3 * (scheduled - sent):4.0f} ms, first token after {1e3 * (first - sent):4.0f} ms"
    )
assert cached[-1] > usage.prompt_tokens // 2

# %% tags=["remove-input"]
figure, (upper, lower) = plt.subplots(
    2, sharex=True, figsize=(6.4, 5.6), height_ratios=(1.25, 1)
)
parts = {"in the queue": "#cfd6de", "prefill": "#e69f00", "decode": "#0072b2"}
for number, (*times, _) in enumerate(requests):
    for begin, end, colour in zip(times, times[1:], parts.values(), strict=False):
        upper.barh(number, end - begin, left=begin, height=0.72, color=colour)
for name, colour in parts.items():
    upper.barh(0, 0, color=colour, label=name)
upper.invert_yaxis()
upper.set(ylabel="request", yticks=range(10), title="Requests, four at a time")
upper.grid(axis="y", visible=False)
upper.legend(
    loc="lower right", bbox_to_anchor=(1.01, 0.98), ncols=3, fontsize=10, borderpad=0.1
)
at = [when for when, _ in samples]
used, kept, free = (
    [sample[f"jaxpaged_kv_pages_{state}"] for _, sample in samples]
    for state in ("used", "cached", "free")
)
lower.stackplot(
    at,
    used,
    kept,
    free,
    step="post",
    colors=["#0072b2", "#56b4e9", "#e7ebf0"],
    labels=["used", "prefix cache", "free"],
)
lower.set(xlabel="seconds", ylabel="pages", title="The pool, from /metrics")
lower.set(xlim=(0, max(end for *_, end, _ in requests)), ylim=(0, 40))
lower.grid(False)
lower.legend(
    loc="lower right", bbox_to_anchor=(1.01, 0.98), ncols=3, fontsize=10, borderpad=0.1
)
plt.show()

# %% [markdown]
# A request waits while four others run, and takes the place of the first one that ends. Prefill is short behind the
# first requests, because the shared beginning is in the cache: only the last tokens of a prompt are new. Pages of
# finished requests stay in the prefix cache, and are evicted when somebody needs them.

# %%
server.terminate()
assert server.wait(timeout=60) == 0

# %% [markdown]
# [Serving](../guides/serving.md) lists all flags, routes and metrics.
