# %% [markdown]
# # Generating from a checkpoint
#
# `generate` is one XLA program: it prefills the prompts, allocates pages, decodes, samples, forks samples and
# frees pages without returning to Python. This notebook runs it on the model that comes with the package, 3.8M
# parameters trained on Python. `MODEL=model.gguf` in the environment takes another file.

# %%
import os

import jax
import matplotlib.pyplot as plt
import numpy as np

import jaxpaged
from jaxpaged import PagedKVCache, SamplingParams
from jaxpaged_model import load_model, tiny

plt.style.use("style.mplstyle")
loaded = load_model(os.environ.get("MODEL", tiny.PATH))
tokenizer, stop_ids = loaded.tokenizer, sorted(loaded.tokenizer.stop_ids)
print(
    loaded.config.num_layers,
    "layers,",
    loaded.config.num_kv_heads,
    "KV heads of",
    loaded.config.head_dim,
)


def create(max_seqs):
    """An empty cache with pages for 512 tokens of each sequence."""
    return PagedKVCache.create(
        **loaded.config.cache_spec,
        num_pages=64 * max_seqs,
        page_size=8,
        max_seqs=max_seqs,
    )


# %% [markdown]
# ## A batch of prompts
#
# Prompts have any lengths; they are packed, not padded. Six prompts on a cache of four sequences: two of them wait
# in a queue on the device, and take the pages of those that end first. The cache is donated, so go on with the one
# that comes back.

# %%
prompts = [
    tokenizer.encode(text)
    for text in (
        "def read_lines(path):\n",
        "class Stack:\n    def __init__(self):\n",
        "import os\nimport ",
        "for i in range(",
        "def __len__(self):\n        return ",
        "try:\n    value = int(text)\nexcept ",
    )
]
result, cache = jaxpaged.generate(
    loaded.function,
    loaded.params,
    create(4),
    prompts,
    max_new_tokens=24,
    stop_ids=stop_ids,
)
texts = result.token_lists()
assert len(texts) == len(prompts)
assert cache.pages_used == 0
for prompt, tokens in zip(prompts, texts, strict=True):
    print(repr(tokenizer.decode(prompt)), "->", repr(tokenizer.decode(tokens)[:48]))
print(
    f"\n{result.num_steps} runs of the model, at most {result.pages_peak} pages in use"
)

# %% [markdown]
# A prompt in a batch gets the tokens that it gets alone:

# %%
alone, cache = jaxpaged.generate(
    loaded.function,
    loaded.params,
    cache,
    prompts[1:2],
    max_new_tokens=24,
    stop_ids=stop_ids,
)
assert alone.token_lists()[0] == texts[1]

# %% [markdown]
# ## Sampling
#
# Parameters are llama.cpp's, one value for all rows or one a row, and data: other values run in the same program.
# With `n` a prompt is read once and its samples share its pages. Random numbers depend on a row's seed and on the
# position, never on what else is in the batch.

# %%
options = {"n": 4, "max_new_tokens": 24, "stop_ids": stop_ids}
sampling = SamplingParams.create(
    4, temperature=[0.3, 0.6, 0.9, 1.2], top_p=0.95, seed=7
)
samples, cache = jaxpaged.generate(
    loaded.function, loaded.params, cache, prompts[:1], sampling=sampling, **options
)
for temperature, tokens in zip(
    sampling.temperature, samples.token_lists(), strict=True
):
    print(f"{temperature:.1f}", repr(tokenizer.decode(tokens)[:64]))
same, cache = jaxpaged.generate(
    loaded.function, loaded.params, cache, prompts[:1], sampling=sampling, **options
)
assert same.token_lists() == samples.token_lists()

# %% [markdown]
# ## How sure is the model?
#
# `logprobs=0` returns the log-probability of every token by the model's own logits. `score` computes the same
# numbers for a text that is given, in one pass.

# %%
result, cache = jaxpaged.generate(
    loaded.function,
    loaded.params,
    cache,
    prompts[:1],
    max_new_tokens=90,
    sampling=SamplingParams.create(1, temperature=0.7, seed=3),
    logprobs=0,
)
tokens = result.token_lists()[0]
logprobs = np.asarray(result.logprobs)[0, : len(tokens)]

text = np.array([prompts[0] + tokens])
score = jax.jit(
    lambda params, cache: jaxpaged.score(loaded.function, params, cache, text)
)
scored, _ = score(loaded.params, create(1))
difference = abs(np.asarray(scored)[0, len(prompts[0]) :] - logprobs).max()
print(f"{len(tokens)} tokens; generate and score differ by at most {difference:.3f}")
assert difference < 0.1

# %% tags=["remove-input"]
WIDTH = 62


def cells(tokens, values):
    """Row, column, text and value of each piece of a token on a line of its own."""
    row = column = 0
    for token, value in zip(tokens, values, strict=True):
        for i, piece in enumerate(tokenizer.decode([token]).split("\n")):
            if i or column + len(piece) > WIDTH:
                row, column = row + 1, 0
            if piece:
                yield row, column, piece, value
            column += len(piece)


