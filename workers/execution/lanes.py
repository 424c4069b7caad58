"""Short calls, many at a time, on workers that stay: which call goes where. Ray's part of it is in `remote.py`.

A Ray task costs about a millisecond, and ten if it has to wait for the one before, as Ray then gives a worker back and
asks for one again. So calls that take no longer than that go to *lanes*: workers that take calls in batches and stay
until they have had nothing to do for a while. What holds for Ray tasks holds here too:

* A lane occupies on its node what one of its calls does, and is closed when others need the room.
* A lane is a new process, as Ray makes no actor of one that has run tasks. So calls run as Ray tasks at first, and a
  lane is opened where many have within a moment.
* An answer does not wait for a call that takes longer than was thought: the lane gives up what it holds but that one.
* A worker that dies costs the call that it ran, and no other. Where it is not known which one that was, as several
  were under way or none had begun, each is run again alone, at no cost to it.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

#: A batch has so many calls at most, and a lane so many batches: one that runs, and one that is there when it ends.
BATCH, DEPTH = 8, 2
#: A batch that is out for longer gives up what it has not begun; in seconds.
GIVE_UP_SECONDS = 0.25
#: A lane that has nothing to do for so long is closed.
IDLE_SECONDS = 2.0
#: So many Ray tasks of one shape in so many seconds are worth a lane.
MANY, MANY_SECONDS = 8, 2.0
_TICK_SECONDS = 0.1
# What asks for less CPUs counts so much.
_LEAST_CPUS = 0.25


@dataclass(frozen=True, slots=True)
class Shape:
    """What a lane occupies, and the id of its node, "" for any."""

    cpus: float
    memory_bytes: int
    node: str


@dataclass(frozen=True, slots=True)
class ShortCall:
    """A call by its number, as JSON; one that runs `alone` shares its batch with no other."""

    number: int
    text: str
    alone: bool = False


@dataclass(frozen=True, slots=True)
class GivenUp:
    """What a lane says when it is told to give up: the answers that it has, and the call that it runs, if any."""

    answers: Sequence[tuple[int, str]]
    running: int | None


class LaneWorker:
    """The side of a lane that runs calls, in a process of its own."""

    def __init__(self, run: Callable[[int, str], str]) -> None:
        """Run each call by `run`, which takes its number and JSON and returns the answer's JSON."""
        self._run = run
        self._lock = threading.Lock()
        self._answers: list[tuple[int, str]] = []
        self._running: int | None = None
        self._given_up = -1

    def run_batch(self, batch: int, calls: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
        """Run calls one after the other; return the answers that `give_up` has not returned already."""
        for number, text in calls:
            with self._lock:
                if batch <= self._given_up:
                    break
                self._running = number
            answer = self._run(number, text)
            with self._lock:
                self._answers.append((number, answer))
                self._running = None
        with self._lock:
            answers, self._answers = self._answers, []
        return answers

    def give_up(self, batch: int) -> tuple[list[tuple[int, str]], int | None]:
        """Begin no more calls of this batch and those before; callable from another thread. See `GivenUp`."""
        with self._lock:
            self._given_up = max(batch, self._given_up)
            answers, self._answers = self._answers, []
            return answers, self._running


class LaneProcess(Protocol):
    """A worker's process as the lanes see it; what it answers comes back by the lane's own methods."""

    def run_batch(self, batch: int, calls: Sequence[tuple[int, str]]) -> None:
        """Begin a batch after those before; `Lane.answered` follows, or `Lane.failed`."""
        ...

    def give_up(self, batch: int) -> None:
        """Ask for what `LaneWorker.give_up` returns; `Lane.gave_up` follows, or `Lane.failed`."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


@dataclass(eq=False)
class Lane:
    """A worker, and the calls that it has been given, in order, each with its batch's number.

    `ready`, `answered`, `gave_up` and `failed` are called by its process, from any thread.
    """

    shape: Shape
    post: Callable[[Callable[[], None]], None]
    owner: Lanes
    held: dict[int, tuple[int, ShortCall]] = field(default_factory=dict)
    process: LaneProcess | None = None
    is_ready: bool = False
    gone: bool = False
    batches: int = 0
    under_way: int = 0
    gave_up_at: int = -1
    since: float = 0.0
    cancelled: dict[int, float] = field(default_factory=dict)

    def ready(self) -> None:
        """The process has begun."""
        self.post(partial(self.owner._ready, self))

    def answered(self, answers: Sequence[tuple[int, str]]) -> None:
        """A batch has ended."""
        self.post(partial(self.owner._answered, self, answers))

    def gave_up(self, said: GivenUp, batch: int) -> None:
        """The process begins no more of this batch and those before."""
        self.post(partial(self.owner._gave_up, self, said, batch))

    def failed(self, error: BaseException) -> None:
        """The process is gone, or never came."""
        self.post(partial(self.owner._failed, self, error))

    def batch_of_first(self) -> list[int]:
        """Return the calls of the batch that runs, or that ended without our having heard of it."""
        first = next(iter(self.held.values()))[0] if self.held else -1
        return [number for number, (batch, _) in self.held.items() if batch == first]


class LaneHost(Protocol):
    """What lanes are told by, and tell, the driver; its methods are called from the lanes' thread."""

    def open_lane(self, lane: Lane) -> LaneProcess:
        """Start a worker's process for a lane."""
        ...

    def lanes_room(self, node: str) -> float:
        """Return the CPUs of a node ("" for any) that nothing but lanes occupies."""
        ...

    def run_as_task(self, shape: Shape, call: ShortCall) -> bool:
        """Run a call as a Ray task; False if that cannot be."""
        ...

    def is_condemned(self, number: int) -> bool:
        """Say whether it is this call that its worker is killed for."""
        ...

    def lane_answers(self, answers: Sequence[tuple[int, str]]) -> None:
        """Calls have ended in an answer."""
        ...

    def lane_lost(self, number: int, error: BaseException) -> None:
        """The worker of a call was lost with it."""
        ...


class Lanes:
    """All lanes of a driver; its public methods are callable from any thread, the work is done in one of its own."""

    def __init__(self, host: LaneHost, *, idle_seconds: float = IDLE_SECONDS) -> None:
        """Open lanes on `host` where there are calls for them."""
        self._host = host
        self._idle_seconds = idle_seconds
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lanes: dict[Shape, list[Lane]] = {}
        self._waiting: dict[Shape, deque[ShortCall]] = {}
        # When the last calls became Ray tasks.
        self._tasks: dict[Shape, deque[float]] = {}
        threading.Thread(target=self._serve, name="lanes", daemon=True).start()

    def submit(self, shape: Shape, call: ShortCall) -> None:
        """Run a call."""
        self._events.put(partial(self._submit, shape, call))

    def cancel(self, number: int) -> None:
        """Stop a call; nothing is told of it any more."""
        self._events.put(partial(self._cancel, number))

    def look(self) -> None:
        """Something else began to run on a node, or ended: see who has to give up its room, or who has got some."""
        self._events.put(lambda: None)

    def _serve(self) -> None:
        while True:
            try:
                event = self._events.get(timeout=_TICK_SECONDS if self._lanes or self._waiting else None)
            except queue.Empty:
                self._tick(time.monotonic())
                continue
            event()
            # All that has come meanwhile, so that calls go out together.
            while not self._events.empty():
                self._events.get()()
            self._feed()

    def _submit(self, shape: Shape, call: ShortCall) -> None:
        self._waiting.setdefault(shape, deque()).append(call)

    def _ready(self, lane: Lane) -> None:
        lane.is_ready, lane.since = True, time.monotonic()

    def _each(self) -> Iterator[Lane]:
        for lanes in list(self._lanes.values()):
            yield from list(lanes)

    def _feed(self) -> None:
        """Give waiting calls to lanes, and open lanes for those that have none."""
        self._close_surplus()
        now = time.monotonic()
        for shape, waiting in list(self._waiting.items()):
            if not waiting:
                del self._waiting[shape]
                continue
            allowed = self._allowed(shape)
            lanes = self._lanes.setdefault(shape, [])
            open_ = [lane for lane in lanes if lane.is_ready][:allowed]
            prompt = [lane for lane in open_ if not lane.held or now - lane.since <= GIVE_UP_SECONDS]
            for _ in range(DEPTH):
                for lane in sorted(prompt, key=lambda each: each.under_way):
                    self._give(lane, waiting, len(prompt))
            is_enough = not waiting if open_ else self._run_as_tasks(shape, waiting, now)
            # Not one for each call: they are short, and a new process is not.
            if not is_enough and len(lanes) < allowed and all(lane.held for lane in lanes):
                self._open(shape)
            elif not lanes:
                del self._lanes[shape]

    def _run_as_tasks(self, shape: Shape, waiting: deque[ShortCall], now: float) -> bool:
        """Run calls as Ray tasks where there is room beside lanes that are being opened; say whether that will do."""
        before = self._tasks.setdefault(shape, deque(maxlen=MANY))
        while waiting and self._room(shape.node) >= shape.cpus:
            if not self._host.run_as_task(shape, waiting[0]):
                return False
            waiting.popleft()
            before.append(now)
        return len(before) < MANY or now - before[0] > MANY_SECONDS

    def _close_surplus(self) -> None:
        """Close lanes that have nothing to do where others have begun to run on their nodes."""
        for lane in self._each():
            is_idle = lane.is_ready and not lane.held and not self._waiting.get(lane.shape)
            if is_idle and self._room(lane.shape.node) < 0:
                self._close(lane)

    def _room(self, node: str) -> float:
        """Return the CPUs of a node that are left beside everything."""
        lanes = sum(lane.shape.cpus for lane in self._each() if lane.shape.node == node)
        return self._host.lanes_room(node) - lanes

    def _allowed(self, shape: Shape) -> int:
        """Return how many lanes of a shape its node has room for, and one at least: it waits for its room in Ray."""
        if shape not in self._lanes:
            for lane in self._each():
                is_idle = lane.is_ready and not lane.held
                if is_idle and lane.shape.node == shape.node and self._room(shape.node) < shape.cpus:
                    self._close(lane)
        room = self._room(shape.node) / max(shape.cpus, _LEAST_CPUS)
        return max(1, len(self._lanes.get(shape, ())) + math.floor(room))

    def _open(self, shape: Shape) -> None:
        lane = Lane(shape, self._events.put, self)
        self._lanes[shape].append(lane)
        lane.process = self._host.open_lane(lane)

    def _give(self, lane: Lane, waiting: deque[ShortCall], lanes: int) -> None:
        """Give a lane its next batch, if it may have another and there is one."""
        if not waiting or lane.under_way >= DEPTH or (lane.held and self._is_alone(lane)):
            return
        count = min(BATCH, math.ceil(len(waiting) / (DEPTH * lanes)))
        if waiting[0].alone:
            count = 0 if lane.held else 1
        calls: list[ShortCall] = []
        while len(calls) < count and waiting and (not calls or not waiting[0].alone):
            calls.append(waiting.popleft())
        if not calls:
            return
        if not lane.held:
            lane.since = time.monotonic()
        lane.batches += 1
        lane.under_way += 1
        lane.held |= {call.number: (lane.batches, call) for call in calls}
        assert lane.process is not None
        lane.process.run_batch(lane.batches, [(call.number, call.text) for call in calls])

    @staticmethod
    def _is_alone(lane: Lane) -> bool:
        return any(call.alone for _, call in lane.held.values())

    def _answered(self, lane: Lane, answers: Sequence[tuple[int, str]]) -> None:
        lane.under_way -= 1
        lane.since = time.monotonic()
        self._report(lane, answers)

    def _report(self, lane: Lane, answers: Sequence[tuple[int, str]]) -> None:
        """Tell of the answers that are still wanted of a lane."""
        wanted = []
        for number, text in answers:
            if lane.held.pop(number, None) is not None and lane.cancelled.pop(number, None) is None:
                wanted.append((number, text))
        if wanted:
            self._host.lane_answers(wanted)

    def _gave_up(self, lane: Lane, said: GivenUp, batch: int) -> None:
        """Put back what a lane does not begin."""
        self._report(lane, said.answers)
        if said.running in lane.held:
            # From now on it is known which one runs.
            its, call = lane.held[said.running]
            lane.held[said.running] = (its, replace(call, alone=True))
        if not lane.gone:
            back = [number for number, (its, _) in lane.held.items() if its <= batch and number != said.running]
            self._put_back(lane, back)

    def _put_back(self, lane: Lane, numbers: Sequence[int], *, alone: Sequence[int] = ()) -> None:
        """Let calls of a lane wait again, in front."""
        waiting = self._waiting.setdefault(lane.shape, deque())
        for number in reversed(numbers):
            _, call = lane.held.pop(number)
            if lane.cancelled.pop(number, None) is None:
                waiting.appendleft(replace(call, alone=True) if number in alone else call)

    def _failed(self, lane: Lane, error: BaseException) -> None:
        """A worker is gone: its call is lost, if it is known which; the others run again."""
        if lane.gone:
            return
        self._remove(lane)
        if not lane.is_ready:
            # Where none can be opened, as its node is gone, nothing waits for ever.
            if lane.shape in self._lanes:
                return
            for call in self._waiting.pop(lane.shape, ()):
                self._host.lane_lost(call.number, error)
            return
        first = lane.batch_of_first()
        to_blame = [number for number in lane.held if self._host.is_condemned(number)]
        to_blame = to_blame or [number for number in first if lane.held[number][1].alone]
        if len(to_blame) == 1:
            lane.held.pop(to_blame[0])
            if lane.cancelled.pop(to_blame[0], None) is None:
                self._host.lane_lost(to_blame[0], error)
            first = []
        self._put_back(lane, list(lane.held), alone=first)

    def _cancel(self, number: int) -> None:
        for waiting in self._waiting.values():
            for call in waiting:
                if call.number == number:
                    waiting.remove(call)
                    return
        for lane in self._each():
            if number in lane.held:
                # Most have ended before anybody could be killed.
                lane.cancelled[number] = time.monotonic()
                self._ask_to_give_up(lane)

    def _ask_to_give_up(self, lane: Lane) -> None:
        if lane.gave_up_at < lane.batches and lane.process is not None:
            lane.gave_up_at = lane.batches
            lane.process.give_up(lane.batches)

    def _tick(self, now: float) -> None:
        """See to lanes that take long, or have nothing to do."""
        for lane in self._each():
            if any(now - at > GIVE_UP_SECONDS for number, at in lane.cancelled.items() if number in lane.held):
                self._close(lane)
            elif lane.held and now - lane.since > GIVE_UP_SECONDS:
                self._ask_to_give_up(lane)
            elif lane.is_ready and not lane.held and now - lane.since > self._idle_seconds:
                self._close(lane)
        self._feed()

    def _close(self, lane: Lane) -> None:
        """End a worker; what it holds runs elsewhere, but for what was cancelled."""
        self._remove(lane)
        self._put_back(lane, list(lane.held))
        if lane.process is not None:
            lane.process.kill()

    def _remove(self, lane: Lane) -> None:
        lane.gone = True
        lanes = self._lanes[lane.shape]
        lanes.remove(lane)
        if not lanes:
            del self._lanes[lane.shape]
