"""The process that drives Ray, and what runs on Ray; with `nodes.py` alone in importing it. `executor.py` starts it.

Standard input: `{"submit": id, "call": {…}}` or `{"cancel": id}`, one a line. Standard output: `{"capacity": {…}}` when
Ray is there and whenever it changes, with a list of its nodes, `{"alive": true}` every few seconds, and for each call
`{"id":…, "outputs":…, "metrics":…, "ran":…}` or `{"id":…, "error":…, "fault":…}`, as `workers.execution.local` answers.
The process ends, with every process of a local Ray, when its input closes or Ray is lost.

Ray retries nothing (the queue does, and counts), keeps no results of ours (they are in the store), and keeps its worker
processes, as importing torch takes seconds.

Workers give signs of life (`pulse.py`) through Ray's own table of keys and values, which every node reaches. One that
is silent for too long, or whose call runs for longer than it may, is killed by a task on its node: Ray's own
cancellation asks the worker, which cannot answer.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import ray
from ray._private.node import Node
from ray.exceptions import RayError, TaskCancelledError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.errors import Fault, describe, is_out_of_memory
from workers.execution.cluster import in_steps
from workers.execution.devices import device_number
from workers.execution.execute import TaskCall
from workers.execution.lanes import IDLE_SECONDS, GivenUp, Lane, LaneProcess, Lanes, LaneWorker, Shape, ShortCall
from workers.execution.local import answer_call_text
from workers.execution.nodes import ClusterWatch
from workers.execution.pulse import Beat, Listener, Pulse, beat_seconds, end_process

# Ray's object store holds calls and answers only; this is about the least it accepts.
_OBJECT_STORE_BYTES = 80 << 20
_MEMORY_SHARE = 0.9
_MOST_FUNCTIONS = 1000
_LOOK_SECONDS = 0.5
_PROBE_SECONDS = 5.0
# Where signs of life are kept in Ray's table.
_NAMESPACE = b"quantmill"
# Parts of a local Ray that nothing here uses: autoscaler, copier of logs, server of the dashboard and of jobs. Each
# is a Python process that takes a second of CPU before the first task, and some memory as long as Ray lives.
_UNUSED_PARTS = ("start_monitor", "start_log_monitor", "start_api_server")


def run_call(number: int, text: str, beat: float) -> str:
    """Run a call in a Ray worker; JSON in and out, so that no pickle of ours crosses the cluster."""
    call = TaskCall(**json.loads(text))
    if call.gpus > 0:
        devices = [f"cuda:{device_number([given], os.environ)}" for given in ray.get_gpu_ids()] or ["cuda"]
        call = replace(call, device=devices[0], devices=devices if len(devices) > 1 else ())
    with _pulse(beat).during(number):
        return answer_call_text(call)


class RayLane(LaneWorker):
    """A lane as a Ray actor; it gives up while it runs a batch, so that has a thread of its own."""

    def __init__(self, beat: float) -> None:
        """Run calls as Ray tasks do."""
        super().__init__(lambda number, text: run_call(number, text, beat))

    def ready(self) -> None:
        """Return when it is there."""

    @ray.method(concurrency_group="staying")
    def stay(self) -> None:
        """Never return: who has asked hears at once of the end of this process."""
        threading.Event().wait()

    @ray.method(concurrency_group="asked")
    def give_up(self, batch: int) -> tuple[list[tuple[int, str]], int | None]:
        """See `LaneWorker.give_up`."""
        return super().give_up(batch)


class RayLaneProcess:
    """The process of a lane, as `Lanes` sees it; answers go back to the lane from Ray's threads."""

    def __init__(self, actor: Any, lane: Lane) -> None:
        """Say when the actor is there, and when it is gone."""
        self._actor, self._lane = actor, lane
        self._then(actor.ready.remote(), lambda _: lane.ready())
        self._then(actor.stay.remote(), lambda _: None)

    def _then(self, reference: Any, done: Callable[[Any], None]) -> None:
        def hear(future: Future[Any]) -> None:
            error = future.exception()
            if error is not None:
                self._lane.failed(error)
            else:
                done(future.result())

        reference.future().add_done_callback(hear)

    def run_batch(self, batch: int, calls: Sequence[tuple[int, str]]) -> None:
        """See `LaneProcess`."""
        self._then(self._actor.run_batch.remote(batch, calls), self._lane.answered)

    def give_up(self, batch: int) -> None:
        """See `LaneProcess`."""
        self._then(self._actor.give_up.remote(batch), lambda said: self._lane.gave_up(GivenUp(*said), batch))

    def kill(self) -> None:
        """See `LaneProcess`."""
        ray.kill(self._actor)


