"""Signs of life, by a clock that the test moves; and a Ray whose processes are stopped for real."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from workers.errors import Fault
from workers.execution.execute import TaskCall
from workers.execution.executor import Finished, RayExecutor
from workers.execution.pulse import Beat, Listener, Pulse, Watchdog, end_process
from workers.storage.store import NodeStore

BEAT = Beat("node", 7, 1.0, 1, None)


def test_a_pulse_counts_and_says_what_runs() -> None:
    beats: list[Beat] = []
    pulse = Pulse("node", beats.append, 0.02)
    with pulse.during(5):
        until(lambda: beats and beats[-1].call == 5)
    until(lambda: beats[-1].call is None)
    assert [each.count for each in beats] == list(range(1, len(beats) + 1))
    assert {(each.node, each.pid, each.born) for each in beats} == {
        ("node", psutil.Process().pid, psutil.Process().create_time())
    }


def test_a_pulse_goes_on_when_a_sign_cannot_be_sent() -> None:
    tried = threading.Semaphore(0)

    def fail(beat: Beat) -> None:
        tried.release()
        raise OSError("no way through")

    Pulse("node", fail, 0.01)
    assert all(tried.acquire(timeout=30) for _ in range(3))


def test_who_says_nothing_new_for_too_long_is_silent() -> None:
    listener = Listener(10.0)
    listener.hear({"a": BEAT, "b": BEAT}, 0.0)
    listener.hear({"a": replace(BEAT, count=2), "b": BEAT}, 4.0)
    listener.hear({"a": replace(BEAT, count=2), "b": BEAT}, 8.0)
    assert listener.silent(10.0) == {}
    assert listener.silent(10.1) == {"b": BEAT}
    listener.hear({"a": replace(BEAT, count=3)}, 11.0)
    assert listener.silent(11.0) == {}


def test_silence_while_nobody_listened_is_held_against_no_one() -> None:
    listener = Listener(10.0)
    listener.hear({"a": BEAT}, 0.0)
    listener.hear({"a": BEAT}, 600.0)
    assert listener.silent(600.0) == {}


def test_another_process_of_the_same_number_is_another() -> None:
    listener = Listener(10.0)
    for now in (0.0, 4.0, 8.0):
        listener.hear({"a": BEAT}, now)
    listener.hear({"a": replace(BEAT, born=2.0)}, 10.5)
    assert listener.silent(10.5) == {}
    end_process(psutil.Process().pid, born=1.0)  # it is not us who began then, so we live


def test_calls_run_since_they_were_first_heard_of() -> None:
    listener = Listener(10.0)
    listener.hear({"a": replace(BEAT, call=1)}, 0.0)
    listener.hear({"a": replace(BEAT, call=1, count=2)}, 4.0)
    name, beat, seconds = listener.running(7.0)[1]
    assert (name, beat.count, seconds) == ("a", 2, 7.0)
    listener.hear({"a": replace(BEAT, call=2, count=3)}, 8.0)
    assert {call: seconds for call, (_, _, seconds) in listener.running(9.0).items()} == {2: 1.0}


def test_a_watchdog_barks_once_after_silence_and_not_before() -> None:
    barks: list[float] = []
    dog = Watchdog(0.5, lambda: barks.append(time.monotonic()))
    dog.start()
    for _ in range(8):
        time.sleep(0.1)
        dog.hear()
    heard = time.monotonic()
    until(lambda: barks)
    assert barks[0] >= heard
    dog.stop()


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


SILENCE = 5.0


@pytest.fixture(scope="module")
def impatient() -> Iterator[RayExecutor]:
    """A Ray whose processes may be silent for a short time only; its last test ends it."""
    executor = RayExecutor.start(cpus=2, silence_seconds=SILENCE)
    yield executor
    executor.shutdown()


@pytest.fixture
def call(folder_store: NodeStore, tmp_path: Path) -> TaskCall:
    """A call that takes long."""
    return TaskCall("noop", {"payload": 1, "seconds": 300.0}, {}, folder_store.url, str(tmp_path / "cache"))


def family(executor: RayExecutor) -> list[psutil.Process]:
    """Return the driver's process and all below it."""
    driver = psutil.Process(executor._process.pid)
    return [driver, *driver.children(recursive=True)]


def busy(executor: RayExecutor) -> list[psutil.Process]:
    """Return the workers that are in the middle of a task."""
    return [process for process in family(executor) if process.name() == "ray::noop"]


def collect(executor: RayExecutor, count: int) -> dict[int, Finished]:
    """Wait for so many calls to end."""
    ended: dict[int, Finished] = {}
    until(lambda: ended.update({each.handle: each for each in executor.wait(0.5)}) or len(ended) >= count)
    return ended


@pytest.mark.ray
class TestStoppedProcesses:
    """SIGSTOP keeps connections, so nothing but silence shows it."""

    def test_a_stopped_worker_is_killed_and_its_call_has_failed(self, impatient: RayExecutor, call: TaskCall) -> None:
        stopped = impatient.submit(call)
        until(lambda: busy(impatient))
        (worker,) = busy(impatient)
        other = impatient.submit(replace(call, params={"payload": 2, "seconds": SILENCE + 3.0}))
        # A sign of life with the number of its call must have come.
        time.sleep(2.0)
        worker.suspend()
        ended = collect(impatient, 2)
        assert ended[other].output is not None
        assert ended[stopped].fault is Fault.INFRASTRUCTURE
        assert "got no sign of life from its worker for 5 s" in ended[stopped].error
        until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
        assert impatient.alive()

    def test_a_call_that_runs_for_too_long_is_taken_away(self, impatient: RayExecutor, call: TaskCall) -> None:
        late = impatient.submit(replace(call, deadline_seconds=2.0))
        in_time = impatient.submit(replace(call, params={"payload": 3, "seconds": 4.0}, deadline_seconds=600.0))
        ended = collect(impatient, 2)
        assert ended[in_time].output is not None
        assert ended[late].fault is Fault.DEADLINE
        assert "wanted at most 2 s" in ended[late].error

    def test_a_stopped_driver_is_killed_with_all_that_is_below_it(self, impatient: RayExecutor, call: TaskCall) -> None:
        impatient.submit(call)
        until(lambda: busy(impatient))
        processes = family(impatient)
        processes[0].suspend()
        until(lambda: not impatient.alive())
        until(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes))
