"""Trains the embedded model: ``python -m jaxpaged_model.tiny.train`` (``make train-tiny``).

A Llama of 3.8 million parameters learns the text of Python's standard library, twice, and of packages, once, on a CPU.
Matrices are optimized with Muon (Keller Jordan et al., 2024), embeddings and norms with AdamW; the learning rate warms
up, stays constant, and decays linearly to zero at the limit of steps or minutes, whichever comes first. A last phase
teaches it out of loops (``loops.py``).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax import Array
from safetensors.numpy import load_file, save_file

from jaxpaged.pages.batch import Batch
from jaxpaged_model.checkpoint.loading import load_model
from jaxpaged_model.config import ModelConfig
from jaxpaged_model.llama import abstract_params, functional, random_params
from jaxpaged_model.tiny.corpus import (
    END_OF_TEXT,
    Corpus,
    download_packages,
    encode,
    read_corpus,
    read_packages,
    read_tokenizer,
    token_id,
    train_tokenizer,
)
from jaxpaged_model.tiny.loops import continuations, loop_tokens, unlikelihood

CONFIG = ModelConfig(
    architecture="llama",
    name="tiny-python",
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=640,
    num_layers=4,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=64,
    context_length=1024,
    tie_embeddings=True,
)
TOKENS_PER_STEP = 8192
WARMUP_STEPS = 60
HOLD = 0.4
# Windows are short at first, because attention over them is cheap, and as long as the context at last.
SHORT_CONTEXT = 256
LONG_CONTEXT_FROM = 0.8
LOOP_LEARNING_RATE = 5e-4
UNLIKELIHOOD_WEIGHT = 0.25


@jax.tree_util.register_static
@dataclass(frozen=True)
class Dense:
    """Replaces the cache in training: causal attention over ``num_seqs`` sequences of equal length."""

    num_seqs: int

    def attend(self, layer: int, q: Array, k: Array, v: Array, batch: Batch, **_: Any) -> tuple[Array, Dense]:
        q4, k4, v4 = (x.reshape(self.num_seqs, -1, *x.shape[1:]) for x in (q, k, v))
        return jax.nn.dot_product_attention(q4, k4, v4, is_causal=True).reshape(q.shape), self


def token_log_probs(params: Any, tokens: Array) -> Array:
    """Log-probabilities in nats of ``tokens[:, 1:]`` given the tokens before: ``f32[B, S - 1]``."""
    num_seqs, length = tokens.shape[0], tokens.shape[1] - 1
    position = jnp.tile(jnp.arange(length), num_seqs)
    sequence = jnp.repeat(jnp.arange(num_seqs), length)
    cu_q_lens = jnp.arange(num_seqs + 1) * length
    batch = Batch(sequence, position, position, sequence, position, cu_q_lens)
    rows = jnp.arange(num_seqs * length)
    apply = functional(CONFIG)
    logits, _ = apply(params, tokens[:, :-1].reshape(-1), Dense(num_seqs), batch, rows)
    log_probs = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_probs, tokens[:, 1:].reshape(-1, 1), axis=1).reshape(num_seqs, length)


def make_optimizer(params: Any) -> optax.GradientTransformation:
    """Optimizer at learning-rate scale 1; ``train_step`` multiplies updates by the schedule."""
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "matrix" if "kernel" in jax.tree_util.keystr(path) else "rest", params
    )
    # Kernels are stacked by layer, [num_layers, in, out]; each layer's is a matrix of its own.
    stacked = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    muon = optax.contrib.muon(
        0.02,
        weight_decay=0.01,
        muon_weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: stacked, tree),
    )
    return optax.partition(
        {
            "matrix": muon,
            "rest": optax.adamw(3e-3, b2=0.95, weight_decay=0.01),
        },
        labels,
    )


@partial(jax.jit, static_argnames="optimizer", donate_argnames=("params", "state"))
def train_step(
    optimizer: optax.GradientTransformation, params: Any, state: Any, tokens: Array, scale: Array
) -> tuple[Any, Any, Array]:
    """One step; ``params`` and ``state`` are donated."""
    loss, grads = jax.value_and_grad(lambda p: -token_log_probs(p, tokens).mean())(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, jax.tree.map(lambda u: u * scale, updates)), state, loss


log_probs_of = jax.jit(token_log_probs)


def unlooped_loss(params: Any, tokens: Array, texts: Array, marked: Array) -> Array:
    """Negative log-likelihood of ``tokens``, plus a share of the unlikelihood of marked tokens of ``texts``: f32[]."""
    against = unlikelihood(token_log_probs(params, texts), marked[:, 1:])
    return UNLIKELIHOOD_WEIGHT * against - token_log_probs(params, tokens).mean()


def train_out_of_loops(
    params: Any,
    stream: np.ndarray,
    steps: int,
    rng: np.random.Generator,
    *,
    rows: int = 64,
    num_new: int = 128,
) -> tuple[Any, list[float]]:
    """Lowers the probability of loops in greedy texts.

    Args:
      params: trained weights.
      stream: the training text, i32[N].
      steps: number of optimizer steps.
      rng: chooses the prompts and the text beside them.
      rows: continuations of a step.
      num_new: tokens of each.

    Returns:
      The new weights, and the share of continuations that ended in a loop at each step.
    """
    optimizer = optax.adamw(optax.linear_schedule(LOOP_LEARNING_RATE, 0.0, steps), b2=0.95)

    @jax.jit
    def step(params: Any, state: Any, *data: Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(unlooped_loss)(params, *data), state, params)
        return optax.apply_updates(params, updates), state

    def windows(count: int, length: int) -> np.ndarray:
        return np.stack([stream[o : o + length] for o in rng.integers(len(stream) - length, size=count)])

    state, shares = optimizer.init(params), []
    for i in range(steps):
        texts = continuations(CONFIG, params, windows(rows, 32), num_new)
        marked = loop_tokens(texts)
        marked[:, :32] = False
        shares.append(float(marked[:, -1].mean()))
        params, state = step(
            params, state, windows(TOKENS_PER_STEP // SHORT_CONTEXT, SHORT_CONTEXT + 1), texts, marked
        )
        if (i + 1) % 20 == 0:
            print(f"against loops: step {i + 1}, {np.mean(shares[-20:]):.1%} of texts end in one", flush=True)
    return params, shares


def save_params(path: Path, params: Any) -> None:
    """Writes weights to a safetensors file, by their paths in the pytree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    save_file({jax.tree_util.keystr(where): np.asarray(leaf) for where, leaf in leaves}, path)


