from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant_core.fit.unit_state import UnitState
from quant_core.methods.mpqdm.distillation import Distillation
from quant_spec.keys import task_key
from quant_spec.kinds import KINDS
from workers.execution.execute import TaskCall, execute_call
from workers.execution.notes import CHECKPOINT, PROGRESS, read_progress
from workers.storage.store import NodeStore

RunTask = Callable[..., Any]
PASS: dict[str, Any] = {
    "iterations": 3,
    "batch_size": 4,
    "rank": 2,
    "lr": 0.02,
    "weight_lr": 1e-3,
    "activation_lr": 2e-3,
    "zero_point_lr": 2e-3,
    "bias_lr": 3e-4,
    "relations": True,
    "relation_weight": 1_600.0,
    "positions": 16,
    "seed": 0,
}


@pytest.fixture(scope="module")
def call(
    run_task: RunTask,
    task_store: NodeStore,
    digits: str,
    rounded_digits: dict[str, str],
    seeds: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., TaskCall]:
    """Return a call that distils the digits model."""
    shards = [
        run_task("reference", seeds(first, 1) | {"sqnr_seeds": 1}, {"model": [digits]}).outputs["reference"]
        for first in (200, 201)
    ]
    inputs = {"model": [digits], "trajectories": shards, "states": list(rounded_digits.values())}

    def make(**params: Any) -> TaskCall:
        return TaskCall("distill", PASS | params, inputs, task_store.url, str(tmp_path_factory.mktemp("cache")))

    return make


@pytest.fixture(scope="module")
def made(call: Callable[..., TaskCall]) -> Any:
    """What that call gives."""
    return execute_call(call())


def key_of(call: TaskCall) -> str:
    return task_key(call.kind, KINDS[call.kind].version, call.params, call.inputs)


def test_all_units_come_back_changed_in_their_formats(
    made: Any, task_store: NodeStore, rounded_digits: dict[str, str]
) -> None:
    assert list(made.outputs) == [f"state:{unit}" for unit in rounded_digits]
    for unit, digest in rounded_digits.items():
        before, after = (UnitState.from_bytes(task_store.get_bytes(d)) for d in (digest, made.outputs[f"state:{unit}"]))
        assert after.formats == before.formats
        assert after.tensors.keys() == before.tensors.keys()
        assert made.outputs[f"state:{unit}"] != digest
    assert made.metrics["loss_after"] < made.metrics["loss_before"]


def test_a_task_that_died_goes_on_from_its_checkpoint_to_the_same_bytes(
    call: Callable[..., TaskCall], task_store: NodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = call(seed=1)
    key = key_of(task)
    monkeypatch.setattr("workers.execution.notes.CHECKPOINT_SECONDS", (0.0, 0.0))
    step, made = Distillation.step, []

    def dies(run: Distillation) -> float:
        if run.iteration == 2:
            raise KeyboardInterrupt
        return step(run)

    def counts(run: Distillation) -> float:
        made.append(run.iteration)
        return step(run)

    monkeypatch.setattr(Distillation, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        execute_call(task)
    assert task_store.get_note(CHECKPOINT, key) is not None
    monkeypatch.setattr(Distillation, "step", counts)
    resumed = execute_call(task)
    assert made == [2]
    assert task_store.get_note(CHECKPOINT, key) is None
    assert task_store.get_note(PROGRESS, key) is None
    assert execute_call(task).outputs == resumed.outputs, "the same as without a stop"
    assert len(made) == 1 + 3


def test_a_damaged_checkpoint_is_no_checkpoint(call: Callable[..., TaskCall], task_store: NodeStore) -> None:
    task = call(seed=2, iterations=1)
    task_store.put_note(CHECKPOINT, key_of(task), b"\0" * 100)
    assert execute_call(task).outputs == execute_call(task).outputs


def test_progress_is_there_while_it_runs(
    call: Callable[..., TaskCall], task_store: NodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = call(seed=3, iterations=3)
    monkeypatch.setattr("workers.execution.notes.PROGRESS_SECONDS", 0.0)
    step, seen = Distillation.step, []

    def looks(run: Distillation) -> float:
        seen.append(read_progress(task_store, key_of(task)))
        return step(run)

    monkeypatch.setattr(Distillation, "step", looks)
    execute_call(task)
    assert [(each.done, each.total) for each in seen] == [(0, 3), (1, 3), (2, 3)]
    assert seen[0].seconds_left is None
    assert seen[2].seconds_left == pytest.approx(seen[2].seconds / 2)


def test_plain_distillation_is_another_result(call: Callable[..., TaskCall], made: Any, tmp_path: Path) -> None:
    plain = {name: value for name, value in PASS.items() if name not in ("relation_weight", "positions")}
    task = call()
    other = TaskCall(task.kind, plain | {"relations": False}, task.inputs, task.store_url, str(tmp_path))
    assert execute_call(other).outputs != made.outputs
