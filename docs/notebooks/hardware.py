# %% [markdown]
# # What a machine can give
#
# A decode step reads every weight and every live key and value once. So the bandwidth of the memory, divided by those
# bytes, bounds the tokens a second of any implementation, before anything is run. This notebook measures this
# machine, asks `jaxpaged explain` for the bytes, predicts, and measures a model. The same steps, with scripts, serve a
# rented TPU or GPU.
#
# It runs in a clone of the repository, for `tpu_scripts`.

# %%
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxpaged
from jaxpaged_model import ModelConfig, load_model

sys.path.append("../..")
from tpu_scripts.bench.memory import Bandwidth, num_cores
from tpu_scripts.bench.models import write_random_model

plt.style.use("style.mplstyle")

# %% [markdown]
# ## The machine
#
# Bandwidth on a CPU is what all cores read together, from an array that is larger than the caches of most machines.
# Arithmetic is a product of two large matrices. Both are the best of several rounds, because a bound is wanted; on a
# machine that does other work at the same time both are lower.

# %%
memory = Bandwidth(1 << 30)
product = jax.jit(lambda a, b: a @ b)
a = jnp.ones((2048, 2048))


def seconds(call, rounds):
    """Least time of a call, behind two that are not counted."""
    times = []
    for _ in range(rounds + 2):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times[2:])


def machine():
    """Bytes and floating-point operations a second."""
    taken = seconds(lambda: product(a, a).block_until_ready(), 7)
    return max(memory.limit() for _ in range(9)), 2 * 2048**3 / taken


before = machine()
print(f"{jax.default_backend()}, {num_cores()} cores")
print(f"{before[0] / 1e9:.1f} GB/s, {before[1] / 1e9:.0f} Gflop/s in float32")

# %% [markdown]
# ## The bytes of a step
#
# The model has random weights, which take the same time as any others: a Llama of 60M parameters, stored as F32.
# `explain` needs no weights and no device; `--platform tpu` or `gpu` says what would run there.

# %%
config = ModelConfig("llama", 8192, 640, 1792, 10, 10, 5, 64, 2048, tie_embeddings=True)
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "random.gguf"
write_random_model(path, config, "F32")

BATCHES, LIVE = (1, 4, 16), 512
command = [
    "explain",
    "-m",
    str(path),
    "-b",
    ",".join(map(str, BATCHES)),
    "-c",
    str(LIVE),
    "--json",
]
explained = json.loads(
    subprocess.run(
        [sys.executable, "-m", "jaxpaged.app.cli", *command],
        check=True,
        capture_output=True,
    ).stdout
)
kv_bytes = [step["kv_bytes_a_step"] for step in explained["steps"]]
for step in explained["steps"][: len(BATCHES)]:
    print(
        f"{step['step']}: {step['implementation']}, {step['kv_bytes_a_step'] / 1e6:.0f} MB of keys and values"
    )

a_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
assert kv_bytes[:3] == [a_token * LIVE * sequences for sequences in BATCHES]

loaded = load_model(path)
weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
print(f"weights: {weight_bytes / 1e6:.0f} MB")

# %% [markdown]
# ## Predicted, and measured
#
# A step of B sequences gives B tokens and reads the weights once, so a larger batch is more tokens for nearly the
# same bytes, until keys and values weigh as much as the weights. The bound is the bandwidth over the bytes.


# %%
def step(params, cache, tokens, num_new):
    cache, batch, ok = jaxpaged.reserve(cache, num_new, num_tokens=len(tokens))
    logits, cache = loaded.function(params, tokens, cache, batch, batch.last_rows)
    return logits, cache, ok


step = jax.jit(step, donate_argnames="cache")


