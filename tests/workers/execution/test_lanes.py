"""Lanes: short calls in batches, with threads for workers; with Ray's processes for them in `test_remote.py`."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest

from workers.execution.lanes import (
    BATCH,
    GIVE_UP_SECONDS,
    MANY,
    GivenUp,
    Lane,
    LaneProcess,
    Lanes,
    LaneWorker,
    Shape,
    ShortCall,
)

ONE_CPU = Shape(1.0, 0, "")
SECONDS = 60.0


def until(condition: Callable[[], object]) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


class ThreadProcess:
    """A worker whose process is a thread: it can die, and then nothing more is heard of it."""

    def __init__(self, lane: Lane, run: Callable[[int, str], str]) -> None:
        """Begin to serve."""
        self.lane = lane
        self.worker = LaneWorker(run)
        self.dead = False
        self.batches: queue.SimpleQueue[tuple[int, Sequence[tuple[int, str]]]] = queue.SimpleQueue()
        self.sizes: list[int] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while not self.dead:
            answers = self.worker.run_batch(*self.batches.get())
            if not self.dead:
                self.lane.answered(answers)

    def run_batch(self, batch: int, calls: Sequence[tuple[int, str]]) -> None:
        """See `LaneProcess`."""
        self.sizes.append(len(calls))
        self.batches.put((batch, calls))

    def give_up(self, batch: int) -> None:
        """See `LaneProcess`."""
        self.lane.gave_up(GivenUp(*self.worker.give_up(batch)), batch)

    def kill(self) -> None:
        """See `LaneProcess`."""
        self.dead = True

    def die(self) -> None:
        """End by itself."""
        self.kill()
        self.lane.failed(RuntimeError("died"))


class Host:
    """A machine of two CPUs. A call answers with its text, or waits first if that is "wait"."""

    def __init__(self) -> None:
        """Start with nothing open."""
        self.cpus = 2.0
        self.refuses = False
        self.takes_tasks = False
        self.tasks: list[int] = []
        self.in_tasks = 0
        self.begun: list[int] = []
        self.answers: dict[int, str] = {}
        self.lost: list[int] = []
        self.condemned: set[int] = set()
        self.processes: list[ThreadProcess] = []
        self.go_on = threading.Event()
        self.lanes = Lanes(self, idle_seconds=0.05)

    def run(self, number: int, text: str) -> str:
        """Run a call."""
        self.begun.append(number)
        if text == "wait":
            self.go_on.wait(SECONDS)
        return text

    def submit(self, *texts: str, first: int = 0, shape: Shape = ONE_CPU) -> None:
        """Submit calls that are numbered from `first`."""
        for number, text in enumerate(texts, first):
            self.lanes.submit(shape, ShortCall(number, text))

    def open_lane(self, lane: Lane) -> LaneProcess:
        """See `LaneHost`."""
        process = ThreadProcess(lane, self.run)
        if self.refuses:
            process.die()
        else:
            self.processes.append(process)
            lane.ready()
        return process

    def lanes_room(self, node: str) -> float:
        """See `LaneHost`."""
        return self.cpus - self.in_tasks

    def run_as_task(self, shape: Shape, call: ShortCall) -> bool:
        """See `LaneHost`."""
        if not self.takes_tasks:
            return False
        self.tasks.append(call.number)
        self.in_tasks += 1
        return True

    def end_task(self, number: int) -> None:
        """Answer a call that runs as a task."""
        self.in_tasks -= 1
        self.answers[number] = "as a task"
        self.lanes.look()

    def is_condemned(self, number: int) -> bool:
        """See `LaneHost`."""
        return number in self.condemned

    def lane_answers(self, answers: Sequence[tuple[int, str]]) -> None:
        """See `LaneHost`."""
        assert not self.answers.keys() & {number for number, _ in answers}, "a call ended twice"
        self.answers |= dict(answers)

    def lane_lost(self, number: int, error: BaseException) -> None:
        """See `LaneHost`."""
        self.lost.append(number)

    def open(self) -> list[ThreadProcess]:
        """Return the processes that are there."""
        return [process for process in self.processes if not process.dead]

    def holder(self, number: int) -> ThreadProcess:
        """Return the process that runs a call."""
        until(lambda: any(process.worker._running == number for process in self.open()))
        return next(process for process in self.open() if process.worker._running == number)


@pytest.fixture
def host() -> Iterator[Host]:
    """A machine without any call."""
    made = Host()
    yield made
    made.go_on.set()


def test_calls_are_answered_each_once_in_batches_and_lanes_go_when_idle(host: Host) -> None:
    host.submit(*(f"text {number}" for number in range(100)))
    until(lambda: len(host.answers) == 100)
    assert host.answers == {number: f"text {number}" for number in range(100)}
    assert Counter(host.begun) == Counter(range(100))
    assert max(size for process in host.processes for size in process.sizes) == BATCH
    assert len(host.processes) <= 2
    until(lambda: not host.open())
    assert host.lost == []


def test_no_more_lanes_than_there_is_room_for(host: Host) -> None:
    host.cpus = 1.0
    host.submit("wait", *["x"] * 30)
    host.holder(0)
    time.sleep(2 * GIVE_UP_SECONDS)
    assert len(host.processes) == 1
    # Ray tasks that end leave room for another, and its calls do not wait for the one that takes long.
    host.cpus = 2.0
    until(lambda: len(host.answers) == 30)
    assert 0 not in host.answers
    host.go_on.set()
    until(lambda: host.answers.get(0) == "wait")


def test_a_call_that_takes_long_keeps_no_answer_and_no_call_waiting(host: Host) -> None:
    host.submit("a", "b", "wait", *["c"] * 20)
    until(lambda: len(host.answers) == 22)
    assert 2 not in host.answers
    assert Counter(host.begun) == Counter(range(23))


def test_a_worker_that_dies_alone_with_a_call_costs_that_call_only(host: Host) -> None:
    host.submit("wait", *["x"] * 20)
    until(lambda: len(host.answers) == 20)
    process = host.holder(0)
    until(lambda: process.lane.held[0][1].alone)
    process.die()
    until(lambda: host.lost == [0])
    assert Counter(host.begun) == Counter(range(21))


def test_a_call_that_was_given_to_a_worker_that_was_gone_costs_nothing(host: Host) -> None:
    host.cpus = 1.0
    host.lanes._idle_seconds = SECONDS
    host.submit("x")
    until(lambda: 0 in host.answers)
    (process,) = host.open()
    process.kill()
    host.submit("y", first=1)
    until(lambda: 1 in process.lane.held)
    process.lane.failed(RuntimeError("gone"))
    until(lambda: host.answers.get(1) == "y")
    assert host.lost == []


def test_calls_of_a_batch_run_again_alone_where_nobody_knows_who_killed_its_worker(host: Host) -> None:
    host.cpus = 1.0
    started = threading.Event()
    once = host.run

    def run(number: int, text: str) -> str:
        if number == 1 and host.begun.count(1) < 2:
            host.begun.append(1)
            started.set()
            threading.Event().wait(SECONDS)
        return once(number, text)

    host.run = run  # type: ignore[method-assign]
    host.submit("x", "x", "x", "x")
    for _ in range(2):
        started.wait(SECONDS)
        started.clear()
        # At once, before the lane gives up what it holds: the first time nobody knows, then it is the only one.
        host.open()[0].die()
    until(lambda: len(host.answers) == 3)
    assert host.lost == [1]
    assert set(host.answers) == {0, 2, 3}
    assert all(size == 1 for process in host.processes[1:] for size in process.sizes)


def test_the_call_that_a_worker_is_killed_for_is_to_blame(host: Host) -> None:
    host.cpus = 1.0
    host.submit("x", "wait", "x")
    process = host.holder(1)
    host.condemned.add(1)
    process.die()
    until(lambda: host.lost == [1])
    until(lambda: set(host.answers) == {0, 2})


def test_cancelling_ends_a_call_that_runs_and_leaves_the_others(host: Host) -> None:
    host.cpus = 1.0
    host.submit("wait", "x", "x")
    process = host.holder(0)
    host.lanes.cancel(0)
    until(lambda: set(host.answers) == {1, 2})
    assert process.dead
    assert host.lost == []


def test_a_cancelled_call_that_waits_never_begins(host: Host) -> None:
    host.cpus = 1.0
    host.submit("wait", *["x"] * 40)
    host.holder(0)
    host.lanes.cancel(40)
    host.go_on.set()
    until(lambda: len(host.answers) == 40)
    assert 40 not in host.begun


def test_calls_for_a_node_that_is_gone_are_lost(host: Host) -> None:
    host.refuses = True
    host.submit("x", "x", shape=Shape(1.0, 0, "gone"))
    until(lambda: sorted(host.lost) == [0, 1])


def test_idle_lanes_make_room_for_calls_of_another_shape_and_for_ray_tasks(host: Host) -> None:
    host.lanes._idle_seconds = SECONDS
    host.submit(*["x"] * 40)
    until(lambda: len(host.answers) == 40)
    host.submit("y", first=40, shape=Shape(2.0, 0, ""))
    until(lambda: 40 in host.answers)
    assert [process.lane.shape.cpus for process in host.open()] == [2.0]
    host.cpus = 1.0
    host.lanes.look()
    until(lambda: not host.open())


def test_calls_do_not_wait_for_a_lane_and_few_need_none(host: Host) -> None:
    host.takes_tasks = True
    host.submit(*["x"] * 30)
    for number in range(MANY):
        # Two run at once, so the last ones have begun before.
        assert host.processes == [] or number >= MANY - 2
        until(lambda number=number: number in host.tasks)
        host.end_task(number)
    # Those that are left have a lane by now; two may have become tasks before.
    until(lambda: len(host.answers) + host.in_tasks == 30)
    assert len(host.tasks) <= MANY + 2
    assert 1 <= len(host.processes) <= 2, "a second one if the first has not answered yet when there is room for it"


def test_a_chain_of_calls_gets_a_lane_by_and_by(host: Host) -> None:
    host.takes_tasks = True
    host.lanes._idle_seconds = SECONDS
    for number in range(60):
        host.submit("x", first=number)
        until(lambda number=number: number in host.tasks or number in host.answers)
        if number in host.tasks:
            host.end_task(number)
    assert len(host.processes) == 1
    assert 8 <= len(host.tasks) < 60
