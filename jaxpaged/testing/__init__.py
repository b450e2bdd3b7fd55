"""The conformance kit: representative cases, an oracle in float64, and what a kernel must return for them."""

from jaxpaged.testing.conformance import (
    Built,
    Verdict,
    benign_fill,
    build_case,
    check_conformance,
    judge,
)

__all__ = ["Built", "Verdict", "benign_fill", "build_case", "check_conformance", "judge"]
