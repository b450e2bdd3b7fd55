"""The flags of sampling, which ``generate`` and ``serve`` share; their names are llama.cpp's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import click

from jaxpaged.app.flags import AT_LEAST_0, AT_LEAST_MINUS_1, FiniteFloat, flag

SMALLEST_TOP_P = 1e-30
"""Keeps one token, as llama.cpp's 0 does."""
DEFAULT_BREAKERS = ("\n", ":", '"', "*")
"""llama.cpp's sequence breakers of DRY."""
_sampling = partial(flag, "Sampling")
_SHARE = FiniteFloat(0, 1)


def _breakers(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """The breakers given; "none" drops those before it, as in llama.cpp."""
    return value[len(value) - value[::-1].index("none") :] if "none" in value else value


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """Flags of sampling."""

    seed: int = _sampling(
        "-s, --seed",
        "Seed of the random numbers; -1 = a random one.",
        -1,
        click.IntRange(-1, 2**32 - 1),
        metavar="S",
    )
    temp: float = _sampling(
        "--temp, --temperature",
        "Temperature; 0 or less always takes the likeliest token.",
        0.8,
        FiniteFloat(),
    )
    top_k: int = _sampling("--top-k", "Keep the N likeliest tokens; 0 or -1 = off.", 40, AT_LEAST_MINUS_1)
    top_p: float = _sampling(
        "--top-p", "Keep the likeliest tokens up to this total probability; 1 = off.", 0.95, _SHARE
    )
    min_p: float = _sampling(
        "--min-p",
        "Keep tokens with at least this share of the likeliest one's probability; 0 = off.",
        0.05,
        _SHARE,
    )
    typical_p: float = _sampling(
        "--typical, --typical-p",
        "Keep the tokens whose surprise is nearest to the entropy, up to this total probability; 1 = off.",
        1.0,
        FiniteFloat(0),
    )
    top_n_sigma: float = _sampling(
        "--top-nsigma, --top-n-sigma",
        "Keep logits at most this many standard deviations below the greatest; 0 or less = off.",
        -1.0,
        FiniteFloat(),
    )
    xtc_probability: float = _sampling(
        "--xtc-probability",
        "Chance that all tokens above --xtc-threshold but the least likely one are dropped; 0 = off.",
        0.0,
        _SHARE,
    )
    xtc_threshold: float = _sampling(
        "--xtc-threshold", "Probability of such a token; above 0.5 = off.", 0.1, FiniteFloat(0)
    )
    dynatemp_range: float = _sampling(
        "--dynatemp-range",
        "Vary the temperature by up to this with the entropy of the tokens left; 0 = off.",
        0.0,
        FiniteFloat(),
    )
    dynatemp_exponent: float = _sampling(
        "--dynatemp-exp", "Power of the entropy that the temperature follows.", 1.0, FiniteFloat()
    )
    repeat_penalty: float = _sampling(
        "--repeat-penalty", "Divide the logits of recent tokens; 1 = off.", 1.0, FiniteFloat(0, above=True)
    )
    repeat_last_n: int = _sampling(
        "--repeat-last-n", "Recent tokens that penalties apply to; -1 = all, 0 = none.", 64, AT_LEAST_MINUS_1
    )
    presence_penalty: float = _sampling(
        "--presence-penalty", "Subtract from the logit of every recent token.", 0.0, FiniteFloat()
    )
    frequency_penalty: float = _sampling(
        "--frequency-penalty", "Subtract from it for each occurrence.", 0.0, FiniteFloat()
    )
    dry_multiplier: float = _sampling(
        "--dry-multiplier",
        "Penalty of a token that continues a repetition (DRY); 0 = off.",
        0.0,
        FiniteFloat(),
    )
    dry_base: float = _sampling(
        "--dry-base", "Factor of that penalty for each token of the repetition.", 1.75, FiniteFloat(1)
    )
    dry_allowed_length: int = _sampling(
        "--dry-allowed-length", "Tokens that may be repeated without it.", 2, AT_LEAST_0
    )
    dry_penalty_last_n: int = _sampling(
        "--dry-penalty-last-n", "Recent tokens that DRY searches; -1 = all, 0 = none.", 64, AT_LEAST_MINUS_1
    )
    dry_sequence_breakers: tuple[str, ...] = _sampling(
        "--dry-sequence-breaker",
        "Text that no repetition goes across: tokens with it in them; may be repeated, none = no text.  "
        r"[default: \n : \" *]",
        DEFAULT_BREAKERS,
        click.STRING,
        multiple=True,
        show_default=False,
        callback=_breakers,
        metavar="TEXT",
    )
    mirostat: int = _sampling(
        "--mirostat",
        "Mirostat 1 or 2, in place of all samplers but the temperature; 0 = off.",
        0,
        click.IntRange(0, 2),
    )
    mirostat_eta: float = _sampling("--mirostat-lr", "Mirostat's learning rate, eta.", 0.1, FiniteFloat(0))
    mirostat_tau: float = _sampling(
        "--mirostat-ent", "Surprise in bits that Mirostat aims at, tau.", 5.0, FiniteFloat(0)
    )

    @property
    def is_random(self) -> bool:
        """True if the seed decides on tokens."""
        return self.temp > 0 or self.xtc_probability > 0 or self.dynatemp_range > 0

    def sampling_values(self) -> dict[str, Any]:
        """Values of ``SamplingParams`` by name, without the seed and DRY's breakers."""
        same = (
            *("top_k", "min_p", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold"),
            *("dynatemp_range", "dynatemp_exponent", "repeat_penalty", "repeat_last_n"),
            *("presence_penalty", "frequency_penalty", "dry_multiplier", "dry_base", "dry_allowed_length"),
            *("dry_penalty_last_n", "mirostat", "mirostat_tau", "mirostat_eta"),
        )
        values = {name: getattr(self, name) for name in same}
        return values | {"temperature": self.temp, "top_p": max(self.top_p, SMALLEST_TOP_P)}
