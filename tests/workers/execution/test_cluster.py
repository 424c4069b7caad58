"""Amounts of memory as they are asked for and given out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.execution.cluster import MEMORY_STEP, in_steps

GIB = 1 << 30


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (0, 0),
        (1, MEMORY_STEP),
        (MEMORY_STEP, MEMORY_STEP),
        (MEMORY_STEP + 1, 2 * MEMORY_STEP),
        (4 * GIB, 4 * GIB),
        (4 * GIB + 1, 4 * GIB + (GIB >> 1)),
        (80 * GIB, 80 * GIB),
        (80 * GIB + 1, 88 * GIB),
    ],
)
def test_memory_is_rounded_up_to_a_step(asked: int, given: int) -> None:
    assert in_steps(asked) == given


@given(st.integers(1, 1 << 50))
def test_a_step_is_an_eighth_at_most_and_stays_what_it_is(asked: int) -> None:
    rounded = in_steps(asked)
    assert asked <= rounded < max(asked + MEMORY_STEP, 1.125 * asked + 1)
    assert in_steps(rounded) == rounded


def test_there_are_few_amounts() -> None:
    assert len({in_steps(asked) for asked in range(1, 1 << 40, 1 << 27)}) == 80
