"""What finished jobs of a home left: their tasks' parameters and digests of outputs, from SQLite and the folder."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from quant_core.fit.unit_state import UnitState


class Records:
    """One succeeded job of a home that keeps its records in SQLite and its blobs in a folder."""

    def __init__(self, home: Path, job: str) -> None:
        self.home, self.database = home, sqlite3.connect(home / "quantmill.db")
        found = self.database.execute(
            "select id from jobs where id like ? and state = 'succeeded'", (f"{job}%",)
        ).fetchall()
        if len(found) != 1:
            raise SystemExit(f"job {job}: got {len(found)} succeeded jobs of {home}, wanted one")
        self.job: str = found[0][0]

    @classmethod
    def of_recipe(cls, home: Path, recipe: str, model: str) -> Records:
        """Return the first succeeded job of a recipe and a model, both by name."""
        row = (
            sqlite3.connect(home / "quantmill.db")
            .execute(
                "select id from jobs where recipe_name = ? and model_name = ? and state = 'succeeded' "
                "order by created_at",
                (recipe, model),
            )
            .fetchone()
        )
        if row is not None:
            return cls(home, row[0])
        raise SystemExit(f"{home}: got no succeeded job of {recipe} on {model}, wanted one; run it first")

    def of(self, kind: str) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
        """Yield parameters and outputs of the job's tasks of a kind."""
        rows = self.database.execute(
            "select t.params, r.outputs from job_tasks j join tasks t on t.id = j.task_id "
            "join results r on r.key = t.key where j.job_id = ? and t.kind = ? order by t.seq",
            (self.job, kind),
        )
        for params, outputs in rows.fetchall():
            yield json.loads(params), json.loads(outputs)

    def path(self, digest: str) -> Path:
        """Return the file of a digest."""
        return self.home / "store" / "sha256" / digest[:2] / digest

    def shards(self, kind: str) -> dict[int, str]:
        """Return the outputs of the job's shards of a kind that has one output: first seed to digest, seeds rising."""
        found = {params["seeds"]["first"]: digest for params, outputs in self.of(kind) for digest in outputs.values()}
        return dict(sorted(found.items()))

    def tensor(self, digest: str, name: str, rows: int | None = None) -> Tensor:
        """Return a tensor of a safetensors blob, or its first rows."""
        with safe_open(self.path(digest), framework="pt") as shard:
            found: Tensor = shard.get_slice(name)[:rows]
            return found

    def states(self) -> list[UnitState]:
        """Return the units' states that were packed, the temporal block's among them."""
        (inputs,) = self.database.execute(
            "select tasks.inputs from tasks join job_tasks on job_tasks.task_id = tasks.id "
            "where tasks.kind = 'pack' and job_tasks.job_id = ?",
            (self.job,),
        ).fetchone()
        return [UnitState.from_bytes(self.path(digest).read_bytes()) for digest in json.loads(inputs)["states"]]
