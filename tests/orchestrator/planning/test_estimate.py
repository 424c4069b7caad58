"""Estimates: which tasks are cached, rates fitted to records, the simulated queue."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from orchestrator.db.rows import Timing
from orchestrator.graph import Resources, TaskNode, TaskRef, task_node
from orchestrator.planning.costs import WORKER_BYTES
from orchestrator.planning.estimate import (
    DEFAULT_RATES,
    SERVICE_BYTES,
    STARTUP_SECONDS,
    Estimate,
    cached_tasks,
    estimate,
    fitted_rates,
)
from orchestrator.planning.planner import plan
from orchestrator.recipes.load import load_recipe
from quant_spec.keys import task_key
from quant_spec.kinds import KINDS
from tests.orchestrator.planning_models import inspection, model


def noop(name: str, *sources: TaskNode, work: float = 0.0, memory: int = 0, kind: str = "noop") -> TaskNode:
    inputs = {"sources": [TaskRef(source.id, "out") for source in sources]}
    return task_node(kind, {"name": name}, inputs, resources=Resources(memory_bytes=memory), work=work)


def elapsed(nodes: Sequence[TaskNode], cpus: int, cached: Sequence[TaskNode] = ()) -> float:
    """Return the estimated seconds where one GMAC takes one second, without the start."""
    timings = {"noop": Timing(10, 10.0, 10.0)}
    fixed = fitted_rates(timings)["noop"]
    assert fixed.seconds(1.0) == pytest.approx(1.0)
    return estimate(nodes, timings, {node.id for node in cached}, cpus=cpus).seconds - STARTUP_SECONDS


def planned(name: str = "qdiffusion-w4a8", *overrides: str, **shape: int) -> list[TaskNode]:
    return list(plan(model(inspection(**shape)), load_recipe(name, overrides).recipe)[0])


class Results:
    """Results by key, as the queue keeps them, and how often they were asked for."""

    def __init__(self) -> None:
        self.outputs: dict[str, dict[str, str]] = {}
        self.calls = 0

    def __call__(self, keys: Sequence[str]) -> Mapping[str, Mapping[str, str]]:
        self.calls += 1
        return {key: self.outputs[key] for key in keys if key in self.outputs}

    def run(self, nodes: Sequence[TaskNode], *, without: Sequence[TaskNode] = ()) -> None:
        """Record a result for every task whose inputs exist."""
        done: dict[str, dict[str, str]] = {}
        for node in nodes:
            if node in without or not node.sources() <= done.keys():
                continue
            inputs = {
                name: [done[item.task][item.output] if isinstance(item, TaskRef) else item for item in items]
                for name, items in node.inputs.items()
            }
            key = task_key(node.kind, node.version, node.params, inputs)
            names = [f"state:{unit['unit']}" for unit in node.params.get("units", ()) if node.kind == "round"]
            known = ("calibration", "reference", "state", "packed", "evaluation", "score", "artifact", "out")
            done[node.id] = {name: f"{name} of {key}" for name in (*known, *names)}
            self.outputs[key] = done[node.id]


# --- cached_tasks


def test_cached_tasks_is_nothing_in_a_fresh_home_and_all_after_a_run():
    nodes, results = planned(), Results()
    assert cached_tasks(nodes, results) == frozenset()
    results.run(nodes)
    assert cached_tasks(iter(nodes), results) == {node.id for node in nodes}


def test_cached_tasks_stops_at_what_is_unknown():
    nodes, results = planned(), Results()
    lost = [node for node in nodes if node.kind == "reconstruct"][2]
    results.run(nodes, without=[lost])
    found = cached_tasks(nodes, results)
    missing = [node for node in nodes if node.id not in found]
    assert missing[0] is lost
    assert {node.kind for node in missing} == {"reconstruct", "pack", "evaluate", "score", "release"}
    assert sum(node.kind == "reconstruct" for node in missing) == 1


def test_cached_tasks_counts_what_another_recipe_left():
    results = Results()
    results.run(planned("minmax-w8a8"))
    nodes = planned("fast-w4a8")
    found = cached_tasks(nodes, results)
    assert {node.kind for node in nodes if node.id in found} == {"calibrate", "reference"}


def test_cached_tasks_follows_bytes_not_names():
    """Two tasks upstream that gave the same bytes lead to one result downstream."""
    one, other = noop("one"), noop("other")
    below_one, below_other = noop("below", one), noop("below", other)
    results = Results()
    version = KINDS["noop"].version
    for node in (one, other):
        results.outputs[task_key("noop", version, node.params, {"sources": []})] = {"out": "same bytes"}
    results.outputs[task_key("noop", version, below_one.params, {"sources": ["same bytes"]})] = {"out": "x"}
    nodes = [one, other, below_one, below_other]
    assert cached_tasks(nodes, results) == {node.id for node in nodes}


def test_cached_tasks_asks_in_batches():
    results = Results()
    nodes = [noop(str(i)) for i in range(1200)]
    results.run(nodes)
    assert len(cached_tasks(nodes, results)) == 1200
    assert results.calls == 3


# --- rates


def test_fitted_rates_without_records_are_the_shipped_ones():
    assert fitted_rates({}) == dict(DEFAULT_RATES)
    assert {node.kind for node in planned()} <= set(DEFAULT_RATES) <= set(KINDS)


def test_fitted_rates_reproduce_what_was_recorded():
    timings = {"round": Timing(4, 40.0, 500.0), "score": Timing(2, 1.0, 10.0), "release": Timing(3, 6.0, 0.0)}
    rates = fitted_rates(timings)
    for kind, timing in timings.items():
        assert timing.n * rates[kind].fixed + rates[kind].per_gmac * timing.work == pytest.approx(timing.seconds)
        assert rates[kind].fixed >= 0
        assert rates[kind].per_gmac >= 0
    assert rates["release"].seconds(100.0) == pytest.approx(2.0)


def test_fitted_rates_carry_the_machines_speed_to_unrecorded_kinds():
    slow = {
        "calibrate": Timing(
            2, 2 * DEFAULT_RATES["calibrate"].fixed + 3 * DEFAULT_RATES["calibrate"].per_gmac * 900, 900.0
        )
    }
    rates = fitted_rates(slow)
    assert rates["reconstruct"].per_gmac == pytest.approx(3 * DEFAULT_RATES["reconstruct"].per_gmac)
    assert rates["reconstruct"].fixed == DEFAULT_RATES["reconstruct"].fixed


# --- the simulated queue


def test_estimate_one_cpu_adds_up_and_more_divide():
    nodes = [noop(str(i), work=1.0) for i in range(12)]
    assert elapsed(nodes, 1) == pytest.approx(12)
    assert elapsed(nodes, 4) == pytest.approx(3)
    assert elapsed(nodes, 5) == pytest.approx(3)
    assert elapsed(nodes, 100) == pytest.approx(1)


def test_estimate_is_at_least_the_longest_chain():
    chain: list[TaskNode] = []
    for i in range(6):
        chain.append(noop(f"chain {i}", *chain[-1:], work=1.0))
    others = [noop(f"other {i}", work=1.0) for i in range(4)]
    assert elapsed([*chain, *others], 100) == pytest.approx(6)
    assert elapsed([*others, *chain], 100) == pytest.approx(6)
    assert elapsed([*chain, *others], 2) == pytest.approx(6)
    assert elapsed([*others, *chain], 2) == pytest.approx(8)  # planned first runs first, as in the queue


def test_estimate_runs_what_is_ready_while_a_join_waits():
    first, slow = noop("first", work=1.0), noop("slow", work=5.0)
    join = noop("join", first, slow, work=1.0)
    filler = [noop(f"filler {i}", work=1.0) for i in range(4)]
    assert elapsed([first, slow, join, *filler], 2) == pytest.approx(6, abs=0.1)


def test_estimate_leaves_out_what_is_cached():
    nodes = planned()
    full = estimate(nodes, {}, cpus=2)
    assert (full.tasks, full.cached) == (len(nodes), 0)
    kept = [node.id for node in nodes if node.kind in ("calibrate", "reference")]
    part = estimate(nodes, {}, kept, cpus=2)
    assert part.cached == len(kept)
    assert part.seconds < full.seconds
    assert part.per_kind["calibrate"].seconds == 0
    assert part.per_kind["calibrate"].cached == part.per_kind["calibrate"].tasks == 2
    assert part.per_kind["round"] == full.per_kind["round"]
    everything = estimate(nodes, {}, {node.id for node in nodes}, cpus=2)
    assert everything == Estimate(len(nodes), len(nodes), 0.0, 0, everything.per_kind)


def test_estimate_per_kind_adds_up():
    nodes = planned()
    result = estimate(iter(nodes), {}, cpus=1)
    assert sum(kind.tasks for kind in result.per_kind.values()) == result.tasks == len(nodes)
    total = sum(kind.seconds for kind in result.per_kind.values())
    assert result.seconds == pytest.approx(STARTUP_SECONDS + total)


def test_estimate_follows_recorded_times():
    nodes = planned()
    work = sum(node.work for node in nodes if node.kind == "reconstruct")
    count = sum(node.kind == "reconstruct" for node in nodes)
    result = estimate(nodes, {"reconstruct": Timing(count, 1234.0, work)}, cpus=1)
    assert result.per_kind["reconstruct"].seconds == pytest.approx(1234.0)


def test_estimate_on_a_second_model_is_right_where_time_follows_work():
    """Rates recorded on one model give another's seconds, fixed parts included."""
    small, large = planned(blocks=3), planned(blocks=9, channels=24, side=16)

    def truth(nodes: Sequence[TaskNode]) -> dict[str, Timing]:
        timings: dict[str, Timing] = {}
        for node in nodes:
            seconds = DEFAULT_RATES[node.kind].fixed + 0.05 * node.work
            before = timings.get(node.kind, Timing(0, 0.0, 0.0))
            timings[node.kind] = Timing(before.n + 1, before.seconds + seconds, before.work + node.work)
        return timings

    result = estimate(large, truth(small), cpus=1)
    wanted = sum(timing.seconds for timing in truth(large).values())
    assert result.seconds - STARTUP_SECONDS == pytest.approx(wanted, rel=0.3)


