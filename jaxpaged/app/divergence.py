"""Perplexity of scored tokens, and the divergence of one cache's predictions from another's.

The quantities are those that llama.cpp's llama-perplexity prints, and so are their uncertainties: one standard error of
a mean over tokens taken as independent, ``sqrt(var / (n - 1))`` with the variance of the sample itself. What is a
function of a mean has the mean's error times the function's slope.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.app.scoring import Scores

_KLD_QUANTILES = (100, 99.9, 99, 95, 90, 50, 10, 5, 1, 0.1, 0)
_DELTA_P_QUANTILES = (100, 99.9, 99, 95, 90, 75, 50, 25, 10, 5, 1, 0.1, 0)
_NAMED: dict[float, str] = {100: "Maximum", 50: "Median", 0: "Minimum"}


class Estimate(NamedTuple):
    """A value and its uncertainty, one standard error."""

    value: float
    error: float

    @classmethod
    def mean(cls, x: np.ndarray) -> Estimate:
        """Mean of an array of any shape; the error of a single number is 0."""
        x = np.asarray(x, np.float64)
        return cls(float(x.mean()), math.sqrt(x.var() / (x.size - 1)) if x.size > 1 else 0.0)

    def exp(self) -> Estimate:
        """Its exponential."""
        value = math.exp(self.value)
        return Estimate(value, value * self.error)

    def sqrt(self) -> Estimate:
        """Its square root; the error of the root of 0 is 0."""
        value = math.sqrt(self.value)
        return Estimate(value, 0.5 * self.error / value if value else 0.0)


def perplexity(scores: Scores) -> Estimate:
    """Exponential of the mean negative log-likelihood."""
    return Estimate.mean(scores.nll).exp()


def running_perplexity(scores: Scores) -> np.ndarray:
    """f64[chunks]: the perplexity of the first 1, 2, ... chunks."""
    chunks, tokens = scores.nll.shape
    return np.exp(np.cumsum(scores.nll.sum(axis=1)) / (tokens * np.arange(1, chunks + 1)))


@dataclass(frozen=True)
class Divergence:
    """One cache against another on the same tokens."""

    base: Scores
    scores: Scores
    """Scores compared with ``base``, their divergence from it included."""

    @property
    def ppl(self) -> Estimate:
        return perplexity(self.scores)

    @property
    def ppl_base(self) -> Estimate:
        return perplexity(self.base)

    @property
    def ln_ratio(self) -> Estimate:
        """ln(PPL / PPL(base)). Both see the same tokens, so its error is that of the mean of the differences."""
        return Estimate.mean(self.scores.nll - self.base.nll)

    @property
    def ratio(self) -> Estimate:
        """PPL / PPL(base)."""
        return self.ln_ratio.exp()

    @property
    def difference(self) -> Estimate:
        """PPL - PPL(base)."""
        ppl, base = self.ppl.value, self.ppl_base.value
        return Estimate(ppl - base, Estimate.mean(ppl * self.scores.nll - base * self.base.nll).error)

    @property
    def correlation(self) -> float:
        """Correlation of the two negative log-likelihoods, from -1 to 1; nan if one of them is constant."""
        both = self.scores.nll - self.scores.nll.mean(), self.base.nll - self.base.nll.mean()
        spread = both[0].std() * both[1].std()
        return float(np.mean(both[0] * both[1]) / spread) if spread else math.nan

    @property
    def kld(self) -> Estimate:
        """Mean Kullback-Leibler divergence from base, in nats."""
        return Estimate.mean(self.scores.kld)

    @property
    def kld_quantiles(self) -> dict[str, float]:
        """From "Maximum" to "Minimum"."""
        return _quantiles(self.scores.kld, _KLD_QUANTILES)

    @property
    def _delta_p(self) -> np.ndarray:
        return np.exp(-self.scores.nll) - np.exp(-self.base.nll)

    @property
    def delta_p(self) -> Estimate:
        """Mean change of the probability of the text's next token."""
        return Estimate.mean(self._delta_p)

    @property
    def rms_delta_p(self) -> Estimate:
        """Root mean square of that change."""
        return Estimate.mean(self._delta_p**2).sqrt()

    @property
    def delta_p_quantiles(self) -> dict[str, float]:
        """From "Maximum" to "Minimum"."""
        return _quantiles(self._delta_p, _DELTA_P_QUANTILES)

    @property
    def same_top(self) -> Estimate:
        """Share of the positions with the same likeliest token."""
        return Estimate.mean(self.scores.same_top)

    def as_dict(self) -> dict[str, Any]:
        """All quantities, for JSON."""
        ratios = {"ln_ratio": self.ln_ratio, "ratio": self.ratio, "difference": self.difference}
        probabilities = {"delta_p": self.delta_p, "rms_delta_p": self.rms_delta_p, "same_top": self.same_top}
        estimates = {"ppl": self.ppl, "ppl_base": self.ppl_base, **ratios, "kld": self.kld, **probabilities}
        return {
            "tokens": self.scores.nll.size,
            "correlation": None if math.isnan(self.correlation) else self.correlation,
            **{name: estimate._asdict() for name, estimate in estimates.items()},
            "kld_quantiles": self.kld_quantiles,
            "delta_p_quantiles": self.delta_p_quantiles,
        }

    def lines(self) -> list[str]:
        """All quantities, in the format of llama-perplexity."""
        return [
            "====== Perplexity statistics ======",
            f"Mean PPL(Q)                   : {pair(self.ppl)}",
            f"Mean PPL(base)                : {pair(self.ppl_base)}",
            f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * self.correlation:6.2f}%",
            f"Mean ln(PPL(Q)/PPL(base))     : {pair(self.ln_ratio)}",
            f"Mean PPL(Q)/PPL(base)         : {pair(self.ratio)}",
            f"Mean PPL(Q)-PPL(base)         : {pair(self.difference)}",
            "",
            "====== KL divergence statistics ======",
            f"Mean    KLD: {pair(self.kld, '12.8f')}",
            *(f"{name:<7} KLD: {value:12.8f}" for name, value in self.kld_quantiles.items()),
            "",
            "====== Token probability statistics ======",
            f"Mean    Δp: {percent(self.delta_p)}",
            *(f"{name:<7} Δp: {100 * value:6.3f}%" for name, value in self.delta_p_quantiles.items()),
            f"RMS Δp    : {percent(self.rms_delta_p)}",
            f"Same top p: {percent(self.same_top)}",
        ]


def _quantiles(x: np.ndarray, percent: tuple[float, ...]) -> dict[str, float]:
    values = np.percentile(x, percent)
    return {_NAMED.get(p, f"{p:.1f}%"): float(v) for p, v in zip(percent, values, strict=True)}


def pair(estimate: Estimate, form: str = "10.6f") -> str:
    """Formats a value and its error."""
    return f"{estimate.value:{form}} ± {estimate.error:{form}}"


def percent(estimate: Estimate) -> str:
    """Formats a value and its error in percent."""
    return f"{100 * estimate.value:6.3f} ± {100 * estimate.error:5.3f} %"
