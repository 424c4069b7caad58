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
from quant_spec.search import SearchSpec, unmet_text
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
        return "; ".join(
            unmet_text(each["limit"], each["got"], each["smallest"], each["largest"], f"budgets.{each['budget']}")
            for each in self.infeasible
        )


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