@lru_cache(maxsize=1)
def _pulse(seconds: float) -> Pulse:
    """Begin to give signs of life; a worker process belongs to one driver, and keeps its pulse between calls."""
    context = ray.get_runtime_context()
    node = context.get_node_id()
    key = f"{context.get_job_id()}/{node}/{os.getpid()}".encode()

    def send(beat: Beat) -> None:
        _internal_kv_put(key, json.dumps(beat.to_json()).encode(), overwrite=True, namespace=_NAMESPACE)

    return Pulse(node, send, seconds)


class Driver:
    """Takes orders from standard input and reports to standard output."""

    def __init__(self, answers: BinaryIO, *, local: bool, silence_seconds: float) -> None:
        """Drive the Ray that this process is connected to; see `RayExecutor.start` for `silence_seconds`."""
        self._answers = answers
        self._local = local
        self._silence = silence_seconds
        self._node = ray.get_runtime_context().get_node_id()
        self._prefix = f"{ray.get_runtime_context().get_job_id()}/".encode()
        self._listener = Listener(silence_seconds)
        self._deadlines: dict[int, float] = {}
        # Calls whose workers are being killed: since when, why, and whose fault that is.
        self._condemned: dict[int, tuple[float, str, Fault]] = {}
        self._writing = threading.Lock()
        self._running: dict[int, Any] = {}
        # Calls that the lanes have, as they were ordered.
        self._short: dict[int, dict[str, Any]] = {}
        self._remote = ray.remote(max_retries=0, max_calls=0)(run_call)
        self._functions: dict[tuple[Any, ...], Any] = {}
        # A process that has begun to use one GPU cannot change to another that it did not see.
        self._remote_once = ray.remote(max_retries=0, max_calls=1)(run_call)
        options: dict[str, Any] = {"concurrency_groups": {"asked": 1, "staying": 1}, "max_restarts": 0}
        make_actor: Any = ray.remote(**options, max_task_retries=0)
        self._remote_lane = make_actor(RayLane)
        # Nobody else waits for the room that an idle lane has on a Ray of our own.
        self._lanes = Lanes(self, idle_seconds=math.inf if local else IDLE_SECONDS)
        # Node and CPUs of each call that is a Ray task.
        self._occupied: dict[int, tuple[str, float]] = {}
        self._cluster = ClusterWatch(local=local)
        self._capacity: dict[str, Any] = {}
        self._node_cpus = self._node_memory = 0.0
        self._last_probe = time.monotonic()

    def run(self) -> None:
        """Serve until the input closes or Ray is lost."""
        self._probe()
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._probe_for_ever, daemon=True).start()
        threading.Thread(target=self._watch_for_ever, daemon=True).start()
        threading.Thread(target=self._say_alive, daemon=True).start()
        # This thread started Ray's processes, which the kernel kills when it ends.
        while self._ray_is_there():
            time.sleep(_LOOK_SECONDS)
        end(self._local)

    def _read(self) -> None:
        for line in sys.stdin:
            order = json.loads(line)
            if "submit" in order:
                self._submit(order["submit"], order["call"])
            elif order["cancel"] in self._short:
                self._forget(order["cancel"])
                self._lanes.cancel(order["cancel"])
            elif order["cancel"] in self._running:
                ray.cancel(self._running[order["cancel"]], force=True)
        if not self._local:
            # The cluster stays; the signs of life of our workers, which end with us, need not.
            _internal_kv_del(self._prefix, del_by_prefix=True, namespace=_NAMESPACE)
        end(self._local)

    def _submit(self, number: int, call: dict[str, Any]) -> None:
        # A task that asks for more than any machine has would wait for ever; it gets a whole machine instead.
        cpus = min(call["cpus"], self._node_cpus)
        memory = min(in_steps(call["memory_bytes"]), int(self._node_memory))
        node = self._cluster.node(call["node"])
        bound = node.id if node is not None and self._cluster.size > 1 else ""
        if call["deadline_seconds"] is not None:
            self._deadlines[number] = call["deadline_seconds"]
        if call["brief"] and not call["gpus"]:
            self._short[number] = call
            self._lanes.submit(Shape(cpus, memory, bound), ShortCall(number, json.dumps(call)))
            return
        once = call["gpus"] > 0 and (node is None or not node.by_number)
        self._start(number, call, json.dumps(call), Shape(cpus, memory, bound), once=once)

    def _start(self, number: int, call: dict[str, Any], text: str, shape: Shape, *, once: bool) -> None:
        """Run a call as a Ray task."""
        options: dict[str, Any] = {"num_cpus": shape.cpus, "num_gpus": call["gpus"]}
        options |= {"memory": shape.memory_bytes or None, "name": call["kind"]}
        if shape.node:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(shape.node, soft=False)
        try:
            beat = beat_seconds(self._silence)
            reference = self._function(options, shape.node, once=once).remote(number, text, beat)
        except (RayError, ValueError) as error:
            self._forget(number)
            self._send({"id": number, "error": f"ray: {describe(error)}", "fault": Fault.INFRASTRUCTURE})
            return
        self._running[number] = reference
        self._occupied[number] = (shape.node, shape.cpus)
        self._lanes.look()
        reference.future().add_done_callback(lambda future: self._report(number, future))

    def run_as_task(self, shape: Shape, call: ShortCall) -> bool:
        """Run a short call as others run; see `LaneHost`."""
        order = self._short.get(call.number)
        if order is not None:  # else it was cancelled
            self._start(call.number, order, call.text, shape, once=False)
            self._short.pop(call.number, None)
        return True

    def open_lane(self, lane: Lane) -> LaneProcess:
        """Start an actor; see `LaneHost`."""
        shape = lane.shape
        options: dict[str, Any] = {"num_cpus": shape.cpus, "memory": shape.memory_bytes or None}
        if shape.node:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(shape.node, soft=False)
        return RayLaneProcess(self._remote_lane.options(**options).remote(beat_seconds(self._silence)), lane)

    def lanes_room(self, node: str) -> float:
        """Return what Ray tasks leave of a node; see `LaneHost`."""
        there = self._cluster.node(node)
        cpus = self._node_cpus if there is None else there.cpus
        return cpus - sum(taken for where, taken in list(self._occupied.values()) if where == node)

    def is_condemned(self, number: int) -> bool:
        """Say whether a call's worker is being killed for it; see `LaneHost`."""
        return number in self._condemned

    def lane_answers(self, answers: Sequence[tuple[int, str]]) -> None:
        """Send the ends of calls; see `LaneHost`."""
        lines = [f'{{"id": {number}, {text[1:]}\n' for number, text in answers if self._forget(number)]
        self._write("".join(lines).encode())

    def lane_lost(self, number: int, error: BaseException) -> None:
        """Send the end of a call whose worker was lost; see `LaneHost`."""
        condemned = self._condemned.get(number)
        if self._forget(number):
            self._send_error(number, error, condemned)

    def _forget(self, number: int) -> bool:
        """Drop what is known of a call; say whether it had not ended yet."""
        self._deadlines.pop(number, None)
        self._condemned.pop(number, None)
        self._occupied.pop(number, None)
        known = number in self._short or number in self._running
        self._short.pop(number, None)
        self._running.pop(number, None)
        return known

    def _function(self, options: dict[str, Any], node: str, *, once: bool) -> Any:
        """Return the remote function with these options; making one anew for each call takes longer than the call."""
        name = (*(options[each] for each in ("num_cpus", "num_gpus", "memory", "name")), node, once)
        if name not in self._functions:
            if len(self._functions) >= _MOST_FUNCTIONS:
                self._functions.clear()
            self._functions[name] = (self._remote_once if once else self._remote).options(**options)
        return self._functions[name]

    def _report(self, number: int, future: Future[str]) -> None:
        """Send the end of a call that is a Ray task; runs in a thread of Ray's."""
        condemned = self._condemned.get(number)
        known = self._forget(number)
        self._lanes.look()
        if not known:
            return
        error = future.exception()
        if error is None:
            self._write(f'{{"id": {number}, {future.result()[1:]}\n'.encode())
        else:
            self._send_error(number, error, condemned)

    def _send_error(self, number: int, error: BaseException, condemned: tuple[float, str, Fault] | None) -> None:
        """Send the end of a call that has no answer: a body's own errors are answers, so Ray lost worker or node."""
        if condemned is not None:
            self._send({"id": number, "error": condemned[1], "fault": condemned[2]})
            return
        what = "cancelled" if isinstance(error, TaskCancelledError) else _first_line(error)
        fault = Fault.MEMORY if is_out_of_memory(error) else Fault.INFRASTRUCTURE
        self._send({"id": number, "error": f"ray: {what}", "fault": fault})

    def _send(self, message: dict[str, Any]) -> None:
        self._write(json.dumps(message).encode() + b"\n")

    def _write(self, lines: bytes) -> None:
        with self._writing:
            try:
                self._answers.write(lines)
                self._answers.flush()
            except OSError:
                end(self._local)

    def _say_alive(self) -> None:
        while True:
            self._send({"alive": True})
            time.sleep(beat_seconds(self._silence))

    def _watch_for_ever(self) -> None:
        """Look at the workers' signs of life, and take calls away from those that are stuck."""
        while True:
            time.sleep(beat_seconds(self._silence))
            try:
                self._watch()
            except Exception as error:
                # Also what Ray's table raises while it is out: the next look finds out more.
                sys.stderr.write(f"workers not looked at: {describe(error)}\n")

    def _watch(self) -> None:
        beats = {}
        for key in _internal_kv_list(self._prefix, namespace=_NAMESPACE):
            value = _internal_kv_get(key, namespace=_NAMESPACE)
            if value is not None:
                beats[key.decode()] = Beat(**json.loads(value))
        now = time.monotonic()
        self._listener.hear(beats, now)
        for name, beat in self._listener.silent(now).items():
            self._take_away(name, beat, f"got no sign of life from its worker for {self._silence:.0f} s", now)
        for call, (name, beat, seconds) in self._listener.running(now).items():
            limit = self._deadlines.get(call)
            if limit is not None and seconds > limit and call not in self._condemned:
                what = f"got a task that ran for {seconds:.0f} s, wanted at most {limit:.0f} s"
                self._take_away(name, beat, what, now, Fault.DEADLINE)
        for call, (since, what, fault) in list(self._condemned.items()):
            # Its node answers no more than its worker does, and Ray has not noticed.
            if now - since > self._silence and (call in self._short or call in self._running):
                self._lanes.cancel(call)
                self._forget(call)
                self._send({"id": call, "error": what, "fault": fault})

    def _take_away(self, name: str, beat: Beat, what: str, now: float, fault: Fault = Fault.INFRASTRUCTURE) -> None:
        """Kill a worker; its call, if it has one, ends with this error."""
        if beat.call in self._running or beat.call in self._short:
            self._condemned.setdefault(beat.call, (now, f"ray: {what}, on node {beat.node[:12]}", fault))
        _internal_kv_del(name.encode(), namespace=_NAMESPACE)
        if beat.node == self._node:
            end_process(beat.pid, beat.born)
            return
        there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
        ray.remote(num_cpus=0, max_retries=0)(end_process).options(scheduling_strategy=there).remote(
            beat.pid, beat.born
        )

    def _probe_for_ever(self) -> None:
        while True:
            time.sleep(_PROBE_SECONDS)
            try:
                self._probe()
            except RayError:
                end(self._local)

    def _probe(self) -> None:
        """Ask the cluster what it has, and report it if that changed."""
        nodes = self._cluster.look()
        if self._local and not nodes:
            # Its only node is there and answers no more; another Ray is started in its place.
            end(self._local)
        self._node_cpus = max((node.cpus for node in nodes), default=0.0)
        self._node_memory = max((node.memory_bytes for node in nodes), default=0)
        capacity = {
            "cpus": sum(node.cpus for node in nodes),
            "gpus": sum(node.gpus for node in nodes),
            "memory_bytes": sum(node.memory_bytes for node in nodes),
            "nodes": [node.to_json() for node in nodes],
        }
        self._last_probe = time.monotonic()
        if capacity != self._capacity:
            self._capacity = capacity
            self._send({"capacity": capacity})

    def _ray_is_there(self) -> bool:
        """Say whether the cluster answered lately; a local Ray must also have its two processes."""
        if time.monotonic() - self._last_probe > max(self._silence, 4 * _PROBE_SECONDS):
            return False
        if not self._local:
            return True
        alive = {child.name() for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}
        return {"gcs_server", "raylet"} <= alive


