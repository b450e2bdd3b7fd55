"""Laws of which tokens are sampled: never padding, never the end under --ignore-eos, and nothing at all from NaN."""

from __future__ import annotations

import json

import numpy as np
import pytest
from jaxpaged_model.text.tokenizer import Tokenizer

END = 256  # the token that ends a text of the models in conftest.py


@pytest.mark.parametrize("method", [("--temp", "0"), ("--beams", "2"), ("--temp", "0", "--lookup", "4")])
def test_ignore_eos_forbids_the_end_of_the_text(here, ending_model_path, method):
    flags = ("generate", "-m", ending_model_path, "-p", "def f(x):", "-n", "8", "--json", *method)
    ends = json.loads(here(*flags).stdout)
    assert (ends["tokens"], ends["finish_reason"]) == ([], "stop")
    goes_on = json.loads(here(*flags, "--ignore-eos").stdout)
    assert len(goes_on["tokens"]) == 8 and END not in goes_on["tokens"]
    assert goes_on["finish_reason"] == "length"


@pytest.fixture
def knows(monkeypatch):
    """Makes tokenizers know the first so many tokens of a vocabulary."""
    read = Tokenizer.from_gguf

    def limit(count):
        def limited(metadata):
            tokenizer = read(metadata)
            tokenizer.vocab_size = count
            return tokenizer

        monkeypatch.setattr(Tokenizer, "from_gguf", limited)

    return limit


def test_ids_beyond_the_tokenizer_are_neither_sampled_nor_scored(here, model_path, tmp_path, knows):
    """For models with a padded vocabulary, as many of Hugging Face have."""
    (tmp_path / "text").write_text("def f(x):" * 9)
    scored = ("perplexity", "-m", model_path, "-f", tmp_path / "text", "-c", "32", "--json")
    whole = json.loads(here(*scored).stdout)
    knows(200)  # of 259
    flags = (
        "-p",
        "x",
        "-n",
        "110",
        "-np",
        "4",
        "--temp",
        "99",
        "--top-k",
        "0",
        "--top-p",
        "1",
        "--min-p",
        "0",
    )
    result = here("generate", "-m", model_path, *flags, "-s", "1", "--json", "--ignore-eos")
    drawn = np.array([choice["tokens"] for choice in json.loads(result.stdout)["choices"]])
    assert drawn.shape == (4, 110) and drawn.max() < 200
    assert json.loads(here(*scored).stdout)["ppl"]["value"] < whole["ppl"]["value"]


@pytest.mark.parametrize(
    "flags",
    [("-p", "a"), ("-p", "a", "-np", "2", "--json"), ("-p", "a", "--beams", "2"), ("-p", "a", "-cnv", "-st")],
)
def test_nan_is_an_error(here, nan_model_path, flags):
    result = here("generate", "-m", nan_model_path, *flags, "-n", "4")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "jaxpaged: error: the model's logits are NaN: its weights hold NaN, or overflow in f32"
    )


@pytest.mark.parametrize("flags", [(), ("--kl-divergence",)])
def test_nan_is_an_error_of_perplexity(refused, nan_model_path, tmp_path, flags):
    (tmp_path / "text").write_text("def f(x):" * 9)
    said = refused("perplexity", "-m", nan_model_path, "-f", tmp_path / "text", "-c", "32", *flags, "--json")
    assert "the model's logits are NaN" in said