def read_params(path: Path) -> Any:
    """Reads weights that ``save_params`` wrote."""
    tensors = load_file(path)
    return jax.tree_util.tree_map_with_path(
        lambda where, leaf: jnp.asarray(tensors[jax.tree_util.keystr(where)], leaf.dtype),
        abstract_params(CONFIG),
    )


def starting_params(init: Path | None, seed: int) -> Any:
    """Random weights, or those of a GGUF file from which to continue.

    Raises:
      SystemExit: the file's sizes differ from this run's.
    """
    if init is None:
        return random_params(CONFIG, seed=seed)
    loaded = load_model(init, weights="dequantized")
    if jax.tree.map(jnp.shape, loaded.params) != jax.tree.map(jnp.shape, abstract_params(CONFIG)):
        raise SystemExit(f"{init}: not a model of this shape; train without --init")
    return loaded.params


class Score(NamedTuple):
    """Bits per byte over the held-out files."""

    bits_per_byte: float
    num_bytes: int


def evaluate(params: Any, files: list[np.ndarray], num_bytes: int, end: int, context: int = 512) -> Score:
    """Compression of ``files`` by the model: windows that overlap by half, each token counted once."""
    nats, step = 0.0, context // 2
    windows, counted = [], []
    for ids in files:
        ids = np.concatenate([[end], ids])
        for start in range(0, max(1, len(ids) - 1 - step), step):
            piece = ids[start : start + context + 1]
            mask = np.zeros(context, bool)
            mask[0 if start == 0 else step : len(piece) - 1] = True
            windows.append(np.pad(piece, (0, context + 1 - len(piece)), constant_values=end))
            counted.append(mask)
    for i in range(0, len(windows), 8):
        block, mask = np.stack(windows[i : i + 8]), np.stack(counted[i : i + 8])
        missing = 8 - len(block)
        block, mask = np.pad(block, ((0, missing), (0, 0))), np.pad(mask, ((0, missing), (0, 0)))
        nats -= float((np.asarray(log_probs_of(params, block)) * mask).sum())
    return Score(nats / np.log(2) / num_bytes, num_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/tiny"), help="folder for what the run leaves")
    parser.add_argument("--steps", type=int, default=2200, help="optimizer steps at most (8,192 tokens each)")
    parser.add_argument("--minutes", type=float, default=90.0, help="minutes of training at most")
    parser.add_argument("--loop-steps", type=int, default=150, help="steps against loops, after that")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the text")
    parser.add_argument("--init", type=Path, help="go on from the weights and vocabulary of this GGUF file")
    parser.add_argument(
        "--learning-rate", type=float, default=1.0, help="times that of a run from random weights"
    )
    parser.add_argument(
        "--packages",
        type=Path,
        default=Path("build/wheels"),
        help="folder to download wheels of packages into",
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    library = read_corpus()
    download_packages(args.packages)
    packages = read_packages(args.packages, library)
    if args.init:
        tokenizer = read_tokenizer(args.init)
    else:
        tokenizer = train_tokenizer(Corpus({**library.train, **packages.train}, {}), CONFIG.vocab_size)
    tokenizer.save(str(args.out / "tokenizer.json"))
    end = token_id(tokenizer, END_OF_TEXT)
    library_tokens, package_tokens = encode(tokenizer, library.train), encode(tokenizer, packages.train)
    stream = np.concatenate([*library_tokens, *package_tokens, *library_tokens])
    held_out = encode(tokenizer, library.held_out)
    held_out_bytes = sum(len(t.encode()) for t in library.held_out.values())
    for name, corpus, tokens in ("library", library, library_tokens), ("packages", packages, package_tokens):
        num_bytes = sum(len(text.encode()) for text in corpus.train.values())
        print(
            f"{name}: {len(corpus.train)} files, {num_bytes} bytes, {sum(map(len, tokens))} tokens",
            flush=True,
        )
    print(f"held out of the library: {len(library.held_out)} files, {held_out_bytes} bytes", flush=True)

    rng = np.random.default_rng(args.seed)
    params = starting_params(args.init, args.seed)
    optimizer = make_optimizer(params)
    state = optimizer.init(params)
    log: list[dict[str, float]] = []
    offsets, offsets_length = np.empty(0, np.int64), 0
    start, step, progress = time.perf_counter(), 0, 0.0
    while progress < 1.0:
        length = CONFIG.context_length if progress >= LONG_CONTEXT_FROM else SHORT_CONTEXT
        rows = TOKENS_PER_STEP // length
        if len(offsets) < rows or offsets_length != length:
            # An epoch: every window of the stream once, from a random start, shuffled.
            shift = rng.integers(length)
            offsets = rng.permutation(np.arange(shift, len(stream) - length - 1, length))
            offsets_length = length
        picked, offsets = offsets[:rows], offsets[rows:]
        windows = np.stack([stream[o : o + length + 1] for o in picked])
        scale = (
            args.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, (1 - progress) / (1 - HOLD))
        )
        params, state, loss = train_step(optimizer, params, state, windows, jnp.float32(scale))
        step += 1
        elapsed = time.perf_counter() - start
        progress = max(step / args.steps, elapsed / (60 * args.minutes))
        log.append({"step": step, "seconds": elapsed, "tokens": step * TOKENS_PER_STEP, "loss": float(loss)})
        if step % 200 == 0 or progress >= 1.0:
            score = evaluate(params, held_out, held_out_bytes, end)
            log[-1]["held_out_bits_per_byte"] = score.bits_per_byte
            save_params(args.out / "params.safetensors", params)
        if step % 20 == 0 or progress >= 1.0:
            (args.out / "log.json").write_text(json.dumps(log))
            bpb = log[-1].get("held_out_bits_per_byte", float("nan"))
            print(f"step {step} {elapsed:.0f} s loss {loss:.3f} held-out {bpb:.4f} bits/byte", flush=True)

    save_params(args.out / "before_loops.safetensors", params)
    params, shares = train_out_of_loops(params, stream, args.loop_steps, rng)
    score = evaluate(params, held_out, held_out_bytes, end)
    print(f"after it: held-out {score.bits_per_byte:.4f} bits/byte", flush=True)
    log[-1].update(held_out_bits_per_byte=score.bits_per_byte, seconds=time.perf_counter() - start)
    save_params(args.out / "params.safetensors", params)
    (args.out / "log.json").write_text(json.dumps(log))
    (args.out / "loops.json").write_text(json.dumps(shares))


if __name__ == "__main__":
    main()