def time_step(sequences, live, new):
    """Seconds of a step that adds ``new`` tokens to each of some sequences with ``live`` tokens."""
    cache = jaxpaged.PagedKVCache.create(
        **config.cache_spec,
        num_pages=sequences * 32,
        max_seqs=sequences,
        max_seq_len=1024,
    )
    state, ok = {}, True
    if live:
        cache, _, ok = jaxpaged.reserve(cache, jnp.full(sequences, live))
    assert ok
    state["cache"] = cache
    tokens, num_new = jnp.zeros(sequences * new, jnp.int32), jnp.full(sequences, new)

    def run():
        logits, state["cache"], ok = step(
            loaded.params, state["cache"], tokens, num_new
        )
        assert ok
        logits.block_until_ready()
        if new > 1:
            state["cache"] = jaxpaged.clear(state["cache"])

    return seconds(run, 9 if new == 1 else 3)


def flops(tokens, live):
    """Multiplications and additions of a step, of the weights and of attention."""
    attention = 4 * config.num_layers * config.num_q_heads * config.head_dim * live
    return tokens * (2 * weight_bytes / 4 + attention)


chunk = 256
measured = [1 / time_step(sequences, LIVE, 1) for sequences in BATCHES]
prefill = time_step(1, 0, chunk)

# Once more, because other work on a machine comes and goes.
bandwidth, peak = map(max, before, machine())
bytes_read = [weight_bytes + kv for kv in kv_bytes[: len(BATCHES)]]
for sequences, count, got in zip(BATCHES, bytes_read, measured, strict=True):
    bound = bandwidth / count
    print(
        f"batch {sequences:2}: at most {sequences * bound:4.0f} tokens/s by the bandwidth, "
        f"{sequences * got:4.0f} measured, {got / bound:.0%}"
    )

# %% tags=["remove-input"]
points = [
    (f"decode, batch {sequences}", flops(sequences, LIVE), count, 1 / rate)
    for sequences, count, rate in zip(BATCHES, bytes_read, measured, strict=True)
]
points.append(
    (f"prefill, {chunk} tokens", flops(chunk, chunk / 2), weight_bytes, prefill)
)
intensity = np.geomspace(0.2, 400, 100)
figure, axis = plt.subplots(figsize=(6.4, 4.2))
roof = f"{bandwidth / 1e9:.0f} GB/s and {peak / 1e9:.0f} Gflop/s"
axis.plot(
    intensity,
    np.minimum(intensity * bandwidth, peak) / 1e9,
    color="#7d8590",
    label=roof,
)
colours = ("#56b4e9", "#0072b2", "#003f66", "#d55e00")
for (name, count, read, taken), marker, colour in zip(
    points, "osD^", colours, strict=True
):
    axis.plot(count / read, count / taken / 1e9, marker, ms=9, color=colour, label=name)
axis.set(xscale="log", yscale="log", ylabel="Gflop/s")
axis.set_xlabel("floating-point operations a byte read")
axis.xaxis.set_major_formatter("{x:g}")
axis.yaxis.set_major_formatter("{x:g}")
axis.yaxis.set_minor_formatter("")
lowest = 10 ** np.floor(np.log10(intensity[0] * bandwidth / 1e9))
axis.set_ylim(lowest, 2 * peak / 1e9)
axis.set_title("Roofline of this machine, and the steps measured")
axis.legend(loc="lower right")
plt.show()

# %% [markdown]
# Decoding is on the slope: its speed is the memory's, and what helps is fewer bytes (stored weights, quantized pages)
# or more sequences. Prefill is under the flat part, where arithmetic decides. How far a point is below the line is what
# an implementation leaves. A point above it had a part of its bytes from the chip's cache, or other work slowed the
# machine while its memory was measured.

# %%
folder.cleanup()

# %% [markdown]
# ## On rented hardware
#
# The scripts do this with more care: in turns, with many rounds, and the bandwidth measured again beside each row. A
# first visit:
#
# ```sh
# python -m tpu_scripts                                   # all scripts, a line each
# python -m tpu_scripts.kernel_check.on_device            # are results right here?
# python -m tpu_scripts.bench.paged_attention --plot attention.svg
# python -m tpu_scripts.bench.generate -m model.gguf      # tokens a second of a whole model
# python -m tpu_scripts.bench.tune_paged_attention        # block sizes of this device
# python -m tpu_scripts.capacity -m llama-3.1-8b          # how many chips a day of requests takes
# ```
#
# [On a TPU or a GPU](../guides/hardware.md) explains their columns.
