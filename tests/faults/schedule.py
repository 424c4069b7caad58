"""A schedule: which faults happen when. Drawn from a seed, so that a number is enough to have it again."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.faults.faults import FAULTS, Fault, Submitted
from tests.faults.graphs import GRAPHS


@dataclass(frozen=True, slots=True)
class Step:
    """A fault, and the seconds to wait before it."""

    after: float
    fault: Fault


@dataclass(frozen=True, slots=True)
class Schedule:
    """A seed's schedule: how many schedulers there are at first, and what happens then."""

    seed: int
    schedulers: int
    steps: tuple[Step, ...]

    def document(self) -> dict[str, Any]:
        """Return it as JSON."""
        steps = [{"after": step.after, **step.fault.document()} for step in self.steps]
        return {"seed": self.seed, "schedulers": self.schedulers, "steps": steps}


#: What the service has of that some faults need.
HAVE = frozenset({"heartbeats", "lineage", "outages"})


def draw(
    seed: int,
    *,
    postgres: bool,
    having: frozenset[str] = HAVE,
    faults: Mapping[type[Fault], int] = FAULTS,
    steps: tuple[int, int] = (8, 24),
    pause: float = 0.1,
) -> Schedule:
    """Draw a schedule: a job or two first, then faults in any order.

    Parameters
    ----------
    having
        What the service has of that some faults need; others are left out.
    faults
        What is drawn from, with weights.
    steps
        The least and the most number of steps after the first job.
    pause
        Seconds between two of them, on average.
    """
    dice = random.Random(f"schedule {seed}")
    kinds = {kind: weight for kind, weight in faults.items() if kind.needs <= having}
    if not postgres:
        kinds = {kind: weight for kind, weight in kinds.items() if not kind.postgres_only}
    drawn = [Step(0.0, Submitted(dice.randrange(len(GRAPHS)), 0, 1, False, "before", 0))]
    for _ in range(dice.randint(*steps)):
        (kind,) = dice.choices(list(kinds), list(kinds.values()))
        drawn.append(Step(round(dice.expovariate(1 / pause), 3), kind.draw(dice)))
    return Schedule(seed, dice.randint(1, 3), tuple(drawn))