def test_estimate_peak_memory_is_of_what_runs_at_once():
    gib = 2**30
    nodes = [noop(str(i), work=1.0, memory=(i + 1) * gib) for i in range(4)]
    assert estimate(nodes, {}, cpus=1).peak_memory_bytes == SERVICE_BYTES + 4 * gib
    assert estimate(nodes, {}, cpus=2).peak_memory_bytes == SERVICE_BYTES + 7 * gib
    assert estimate(nodes, {}, cpus=9).peak_memory_bytes == SERVICE_BYTES + 10 * gib


def test_estimate_peak_memory_counts_idle_workers():
    first = [noop(str(i), work=1.0) for i in range(4)]
    big = noop("big", *first, work=1.0, memory=3 * 2**30)
    peak = estimate([*first, big], {}, cpus=4).peak_memory_bytes
    assert peak == SERVICE_BYTES + 3 * 2**30 + 3 * WORKER_BYTES


@pytest.mark.parametrize("cpus", [0, -1])
def test_estimate_refuses_no_cpus(cpus: int):
    with pytest.raises(ValueError, match="cpus: got"):
        estimate([], {}, cpus=cpus)


def test_estimate_refuses_tasks_out_of_order():
    first = noop("first")
    with pytest.raises(ValueError, match="does not stand before it"):
        estimate([noop("second", first), first], {}, cpus=1)


