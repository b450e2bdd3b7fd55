"""The cost of a schema: tokens a second of several sequences, none and all of them constrained, and a mask's time.

    python -m tpu_scripts.bench.structured -m SmolLM2-135M-Instruct.Q4_1.gguf

Needs: pip install -e ".[serve]".

A server in a process of its own is asked for the same number of tokens with and without a schema whose strings never
end by themselves, so that both generate as many. The rows take turns. Masks are computed for each token of a JSON text
by the embedded model's vocabulary, made as large as --vocab with words of letters.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import numpy as np

from jaxpaged.app.bench_serve.servers import Variant, serving
from tpu_scripts import common
from tpu_scripts.common import Parser, positive

_START_SECONDS = 300.0
SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "kind": {"enum": ["red", "green", "blue"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 9999},
        },
        "required": ["name", "kind", "count"],
        "additionalProperties": False,
    },
    "minItems": 200,
}


async def tokens_per_second(url: str, num_seqs: int, num_tokens: int, schema: Any, seed: int) -> float:
    """Tokens a second of sequences that run together, their prompts' time included."""
    async with httpx.AsyncClient(base_url=url, timeout=600.0, trust_env=False) as client:

        async def one(i: int) -> int:
            body = {
                "prompt": f"# {i}\nitems = ", "max_tokens": num_tokens, "temperature": 0.8, "seed": seed + i,
            }  # fmt: skip
            if schema is None:
                body["ignore_eos"] = True
            else:
                body["json_schema"] = schema
            response = await client.post("/v1/completions", json=body)
            response.raise_for_status()
            return response.json()["usage"]["completion_tokens"]

        begin = time.perf_counter()
        counts = await asyncio.gather(*map(one, range(num_seqs)))
        return sum(counts) / (time.perf_counter() - begin)


def mask_seconds(vocab_size: int) -> list[float]:
    """Seconds of each mask along a JSON text, with a vocabulary of random words."""
    import llguidance

    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", np.uint8)
    words = [bytes([i]) for i in range(256)]
    words += [bytes(rng.choice(letters, int(rng.integers(2, 9)))) for _ in range(vocab_size - 257)]
    words.append(b"<end>")

    class Words:
        eos_token_id, bos_token_id, tokens, special_token_ids = vocab_size - 1, None, words, [vocab_size - 1]

        def __call__(self, text: str) -> list[int]:
            return list(text.encode())

    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Words()), n_vocab=vocab_size)
    source = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA))
    matcher = llguidance.LLMatcher(tokenizer, source, log_level=0)
    mask = np.zeros(-(-vocab_size // 32), np.int32)
    seconds = []
    for token in json.dumps([{"name": "a b c", "kind": "red", "count": i} for i in range(40)]).encode():
        begin = time.perf_counter()
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        seconds.append(time.perf_counter() - begin)
        matcher.consume_token(token)
    return seconds


def main() -> None:
    parser = Parser(__doc__, model_file=None, repeat=5, json=None)
    parser.add("--sequences", "sequences at once", positive, 8)
    parser.add("--tokens", "tokens of each", positive, 128)
    parser.add("--vocab", "tokens of the vocabulary whose masks are timed", positive, 150_000)
    args = parser.parse()
    flags = ("-c", "512", "-np", str(args.sequences), "--log-disable")
    flags += () if args.model is None else ("-m", str(args.model))
    rates: dict[str, list[float]] = {"none": [], "all constrained": []}
    with serving(Variant("server", flags), _START_SECONDS) as url:
        for turn in range(-1, args.repeat):  # the first turn warms up
            for name, schema in (("none", None), ("all constrained", SCHEMA)):
                found = asyncio.run(
                    tokens_per_second(url, args.sequences, args.tokens, schema, 1000 * turn + 1000)
                )
                if turn >= 0:
                    rates[name].append(found)
    print(common.head("sequences", "tokens/s, median", "all runs"))
    for name, values in rates.items():
        print(common.row(name, f"{np.median(values):.0f}", " ".join(f"{value:.0f}" for value in values)))
    ratio = np.median(rates["all constrained"]) / np.median(rates["none"])
    seconds = mask_seconds(args.vocab)
    print(f"all constrained / none = {ratio:.2f}")
    print(
        f"mask of {args.vocab} tokens: median {1e6 * np.median(seconds):.0f} us, "
        f"99 % below {1e6 * np.percentile(seconds, 99):.0f} us"
    )
    common.write_json(args.json, {"rates": rates, "mask_seconds": seconds})


if __name__ == "__main__":
    main()
