"""A small service to disturb: several schedulers on one database, a store, and users, all in this process."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.db.queries import add_model, cancel_job, create_job, enqueue_graph, retry_job
from orchestrator.db.rows import ModelRow
from orchestrator.errors import DatabaseError, NotFoundError
from quant_spec.errors import InvalidInputError
from tests.faults.executor import real_time
from tests.faults.graphs import ARTIFACT, GRAPHS, Graph, undisturbed
from tests.faults.history import Body, History, Request
from tests.faults.member import Hooked, Killed, Member, Trap
from tests.faults.recorder import Recorder
from workers.errors import StoreError
from workers.storage.store import open_store

#: A lease of the schedulers that are disturbed, in seconds: short, so that one who stands still loses it.
LEASE_SECONDS = 0.6
#: The same in the end, when nothing is to be lost.
CALM_LEASE_SECONDS = 30.0
#: After so many seconds without any change nothing more is to be expected.
SILENCE_SECONDS = 30.0
_DIGEST = hashlib.sha256(b"faults").hexdigest()


class World:
    """What faults are done to."""

    def __init__(self, url: str, folder: Path, dice: random.Random, schedulers: int) -> None:
        """Begin with so many schedulers and no job; the database at `url` has the schema and is watched."""
        self.url, self.folder, self.dice = url, folder, dice
        (folder / "store").mkdir()
        self.store = open_store(str(folder / "store"))
        self.postgres = url.startswith("postgres")
        self.recorder = Recorder(url)
        self.members: list[Member] = []
        self.jobs: list[str] = []
        self.graph_of: dict[str, Graph] = {}
        self.requests: list[Request] = []
        self.bodies: list[Body] = []
        self._numbers = itertools.count()
        self._users: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._skew = 0.0
        self._store_back: threading.Timer | None = None
        for _ in range(schedulers):
            self.add_member()

    def add_member(self, lease_seconds: float = LEASE_SECONDS) -> Member:
        """Start another scheduler."""
        name = f"scheduler-{next(self._numbers)}"
        self.members.append(Member(name, self.url, self.folder, self.bodies, lease_seconds))
        return self.members[-1]

    def victim(self) -> Member | None:
        """Return a scheduler that lives, if one does."""
        living = [member for member in self.members if member.alive]
        return self.dice.choice(living) if living else None

    def set_clock(self, seconds: float) -> None:
        """Let the program's clock differ from the database's by so much."""
        self._skew = seconds

    @contextmanager
    def own_clock(self) -> Iterator[None]:
        """Let the program's clock be ours."""
        before = time.time
        time.time = lambda: real_time() + self._skew
        try:
            yield
        finally:
            time.time = before

    def as_user(self, *acts: Callable[[Hooked], Request | None], trap: Trap | None = None) -> None:
        """Do things as a user does, one after the other in a process of its own; what succeeded, the user knows of."""

        def work() -> None:
            hooked = Hooked(self.url)
            if trap is not None:
                hooked.set_trap(Trap(trap.moment, trap.skip, hooked.die, trap.count))
            try:
                # Refused, broken or killed: the user was told of no success, so nothing is owed.
                with suppress(DatabaseError, InvalidInputError, NotFoundError, Killed):
                    for act in acts:
                        request = act(hooked)
                        if request is not None:
                            with self._lock:
                                self.requests.append(request)
            finally:
                hooked.database.close()

        thread = threading.Thread(target=work, daemon=True, name="user")
        thread.start()
        self._users.append(thread)

    def submit(self, hooked: Hooked, graph: Graph, priority: int) -> Request:
        """Make a job of a graph, in one transaction as the command line does."""
        with hooked.database.session() as session:
            model = add_model(session, ModelRow("model", _DIGEST, "Model", "here", 0, 0, {}))
            recipe: dict[str, Any] = {"recipe_name": graph.name, "recipe": {}, "recipe_digest": _DIGEST}
            job = create_job(session, model=model, release_name=graph.release, priority=priority, **recipe)
            enqueue_graph(session, job, graph.nodes, graph.nodes[-1])
        with self._lock:
            self.jobs.append(job)
            self.graph_of[job] = graph
        return Request("submit", job)

    def cancel(self, hooked: Hooked, job: str) -> Request | None:
        """Cancel a job."""
        with hooked.database.session() as session:
            done = cancel_job(session, job)
        return Request("cancel", job) if done else None

    def retry(self, hooked: Hooked, job: str) -> Request:
        """Retry a job."""
        with hooked.database.session() as session:
            retry_job(session, job)
        return Request("retry", job)

    def a_job(self) -> str | None:
        """Return a job that was submitted, if one was."""
        with self._lock:
            return self.dice.choice(self.jobs) if self.jobs else None

    def calm(self) -> None:
        """End all faults: what stands still goes on, what is to happen does not."""
        self.set_clock(0.0)
        if self._store_back is not None:
            self._store_back.join()
        for thread in self._users:
            thread.join(SILENCE_SECONDS)
        for member in self.members:
            member.mend()
            if member.executor is not None:
                member.executor.orders.faults.clear()
                member.executor.orders.no_capacity_until = 0.0
                member.executor.orders.late = member.executor.orders.lost = 0
        if not any(member.alive for member in self.members):
            self.add_member()

    def replace_members(self) -> None:
        """Let all schedulers leave, and start one whose leases are long."""
        for member in self.members:
            if member.alive:
                member.leave()
        for member in self.members:
            member.join(SILENCE_SECONDS)
        self.add_member(CALM_LEASE_SECONDS)

    def wait_for_jobs(self) -> bool:
        """Wait until every job has ended; False if nothing changes any more before."""
        last, since = -1, real_time()
        while self.recorder.query("SELECT id FROM jobs WHERE state IN ('queued', 'running') LIMIT 1"):
            now = self.recorder.query("SELECT max(seq) AS seq FROM faults_changes")[0]["seq"]
            if now != last:
                last, since = now, real_time()
            elif real_time() - since > SILENCE_SECONDS:
                return False
            time.sleep(0.03)
        return True

    def retry_failed(self) -> int:
        """Retry every job that failed, as a user would; return how many."""
        failed = [row["id"] for row in self.recorder.query("SELECT id FROM jobs WHERE state = 'failed'")]
        hooked = Hooked(self.url)
        for job in failed:
            self.requests.append(self.retry(hooked, job))
        hooked.database.close()
        return len(failed)

    def history(self) -> History:
        """Return all that has happened."""
        outputs: dict[str, dict[str, str]] = {}
        targets: dict[str, str] = {}
        for graph in GRAPHS:
            by_key, target = undisturbed(graph)
            outputs |= by_key
            if graph.release is not None:
                targets[graph.name] = target[ARTIFACT]
        names = {row["id"]: row["recipe_name"] for row in self.recorder.query("SELECT id, recipe_name FROM jobs")}
        return History(
            changes=self.recorder.changes(),
            log=self.recorder.log(),
            sources=self.recorder.sets("task_inputs", "task_id", "source_id"),
            wanted_by=self.recorder.sets("job_tasks", "task_id", "job_id"),
            requests=tuple(self.requests),
            bodies=tuple(self.bodies),
            expected_outputs=outputs,
            expected_artifacts={job: targets[name] for job, name in names.items() if name in targets},
            damaged=self._damaged(),
        )

    def _damaged(self) -> tuple[str, ...]:
        """Return the recorded digests whose bytes are not in the store."""
        digests: set[str] = set()
        for row in self.recorder.query("SELECT outputs FROM results WHERE kind = 'noop'"):
            outputs = json.loads(row["outputs"]) if isinstance(row["outputs"], str) else row["outputs"]
            digests |= set(outputs.values())
        found = []
        for digest in sorted(digests):
            try:
                self.store.get_bytes(digest)
            except StoreError:
                found.append(digest)
        return tuple(found)

    def spoil_blob(self, *, deleted: bool) -> None:
        """Delete a recorded blob, or change its bytes and not its size."""
        rows = self.recorder.query("SELECT outputs FROM results WHERE kind = 'noop' ORDER BY key")
        if not rows:
            return
        outputs = self.dice.choice(rows)["outputs"]
        (digest,) = (json.loads(outputs) if isinstance(outputs, str) else outputs).values()
        path = self.folder / "store" / "sha256" / digest[:2] / digest
        if deleted:
            path.unlink(missing_ok=True)
        elif path.is_file():
            data = path.read_bytes()
            path.chmod(0o644)
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])

    def take_store(self, seconds: float) -> None:
        """Take the store away, and bring it back after a while."""
        store, away = self.folder / "store", self.folder / "store-away"
        with self._lock:
            if store.is_dir() and not away.exists():
                store.rename(away)
                self._store_back = threading.Timer(seconds, lambda: away.rename(store))
                self._store_back.daemon = True
                self._store_back.start()

    def crashes(self) -> list[str]:
        """Return what schedulers died of that nobody killed."""
        return [f"{each.name}: {type(each.crash).__name__}: {each.crash}" for each in self.members if each.crash]

    def close(self) -> None:
        """End everything."""
        for member in self.members:
            member.close()
        self.recorder.close()
