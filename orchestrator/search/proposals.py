"""What a job of proposals gave: points to measure, the front that they are from, and budgets that nothing can meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import SearchError
from quant_spec.allocation import Allocation
from quant_spec.documents import read_json
from quant_spec.keys import canonical_json
from quant_spec.messages import first_problem
from quant_spec.numbers import human_bytes
from quant_spec.search import SearchSpec
from workers.storage.store import Store

#: Output of the kind `propose`.
PROPOSALS = "proposals"


@dataclass(frozen=True, slots=True)
class Proposed:
    """One allocation to measure: where it comes from, the budget that it is for, and what is expected of it."""

    allocation: Allocation
    origin: str
    budget: int | None
    predicted: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Proposals:
    """Points, the predicted front ([bytes, damage, psnr_db]), the surrogate's fit, and budgets that cannot be met."""

    points: tuple[Proposed, ...]
    front: Sequence[Sequence[float]]
    surrogate: Mapping[str, Any]
    infeasible: tuple[Mapping[str, Any], ...]

    def summary(self) -> dict[str, Any]:
        """Return what is kept of them beside the points."""
        return {"front": list(self.front), "surrogate": dict(self.surrogate)}

    def infeasible_text(self, spec: SearchSpec) -> str:
        """Return what is wrong with the budgets that cannot be met, in one line."""
        return "; ".join(_infeasible_text(each) for each in self.infeasible)


def read_proposals(store: Store, outputs: Mapping[str, str], metrics: Mapping[str, Any]) -> Proposals:
    """Read what a task of the kind `propose` gave.

    Raises
    ------
    SearchError
        If it is not what such a task gives.
    """
    data = read_json(store.get_bytes(outputs[PROPOSALS]), PROPOSALS, error=SearchError)
    try:
        points = tuple(
            Proposed(
                allocation=Allocation.model_validate_json(canonical_json(each["allocation"])),
                origin=each["origin"],
                budget=each.get("budget"),
                predicted=each.get("predicted"),
            )
            for each in data["points"]
        )
        return Proposals(points, data.get("front", []), data.get("surrogate", {}), tuple(data.get("infeasible", ())))
    except (KeyError, TypeError) as error:
        raise SearchError(f"proposals: got JSON without {error}, wanted points, front and infeasible") from error
    except ValidationError as error:
        raise SearchError(f"proposals: {first_problem(error, Allocation)}") from None


def _infeasible_text(entry: Mapping[str, Any]) -> str:
    """Return why a budget cannot be met: below the smallest that any choice reaches, or above the largest."""
    name = str(entry["limit"])

    def shown(value: Any) -> str:
        return human_bytes(value) if name.endswith("bytes") else f"{value:g}"

    smallest, largest = entry.get("smallest"), entry.get("largest")
    got = f"budgets.{entry['budget']}.{name}: got {shown(entry['got'])}, wanted"
    if smallest is None or largest is None:
        return f"{got} a limit that some choice meets together with the others"
    return f"{got} {shown(smallest)} to {shown(largest)}, which is what the choices reach"