drawn = list(
    cells(prompts[0] + tokens, [None] * len(prompts[0]) + list(np.exp(logprobs)))
)
rows = 1 + max(row for row, *_ in drawn)
colours = plt.get_cmap("RdYlGn")
figure, axis = plt.subplots(figsize=(6.4, 0.19 * rows + 0.75))
for row, column, piece, value in drawn:
    colour = "#e7ebf0" if value is None else colours(0.1 + 0.8 * value)
    axis.add_patch(
        plt.Rectangle((column + 0.04, row), len(piece) - 0.08, 0.9, color=colour)
    )
    axis.text(column, row + 0.47, piece, va="center", family="monospace", fontsize=9.6)
axis.set(xlim=(0, WIDTH), ylim=(rows, -0.2), title="Probability of each sampled token")
axis.axis("off")
mappable = plt.cm.ScalarMappable(norm=plt.Normalize(-0.125, 1.125), cmap=colours)
bar = figure.colorbar(
    mappable, ax=axis, orientation="horizontal", aspect=50, fraction=0.03, pad=0.02
)
bar.ax.set_xlim(0, 1)
bar.set_ticks([0, 0.25, 0.5, 0.75, 1])
plt.show()

# %% [markdown]
# Grey is the prompt. Green tokens were nearly certain, such as indentation, the rest of a word, or what the text has
# said before. Red ones are where it could have gone elsewhere.
#
# ## Streaming
#
# `generate_stream` hands tokens out while the same loop runs on the device: the first after the prefill, then a few
# steps at a time. The tokens are those of `generate`.

# %%
stream = jaxpaged.generate_stream(
    loaded.function,
    loaded.params,
    create(1),
    prompts[1:2],
    max_new_tokens=24,
    stop_ids=stop_ids,
    every=8,
)
streamed = []
for chunk in stream:
    streamed += chunk.tokens[0]
    print(len(chunk.tokens[0]), "tokens:", repr(tokenizer.decode(chunk.tokens[0])))
assert streamed == texts[1]

# %% [markdown]
# ## Beams
#
# A beam search forks and ends sequences at every step. On pages that moves no keys: `seq_reorder` edits rows of the
# table, and beams share what they have in common.

# %%
found, _ = jaxpaged.beam_search(
    loaded.function,
    loaded.params,
    create(4),
    prompts[:1],
    num_beams=4,
    num_return_sequences=3,
    max_new_tokens=24,
    stop_ids=stop_ids,
)
best = np.asarray(found.score)[0]
for tokens, count, value in zip(
    found.tokens[0], found.num_tokens[0], best, strict=True
):
    print(f"{value:.3f}", repr(tokenizer.decode(tokens[:count].tolist())[:60]))
print(f"pages at most: {found.pages_peak} with sharing, {found.unshared_peak} without")
assert (np.diff(best) <= 0).all()
assert found.pages_peak < found.unshared_peak

# %% [markdown]
# ## Prompt lookup
#
# Where a text repeats itself, as code does, several tokens can be guessed by copying what followed the last ones
# earlier. One run of the model checks the whole guess. `lookup=Lookup()` does that inside the loop, with the same
# tokens as a result, in fewer runs.

# %%
code = "".join(
    f"    parser.add_argument('--{name}', type=int, default=0)\n"
    for name in ("rows", "columns", "depth")
)
prompt = [tokenizer.encode("def options(parser):\n" + code)]
runs = {}
for drafts in (0, 2, 4, 8):
    lookup = jaxpaged.Lookup(num_draft=drafts) if drafts else None
    result, cache = jaxpaged.generate(
        loaded.function, loaded.params, cache, prompt, max_new_tokens=96, lookup=lookup
    )
    runs[drafts] = (
        result.token_lists()[0],
        int(result.num_steps),
        int(result.drafted[0]),
        int(result.accepted[0]),
    )
for tokens, *_ in runs.values():
    assert tokens == runs[0][0]

# %% tags=["remove-input"]
figure, axis = plt.subplots(figsize=(6.4, 2.9))
names = ["none"] + [str(drafts) for drafts in runs if drafts]
steps = [steps for _, steps, _, _ in runs.values()]
bars = axis.bar(names, steps, color=["#7d8590"] + ["#0072b2"] * 3, width=0.65)
labels = [
    f"{steps}\n{accepted} of {drafted}\nkept" if drafted else steps
    for _, steps, drafted, accepted in runs.values()
]
axis.bar_label(bars, labels, fontsize=9.5, padding=2)
axis.set(
    xlabel="tokens of a draft", ylabel="runs of the model", ylim=(0, 1.35 * max(steps))
)
axis.set_title(f"Prompt lookup: {len(runs[0][0])} tokens of repetitive code")
axis.grid(axis="x", visible=False)
plt.show()

# %% [markdown]
# More about every argument: [generation](../guides/generation.md).
