"""Placement as a function of nodes, of what runs, and of the queue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.db.rows import Candidate, Timing, Wishes
from orchestrator.graph import Resources
from orchestrator.scheduling.placement import (
    Decision,
    Placement,
    ended,
    free_room,
    gpu_share,
    has_room,
    place,
    usable,
)
from workers.execution.cluster import Node

GIB = 2**30
VERSIONS = {"quantmill": "1", "torch": "2.13.0", "diffusers": "0.42.1"}


def node(name: str, cpus: float = 4.0, gpus: int = 0, gpu_gib: int = 40, **options: Any) -> Node:
    """Return a node with 64 GiB."""
    known = {"gpu_type": "A100" if gpus else None, "versions": VERSIONS, "cuda_ok": gpus > 0}
    return Node(name, name, cpus, 64 * GIB, gpus, gpu_gib * GIB if gpus else 0, **known | options)


def task(
    name: str, cpus: float = 1.0, gpu_gib: float = 0, kind: str = "noop", gib: float = 0, **wishes: Any
) -> Candidate:
    """Return a task that takes so much."""
    resources = Resources(cpus, 1.0 if wishes.get("device") == "cuda" else 0.0, int(gib * GIB), int(gpu_gib * GIB))
    return Candidate(name, name, kind, resources, Wishes(**wishes))


def where(decision: Decision) -> dict[str, tuple[str, str, float]]:
    """Return node, device and share of GPUs of what was placed and not queued."""
    found = decision.placements.items()
    return {name: (each.node, each.device, each.gpus) for name, each in found if not each.queued}


def running(*decisions: Decision) -> list[Placement]:
    """Return what decisions have started."""
    return [placement for decision in decisions for placement in decision.placements.values()]


@pytest.mark.parametrize(
    ("needed", "share"), [(1, 1 / 16), (2.5, 1 / 16), (2.6, 2 / 16), (10, 0.25), (20, 0.5), (20.1, 1), (39, 1)]
)
def test_a_share_is_in_sixteenths_and_more_than_half_is_whole(needed: float, share: float) -> None:
    assert gpu_share(needed * GIB, 40 * GIB) == share


def test_a_gpu_of_unknown_memory_is_taken_whole() -> None:
    assert gpu_share(1.0, 0) == 1.0


def test_auto_is_cuda_where_the_task_gains_and_cpu_tasks_fill_the_cores_beside() -> None:
    nodes = [node("gpu", 8.0, 1), node("plain", 2.0)]
    tasks = [task("calibrate", gpu_gib=10), *(task(f"pack{n}") for n in range(9)), task("round", gpu_gib=10)]
    found = where(place(nodes, [], tasks))
    assert found["calibrate"] == found["round"] == ("gpu", "cuda", 0.25)
    on_cpu = [name for name, at in found.items() if at[1] == "cpu"]
    assert len(on_cpu) == 8  # two on the plain node; one core of the other is left to each GPU
    assert [found[name][0] for name in on_cpu[:2]] == ["plain", "plain"]


def test_auto_is_cpu_without_gpus_and_where_none_is_large_enough() -> None:
    assert where(place([node("a")], [], [task("t", gpu_gib=10)])) == {"t": ("a", "cpu", 0.0)}
    assert where(place([node("a", gpus=1)], [], [task("t", gpu_gib=50)])) == {"t": ("a", "cpu", 0.0)}


def test_device_cpu_takes_no_gpu_and_cuda_no_cpu() -> None:
    tasks = [task("c", gpu_gib=10, device="cpu"), task("g", gpu_gib=10, device="cuda"), task("p", device="cuda")]
    assert where(place([node("a", gpus=1)], [], tasks)) == {
        "c": ("a", "cpu", 0.0),
        "g": ("a", "cuda", 0.25),
        "p": ("a", "cpu", 0.0),  # no GPU helps it
    }
    assert where(place([node("a")], [], tasks)) == {"c": ("a", "cpu", 0.0), "p": ("a", "cpu", 0.0)}


def test_cuda_tries_the_largest_gpu_though_the_estimate_says_that_none_fits() -> None:
    nodes = [node("small", gpus=1, gpu_gib=40), node("large", gpus=1, gpu_gib=80)]
    assert where(place(nodes, [], [task("t", gpu_gib=100, device="cuda")])) == {"t": ("large", "cuda", 1.0)}


def test_fractions_pack_the_fullest_gpu_and_large_tasks_get_whole_ones() -> None:
    nodes = [node("a", 16.0, 2)]
    first = place(nodes, [], [task("q1", gpu_gib=10), task("h", gpu_gib=20), task("w", gpu_gib=30)])
    assert where(first) == {"q1": ("a", "cuda", 0.25), "h": ("a", "cuda", 0.5), "w": ("a", "cuda", 1.0)}
    slots = {name: placement.slots for name, placement in first.placements.items()}
    assert slots["q1"] == slots["h"] != slots["w"]
    assert first.placements["w"].whole
    then = place(nodes, running(first), [task("h2", gpu_gib=20), task("q2", gpu_gib=10), task("q3", gpu_gib=10)])
    assert where(then) == {"q2": ("a", "cuda", 0.25)}
    assert [name for name, placement in then.placements.items() if placement.queued] == ["h2", "q3"]


def test_memory_decides_which_gpu() -> None:
    nodes = [node("big", 8.0, 1, 80), node("small", 8.0, 1, 24, gpu_type="L4")]
    found = where(place(nodes, [], [task("s", gpu_gib=20), task("b", gpu_gib=60)]))
    assert found == {"s": ("small", "cuda", 1.0), "b": ("big", "cuda", 1.0)}


def test_types_are_asked_for_by_name() -> None:
    nodes = [node("a", 8.0, 1), node("b", 8.0, 1, gpu_type="H100")]
    tasks = [task("h", gpu_gib=30, gpu_type="h100"), task("a", gpu_gib=30, gpu_type="A100")]
    assert where(place(nodes, [], tasks)) == {"h": ("b", "cuda", 1.0), "a": ("a", "cuda", 1.0)}
    assert where(place(nodes, [], [task("l", gpu_gib=10, gpu_type="L4", device="cuda")])) == {}
    assert where(place(nodes, [], [task("l", gpu_gib=10, gpu_type="L4")])) == {"l": ("a", "cpu", 0.0)}


def test_alone_takes_a_whole_gpu_or_all_the_memory() -> None:
    nodes = [node("a", 8.0, 1)]
    small = place(nodes, [], [task("s", gpu_gib=2)])
    alone = task("t", gpu_gib=2, gib=1, alone=True)
    assert where(place(nodes, running(small), [alone])) == {}
    found = place(nodes, [], [alone]).placements["t"]
    assert (found.gpus, found.memory_bytes) == (1.0, 2 * GIB)
    on_cpu = place([node("c")], [], [task("t", gib=1, alone=True)]).placements["t"]
    assert on_cpu.memory_bytes == 64 * GIB


def test_what_is_larger_than_a_gpu_takes_several_of_one_node_if_its_kind_can() -> None:
    nodes = [node("two", 8.0, 2), node("four", 8.0, 4)]
    wide = task("t", gpu_gib=100, kind="calibrate")
    decision = place(nodes, [], [wide])
    assert where(decision) == {"t": ("four", "cuda", 3.0)}
    assert len(set(decision.placements["t"].slots)) == 3
    assert where(place(nodes, [], [task("t", gpu_gib=100, kind="distill")])) == {"t": ("two", "cpu", 0.0)}


def test_first_that_does_not_fit_keeps_its_room() -> None:
    nodes = [node("a", 2.0)]
    small = [task(f"s{n}") for n in range(4)]
    first = place(nodes, [], small)
    assert [placement.queued for placement in first.placements.values()] == [False, False, True, True]
    # A task of two CPUs is next: nothing is started or queued beside it, though a small one would fit.
    left = ended(ended(dict(first.placements), "s0"), "s1")
    left = ended(left, "s2")
    assert len(left) == 1
    decision = place(nodes, list(left.values()), [task("big", cpus=2.0), *(task(f"t{n}") for n in range(9))])
    assert (dict(decision.placements), decision.kept_for) == ({}, task("big", cpus=2.0))
    after = place(nodes, [], [task("big", cpus=2.0), task("t")])
    assert list(where(after)) == ["big"]


def test_no_more_of_the_queue_is_looked_at_than_has_a_chance() -> None:
    seen: list[str] = []

    def queue() -> Iterator[Candidate]:
        for number in range(1000):
            seen.append(f"t{number}")
            yield task(f"t{number}")

    found = place([node("a", 2.0)], [], queue())
    assert len(found.placements) == 4
    assert len(seen) == 5


def test_others_go_beside_what_waits_where_they_leave_its_room() -> None:
    nodes = [node("a", 4.0), node("b", 2.0)]
    busy = place(nodes, [], [task("x", cpus=3.0), task("y", cpus=2.0)])
    assert {at[0] for at in where(busy).values()} == {"a", "b"}
    left = [placement for placement in running(busy) if placement.node == "a"]
    decision = place(nodes, left, [task("big", cpus=4.0), task("small"), task("other", cpus=2.0)])
    assert decision.kept_for == task("big", cpus=4.0)  # it waits for a
    assert where(decision) == {"small": ("b", "cpu", 0.0)}


def test_gpu_that_is_waited_for_is_kept_while_cores_are_filled() -> None:
    nodes = [node("a", 8.0, 1)]
    busy = place(nodes, [], [task("q", gpu_gib=10)])
    tasks = [task("whole", gpu_gib=30), task("q2", gpu_gib=20), task("pack")]
    decision = place(nodes, running(busy), tasks)
    assert decision.kept_for == tasks[0]
    assert where(decision) == {"pack": ("a", "cpu", 0.0)}


def test_queued_task_takes_the_place_of_the_one_that_ends() -> None:
    nodes = [node("a", 8.0, 1)]
    first = place(nodes, [], [task(f"t{n}", gpu_gib=20) for n in range(5)])
    assert [each.queued for each in first.placements.values()] == [False, False, True, True]
    left = ended(dict(first.placements), "t0")
    assert not left["t2"].queued
    assert left["t2"].slots == first.placements["t0"].slots
    assert ended(left, "t3").keys() == {"t1", "t2"}
    assert ended(left, "unknown") == left


def test_tasks_of_nearly_the_same_size_take_each_others_place() -> None:
    nodes = [node("a", 1.0)]
    tasks = [task(f"t{n}", gib=5 + n / 1000) for n in range(1, 3)]
    first = place(nodes, [], tasks)
    assert [each.queued for each in first.placements.values()] == [False, True]
    assert not ended(dict(first.placements), "t1")["t2"].queued


def test_nothing_is_queued_if_not_wanted() -> None:
    found = place([node("a", 2.0)], [], [task(f"t{n}") for n in range(4)], queued_per_running=0.0)
    assert list(found.placements) == ["t0", "t1"]
    assert not has_room([node("a", 2.0)], running(found), 0.0)
    assert has_room([node("a", 2.0)], running(found), 1.0)


def test_task_larger_than_any_node_gets_all_of_the_largest() -> None:
    nodes = [node("a", 2.0), node("b", 4.0)]
    huge = task("t", cpus=500.0, gib=10**6)
    found = place(nodes, [], [huge]).placements["t"]
    assert (found.node, found.cpus, found.memory_bytes) == ("b", 4.0, 64 * GIB)
    assert place([], [], [huge]).placements == {}


def test_estimates_are_what_recorded_tasks_took() -> None:
    nodes = [node("a", 16.0, 1)]
    less = {("round", "A100"): Timing(3, 1.0, 1.0, 0.5, 0.4)}
    asked = task("t", gpu_gib=20, gib=10, kind="round")
    found = place(nodes, [], [asked], learned=less).placements["t"]
    assert found.gpus == 0.25  # 20 GiB x 0.4 x 1.1 = 8.8 of 40
    assert found.memory_bytes == pytest.approx(5.5 * GIB)
    more = {("round", "A100"): Timing(3, 1.0, 1.0, 1.0, 1.5)}
    assert place(nodes, [], [asked], learned=more).placements["t"].gpus == 1.0
    on_cpu = {("round", "cpu"): Timing(3, 1.0, 1.0, 2.0, 0.0)}
    held = place([node("c")], [], [asked], learned=on_cpu).placements["t"]
    assert held.memory_bytes == pytest.approx(22 * GIB)


def test_deterministic_job_is_bound_by_its_first_task() -> None:
    nodes = [node("a", 8.0, 1), node("b", 8.0, 1, gpu_type="H100")]
    tasks = [task(name, gpu_gib=30, deterministic=True) for name in "xy"]
    first = place(nodes, [], tasks)
    assert first.pinned == {"x"}
    assert list(first.placements) == ["x"]
    bound = [replace(each, wishes=replace(each.wishes, device="cuda", gpu_type="A100")) for each in tasks]
    assert where(place(nodes, running(first), [*bound[1:], task("free", gpu_gib=30)])) == {"free": ("b", "cuda", 1.0)}


def test_node_with_other_versions_is_left_out_and_named() -> None:
    old = node("old", versions=VERSIONS | {"torch": "2.12.0"})
    good, why = usable([old, node("new")], VERSIONS, {})
    assert [each.id for each in good] == ["new"]
    assert why == {"old": "old: got torch 2.12.0, wanted torch 2.13.0, as the orchestrator has"}


def test_gpus_that_torch_does_not_see_are_left_out_and_named() -> None:
    good, why = usable([node("a", gpus=2, cuda_ok=False)], VERSIONS, {})
    assert [(each.id, each.gpus) for each in good] == [("a", 0)]
    assert why["a"].startswith("a: got no CUDA device from torch, wanted the 2 GPUs that Ray has")
    good, why = usable([node("a", gpus=2)], VERSIONS, {"a": ("cuda", "it said no")})
    assert ([each.gpus for each in good], why) == ([0], {"a": "it said no"})
    assert usable([node("a", gpus=2)], VERSIONS, {"a": ("cpu", "never")}) == ([], {"a": "never"})


def test_node_that_could_not_be_asked_is_left_out() -> None:
    good, why = usable([node("a", problem="a: no module workers")], VERSIONS, {})
    assert (good, why) == ([], {"a": "a: no module workers"})


def test_free_room_is_that_of_the_freest_node() -> None:
    nodes = [node("a", 4.0, 1), node("b", 2.0)]
    assert free_room(nodes, []) == Resources(4.0, 1.0, 64 * GIB)
    busy = place(nodes, [], [task("w", cpus=4.0, gpu_gib=30)])
    assert free_room(nodes, running(busy)) == Resources(2.0, 0.0, 64 * GIB)
    full = place(nodes, running(busy), [task("c", cpus=2.0)])
    assert free_room(nodes, running(busy, full)) is None


@given(
    st.lists(st.tuples(st.sampled_from([1.0, 2.0]), st.sampled_from([0, 5, 12, 30])), max_size=30),
    st.lists(st.integers(0, 40), max_size=30),
)
def test_no_node_is_ever_given_more_than_it_has(tasks: list[tuple[float, int]], ends: list[int]) -> None:
    """Whatever comes and ends in whatever order, and everything is started in the end."""
    nodes = [node("a", 4.0, 2), node("b", 3.0, 1, 80, gpu_type="H100"), node("c", 2.0)]
    queue = [task(f"t{number}", cpus, gpu_gib) for number, (cpus, gpu_gib) in enumerate(tasks)]
    state: dict[str, Placement] = {}
    done = 0
    for end in [*ends, *[0] * len(queue)]:
        found = place(nodes, list(state.values()), queue)
        state |= found.placements
        queue = [each for each in queue if each.id not in state]
        for each in nodes:
            here = [placement for placement in state.values() if placement.node == each.id and not placement.queued]
            assert sum(placement.cpus for placement in here) <= each.cpus
            for slot in range(each.gpus):
                assert sum(min(placement.gpus, 1.0) for placement in here if slot in placement.slots) <= 1.0
        if state:
            state, done = ended(state, sorted(state)[end % len(state)]), done + 1
    assert not queue
    assert done == len(tasks)
