"""The conformance kit: representative cases, an oracle in float64, and checks of any attention
against it."""

from jaxpaged.testing.conformance import (
    ADVERSARIAL_FILLS,
    CASES,
    QUANTIZED_CASES,
    Built,
    Case,
    Verdict,
    benign_fill,
    build_case,
    check_conformance,
    judge,
)

__all__ = [
    "ADVERSARIAL_FILLS",
    "CASES",
    "QUANTIZED_CASES",
    "Built",
    "Case",
    "Verdict",
    "benign_fill",
    "build_case",
    "check_conformance",
    "judge",
]
