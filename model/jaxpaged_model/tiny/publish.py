"""Publishes a finished training run: ``python -m jaxpaged_model.tiny.publish --run build/tiny``.

Writes the GGUF file and the loss curve next to this file, and prints the numbers of the model card: bits per byte on
the held-out files of the float32 weights, of the Q8_0 file as ``load_model`` reads it, and of xz.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path

import matplotlib
import numpy as np
from tokenizers import Tokenizer

from jaxpaged_model.checkpoint.export import write_gguf
from jaxpaged_model.checkpoint.loading import load_model
from jaxpaged_model.tiny import PATH
from jaxpaged_model.tiny.corpus import END_OF_TEXT, Corpus, encode, read_corpus, token_id, tokenizer_metadata
from jaxpaged_model.tiny.train import CONFIG, evaluate, read_params

PICTURE = PATH.with_name("loss.png")


def xz_bits_per_byte(corpus: Corpus) -> tuple[float, float]:
    """Bits per byte of ``xz -9`` on the held-out files: all of them in one stream, and each alone."""
    texts = [text.encode() for text in corpus.held_out.values()]
    total = sum(len(t) for t in texts)
    together = len(lzma.compress(b"".join(texts), preset=9))
    alone = sum(len(lzma.compress(t, preset=9)) for t in texts)
    return 8 * together / total, 8 * alone / total


def plot(log: list[dict[str, float]], xz: float, path: Path) -> None:
    """Training loss and held-out bits per byte over tokens seen."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, loss_axis = plt.subplots(figsize=(8, 4.5))
    tokens = np.array([row["tokens"] for row in log]) / 1e6
    loss = np.array([row["loss"] for row in log])
    width = max(1, len(loss) // 60)
    smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
    loss_axis.plot(tokens, loss, color="0.85", linewidth=0.8)
    loss_axis.plot(
        tokens[width - 1 :], smooth, color="tab:blue", label=f"training loss, mean of {width} steps"
    )
    loss_axis.set_xlabel("million tokens seen")
    loss_axis.set_ylabel("nats per token")
    bits_axis = loss_axis.twinx()
    held_out = [
        (row["tokens"] / 1e6, row["held_out_bits_per_byte"]) for row in log if "held_out_bits_per_byte" in row
    ]
    bits_axis.plot(
        *zip(*held_out, strict=True), "o-", color="tab:red", label="held-out bits per byte (right)"
    )
    bits_axis.axhline(xz, color="tab:red", linestyle=":", label="xz -9 on the held-out files, one stream")
    bits_axis.set_ylabel("bits per byte")
    bits_axis.set_ylim(0, None)
    lines = loss_axis.get_legend_handles_labels(), bits_axis.get_legend_handles_labels()
    loss_axis.legend(lines[0][0] + lines[1][0], lines[0][1] + lines[1][1], loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("build/tiny"), help="the folder training wrote")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.run / "tokenizer.json"))
    params = read_params(args.run / "params.safetensors")
    log = json.loads((args.run / "log.json").read_text())

    write_gguf(PATH, CONFIG, params, quantization="Q8_0", tokenizer_metadata=tokenizer_metadata(tokenizer))
    corpus = read_corpus()
    held_out = encode(tokenizer, corpus.held_out)
    num_bytes = sum(len(t.encode()) for t in corpus.held_out.values())
    end = token_id(tokenizer, END_OF_TEXT)
    together, alone = xz_bits_per_byte(corpus)
    plot(log, together, PICTURE)
    print(f"steps {log[-1]['step']}, tokens {log[-1]['tokens']}, seconds {log[-1]['seconds']:.0f}")
    print(f"held out: {len(held_out)} files, {num_bytes} bytes, {sum(map(len, held_out))} tokens")
    print(f"bits per byte: float32 {evaluate(params, held_out, num_bytes, end).bits_per_byte:.4f}")
    quantized = load_model(PATH, weights="dequantized").params
    print(f"bits per byte: Q8_0 file {evaluate(quantized, held_out, num_bytes, end).bits_per_byte:.4f}")
    print(f"bits per byte: xz -9 {together:.4f} in one stream, {alone:.4f} file by file")
    print(f"{PATH.name}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