def end(local: bool) -> None:
    """End this process at once, and all processes of a local Ray, which share its process group."""
    if local:
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def start_ray(
    address: str | None, cpus: int | None, memory_bytes: int | None, gpus: int | None, temporary: Path
) -> None:
    """Start a local Ray on the loopback address, or connect to the cluster at `address`."""
    if address is not None:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return
    for name in _UNUSED_PARTS:
        # Of this process alone, which does nothing else. Ray has no public switch for them, and its version is pinned.
        setattr(Node, name, _start_nothing)
    ray.init(
        address="local",
        num_cpus=cpus,
        num_gpus=gpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=_OBJECT_STORE_BYTES,
        _memory=memory_bytes or int(psutil.virtual_memory().available * _MEMORY_SHARE),
        _temp_dir=str(temporary),
    )


def _start_nothing(node: Node, **options: Any) -> None:
    """Stand in for a part of a local Ray that is not started."""


def main() -> None:
    """Start or find Ray as the first argument (JSON) says, and serve."""
    answers = os.fdopen(os.dup(1), "wb")
    # Whatever Ray prints must not mix with the answers.
    os.dup2(2, 1)
    config = json.loads(sys.argv[1])
    try:
        amounts = (config["cpus"], config["memory_bytes"], config["gpus"])
        start_ray(config["address"], *amounts, Path(config["temporary"]))
        driver = Driver(answers, local=config["address"] is None, silence_seconds=config["silence_seconds"])
    except Exception as error:
        # Ray raises whatever it likes here; all of it means that there is no Ray.
        answers.write(json.dumps({"failed": describe(error)}).encode() + b"\n")
        answers.flush()
        raise
    driver.run()