def test_estimate_of_nothing_is_nothing():
    assert estimate([], {}, cpus=2) == Estimate(0, 0, 0.0, 0, {})


@pytest.mark.parametrize("blocks", [880, pytest.param(8800, marks=pytest.mark.slow)])
def test_estimate_of_ten_thousand_tasks(blocks):
    nodes = planned(blocks=blocks)
    results = Results()
    results.run(nodes[: len(nodes) // 5])
    found = cached_tasks(nodes, results)
    result: Any = estimate(nodes, {}, found, cpus=16)
    assert result.cached == len(found)
    assert math.isfinite(result.seconds)


def test_scaling_counts_the_positions_that_vote():
    """By as many bytes as there are: 4 for each channel, position, row and step of the layers that may be shifted."""

    def most(*overrides: str) -> int:
        nodes = planned("base", "passes.scale={}", *overrides)
        return max(node.resources.memory_bytes for node in nodes if node.kind == "scale")

    none, few, many = most(), *(most("passes.scale.shift=variance", f"passes.scale.samples={n}") for n in (8, 32))
    assert none < few < many
    assert many - most("passes.scale.samples=32") == 4 * (few - most("passes.scale.samples=8"))


def test_costs_count_what_the_methods_take():
    from orchestrator.planning.passes import allocate, scale
    from quant_core.methods.dmq.scaling import VOTE_POSITIONS
    from quant_core.methods.mpqdm.channel_errors import EFFECT_SAMPLES

    assert (allocate.EFFECT_SAMPLES, scale.VOTE_POSITIONS) == (EFFECT_SAMPLES, VOTE_POSITIONS)
