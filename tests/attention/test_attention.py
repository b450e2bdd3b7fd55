import jax
import pytest

from jaxpaged.attention import paged_attention
from jaxpaged.attention.cases import CASES
from jaxpaged.testing import check_conformance


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conformance(case, implementation):
    def attention(*args, scale, window, soft_cap, sinks, return_lse):
        return jax.jit(
            lambda *a: paged_attention(
                *a, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks,
                implementation=implementation, return_lse=return_lse,
            )
        )(*args)

    check_conformance(attention, case)
