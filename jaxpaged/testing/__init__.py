"""The conformance kit: representative cases, an oracle in float64, and what a kernel must return for them."""

from jaxpaged.testing.conformance import (
    Built,
    Verdict,
    build_case,
    calm,
    check_conformance,
    judge,
)

__all__ = ["Built", "Verdict", "build_case", "calm", "check_conformance", "judge"]
