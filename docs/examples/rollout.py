"""Policy gradients in one process: the model samples from the paged cache, learns, and samples again.

    python docs/examples/rollout.py --steps 80 --plot rollout.svg

Each step samples n completions of each prompt with ``generate``: the n share the pages of their prompt. A function
rewards them, and one step of Adam follows the policy gradient (REINFORCE; the baseline is the mean reward of a
prompt's completions). The gradient is that of ``forward``, the same model without a cache: it has all tokens at once,
and pages are no place for gradients. Then the new weights sample. They are data, like the key, so that nothing is
compiled again; ``jax.no_tracing`` makes sure.

What makes it correct:

- the policy that samples is the policy that learns: temperature 1, and no top-k, top-p or min-p;
- the log-probability of a token is the same number from ``generate`` (``logprobs=0``), from ``score``, which reads
  given texts through the cache, and from ``forward``: each step compares them.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from plain_jax import forward, init, model
from small_model import VOCAB, create_cache

import jaxpaged

PROMPTS, LENGTH, SAMPLES, NEW = 4, 16, 8, 16
ROWS = PROMPTS * SAMPLES
AS_IT_IS = jaxpaged.SamplingParams.unmodified(ROWS)
ADAM = optax.adam(3e-4)


def reward(tokens):
    """f32[R]: share of even tokens of ``i32[R, NEW]``; half of them, by chance."""
    return jnp.mean(tokens % 2 == 0, axis=1)


def loss(weights, texts, advantages):
    """Policy-gradient loss f32[], and the log-probabilities f32[R, NEW] of the completions."""
    logits = jax.vmap(forward, (None, 0))(weights, texts)[:, LENGTH - 1 : -1]
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), texts[:, LENGTH:, None], axis=2)[..., 0]
    return -jnp.mean(advantages[:, None] * logprobs), logprobs


@jax.jit
def learn(weights, state, texts, rewards):
    """One step of Adam: new weights, state of Adam, and the log-probabilities before the step."""
    of_prompts = rewards.reshape(PROMPTS, SAMPLES)
    advantages = (of_prompts - of_prompts.mean(axis=1, keepdims=True)).reshape(ROWS)
    (_, logprobs), gradient = jax.value_and_grad(loss, has_aux=True)(weights, texts, advantages)
    updates, state = ADAM.update(gradient, state, weights)
    return optax.apply_updates(weights, updates), state, logprobs


score = jax.jit(functools.partial(jaxpaged.score, model), donate_argnames="cache")


def train(steps, seed=0):
    """Mean reward of each step's completions, and the largest difference of log-probabilities."""
    weights = init(jax.random.key(seed))
    state = ADAM.init(weights)
    cache = create_cache(max_seqs=ROWS, num_pages=ROWS * 4)
    prompts = jax.random.randint(jax.random.key(seed + 1), (PROMPTS, LENGTH), 0, VOCAB)
    keys = jax.random.split(jax.random.key(seed + 2), steps)
    history, worst = [], 0.0
    for step in range(steps):
        with jax.no_tracing(step > 1):
            result, cache = jaxpaged.generate(
                model,
                weights,
                cache,
                prompts,
                n=SAMPLES,
                max_new_tokens=NEW,
                sampling=AS_IT_IS,
                key=keys[step],
                logprobs=0,
            )
            sampled, logprobs = result.tokens[:ROWS, :NEW], result.logprobs[:ROWS, :NEW]
            texts = jnp.concatenate([jnp.repeat(prompts, SAMPLES, axis=0), sampled], axis=1)
            rewards = reward(sampled)
            scored, cache = score(weights, cache, texts)
            weights, state, learned = learn(weights, state, texts, rewards)
        for other in (scored[:, LENGTH:], learned):
            worst = max(worst, float(np.abs(other - logprobs).max()))
        history.append(float(rewards.mean()))
    return history, worst


def plot(history, path):
    from matplotlib import pyplot

    style = {"svg.hashsalt": "jaxpaged", "font.size": 9, "axes.grid": True, "grid.color": "#dddddd"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, axis = pyplot.subplots(figsize=(6, 2.6), layout="constrained")
        axis.plot(history, color="#2f6fb0")
        axis.set(xlabel="step", ylabel="mean reward", ylim=(0.4, 1.02), xlim=(0, len(history) - 1))
        figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--plot", type=Path, help="SVG of the reward; needs matplotlib")
    options = parser.parse_args()
    history, worst = train(options.steps)
    print(f"mean reward {np.mean(history[:5]):.2f} at the start, {np.mean(history[-5:]):.2f} at the end")
    print(f"log-probabilities of generate, score and forward differ by {worst:.0e} at most")
    if options.plot:
        plot(history, options.plot)


if __name__ == "__main__":
    main()
