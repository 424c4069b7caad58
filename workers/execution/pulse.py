"""Signs of life: a process that runs tasks says every few seconds that it lives, and someone notices when it stops.

A process that was stopped, or that hangs in a way that stops all of its threads, keeps its connections: nothing but its
silence shows it. Times are those of the listener's own clock, so that no worker's clock matters.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import psutil

#: A process says so many times that it lives before its silence is held against it.
BEATS = 6
#: ... but not less often than this, in seconds.
LONGEST_BEAT = 5.0
#: After so many seconds of silence a process counts as stuck. Libraries may keep all threads waiting for a while.
SILENCE_SECONDS = 60.0


def beat_seconds(silence_seconds: float) -> float:
    """Return how often to give a sign of life where silence is tolerated for so long."""
    return min(silence_seconds / BEATS, LONGEST_BEAT)


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life: which process, the how many-th it is, and what the process runs; JSON.

    `born` is when the process began, so that another one that has got its number since is not taken for it.
    """

    node: str
    pid: int
    born: float
    count: int
    call: int | None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


class Pulse:
    """Gives signs of life from a thread of its own for as long as the process lives."""

    def __init__(self, node: str, send: Callable[[Beat], None], seconds: float) -> None:
        """Send at once and every `seconds`; a sign that cannot be sent is left out."""
        self._node, self._send, self._seconds = node, send, seconds
        self._born = psutil.Process().create_time()
        self._call: int | None = None
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    @contextmanager
    def during(self, call: int) -> Iterator[None]:
        """Say, with the next sign, that the process runs this call; nothing is sent for a call that is short."""
        self._call = call
        try:
            yield
        finally:
            self._call = None

    def _run(self) -> None:
        count = 0
        while True:
            count += 1
            # Whatever is out, this thread must go on: the next sign may come through.
            with suppress(Exception):
                self._send(Beat(self._node, os.getpid(), self._born, count, self._call))
            time.sleep(self._seconds)


@dataclass(slots=True)
class _Heard:
    beat: Beat
    at: float
    since: float


class Listener:
    """Notes signs of life, and says who has fallen silent and how long calls have been running."""

    def __init__(self, silence_seconds: float) -> None:
        """Take a process for stuck after so many seconds of silence."""
        self._silence = silence_seconds
        self._heard: dict[str, _Heard] = {}
        self._listened: float | None = None

    def hear(self, beats: Mapping[str, Beat], now: float) -> None:
        """Take the last sign of each process that is known, by name; those not among them are forgotten.

        A listener that did not listen for a while, stopped itself or cut off, holds no silence of that time against
        anyone.
        """
        deaf = self._listened is not None and now - self._listened > self._silence / 2
        self._listened = now
        for name in set(self._heard) - set(beats):
            del self._heard[name]
        for name, beat in beats.items():
            last = self._heard.get(name)
            if last is None or beat.call != last.beat.call or beat.born != last.beat.born:
                self._heard[name] = _Heard(beat, now, now)
            elif deaf or beat.count != last.beat.count:
                last.beat, last.at = beat, now

    def silent(self, now: float) -> dict[str, Beat]:
        """Return the last signs of those who have been silent for too long, by name."""
        return {name: each.beat for name, each in self._heard.items() if now - each.at > self._silence}

    def running(self, now: float) -> dict[int, tuple[str, Beat, float]]:
        """Return who runs a call, and for how many seconds, by call."""
        found = {}
        for name, each in self._heard.items():
            if each.beat.call is not None:
                found[each.beat.call] = (name, each.beat, now - each.since)
        return found


def end_process(pid: int, born: float) -> None:
    """Kill a process of this machine, stopped or not, if it is still the one that began then."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.create_time() == born:
            process.send_signal(signal.SIGKILL)


class Watchdog:
    """Calls something once when nothing has been heard for too long; from a thread of its own."""

    def __init__(self, silence_seconds: float, bark: Callable[[], None]) -> None:
        """Call `bark` after so many seconds without `hear`; `start` begins."""
        self._silence, self._bark = silence_seconds, bark
        self._last = time.monotonic()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._last = time.monotonic()
        self._thread.start()

    def hear(self) -> None:
        """Note a sign of life."""
        self._last = time.monotonic()

    def stop(self) -> None:
        """Listen no longer."""
        self._ending.set()

    def _run(self) -> None:
        step = beat_seconds(self._silence)
        looked = time.monotonic()
        while not self._ending.wait(step):
            now = time.monotonic()
            if now - looked > 3 * step:
                # This process itself was stopped, and has not had the time to read what had come.
                self._last = now
            looked = now
            if now - self._last > self._silence:
                self._bark()
                return
