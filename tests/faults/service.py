"""A service as its users and its recorder see it, whatever it runs on."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.db.queries import add_model, cancel_job, create_job, enqueue_graph, retry_job
from orchestrator.db.rows import ModelRow
from orchestrator.errors import DatabaseError, NotFoundError
from quant_spec.errors import InvalidInputError
from tests.faults.executor import real_time
from tests.faults.graphs import ARTIFACT, Graph, undisturbed
from tests.faults.history import Body, History, Request
from tests.faults.member import Hooked, Trap
from tests.faults.recorder import Recorder

_DIGEST = hashlib.sha256(b"faults").hexdigest()


class Service:
    """A database that is watched, a folder of blobs, and users who submit, cancel and retry."""

    #: After so many seconds without any change nothing more is to be expected.
    silence_seconds = 30.0

    def __init__(self, url: str, blobs: Path, dice: random.Random, graphs: Sequence[Graph]) -> None:
        """Watch the database at `url`; blobs lie in the folder `blobs`; users submit `graphs`."""
        self.url, self.blobs, self.dice, self.graphs = url, blobs, dice, graphs
        self.postgres = url.startswith("postgres")
        self.recorder = Recorder(url)
        self.jobs: list[str] = []
        self.requests: list[Request] = []
        self.bodies: list[Body] = []
        self.spoiled: Counter[str] = Counter()
        self.user_errors: list[str] = []
        self.miscounts: set[str] = set()
        self.refusals: list[str] = []
        self.users: list[threading.Thread] = []
        self.lock = threading.Lock()

    def as_user(self, *acts: Callable[[Hooked], Request | None], trap: Trap | None = None) -> None:
        """Do things as a user does, one after the other in a process of its own; what succeeded, the user knows of."""

        def work() -> None:
            hooked = Hooked(self.url)
            if trap is not None:
                hooked.set_trap(Trap(trap.moment, trap.skip, hooked.die, trap.count))
            try:
                # Refused, broken or killed: the user was told of no success, so nothing is owed.
                with suppress(DatabaseError, InvalidInputError, NotFoundError, SystemExit), self.noting_refusals():
                    for act in acts:
                        request = act(hooked)
                        if request is not None:
                            with self.lock:
                                self.requests.append(request)
            except BaseException as error:
                self.user_errors.append(f"user: {type(error).__name__}: {error}")
            finally:
                hooked.database.close()

        thread = threading.Thread(target=work, daemon=True, name="user")
        thread.start()
        self.users.append(thread)

    @contextmanager
    def noting_refusals(self) -> Iterator[None]:
        """Note if the database refuses rows, whoever goes on as if it had been out."""
        try:
            yield
        except DatabaseError as error:
            self.note_refusal(str(error))
            raise

    def note_refusal(self, message: str) -> None:
        """Note what was said of the database, if it is that it refused rows: no fault does that, our own code does."""
        if "constraint" in message:
            self.refusals.append(message)

    def submit(self, hooked: Hooked, graph: Graph, priority: int) -> Request:
        """Make a job of a graph, in one transaction as the command line does."""
        with hooked.database.session() as session:
            model = add_model(session, ModelRow("model", _DIGEST, "Model", "here", 0, 0, {}))
            recipe: dict[str, Any] = {"recipe_name": graph.name, "recipe": {}, "recipe_digest": _DIGEST}
            job = create_job(session, model=model, release_name=graph.release, priority=priority, **recipe)
            enqueue_graph(session, job, graph.nodes, graph.nodes[-1])
        with self.lock:
            self.jobs.append(job)
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
        with self.lock:
            return self.dice.choice(self.jobs) if self.jobs else None

    def wait_for_jobs(self) -> bool:
        """Wait until every job has ended; False if nothing changes any more before."""
        last, since = -1, real_time()
        self.look()
        while self.recorder.query("SELECT id FROM jobs WHERE state IN ('queued', 'running') LIMIT 1"):
            now = self.recorder.query("SELECT max(seq) AS seq FROM faults_changes")[0]["seq"]
            if now != last:
                last, since = now, real_time()
            elif real_time() - since > self.silence_seconds:
                return False
            self.tend()
            self.look()
        return True

    def look(self) -> None:
        """See whether all counts are right at this moment."""
        self.miscounts.update(self.recorder.miscounts())

    def tend(self) -> None:
        """Wait a moment, and start again what has ended and should not have."""
        time.sleep(0.03)

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
        for graph in self.graphs:
            by_key, target = undisturbed(graph)
            outputs |= by_key
            if graph.release is not None:
                targets[graph.name] = target[ARTIFACT]
        names = {row["id"]: row["recipe_name"] for row in self.recorder.query("SELECT id, recipe_name FROM jobs")}
        return History(
            changes=self.recorder.changes(),
            log=self.recorder.log(),
            sources=self.recorder.sources(),
            wanted_by=self.recorder.sets("job_tasks", "task_id", "job_id"),
            requests=tuple(self.requests),
            bodies=tuple(self.bodies),
            expected_outputs=outputs,
            expected_artifacts={job: targets[name] for job, name in names.items() if name in targets},
            damaged=self._damaged(),
            spoiled_again=frozenset(digest for digest, times in self.spoiled.items() if times > 1),
        )

    def _damaged(self) -> tuple[str, ...]:
        """Return the recorded digests whose bytes are not in the store."""
        digests: set[str] = set()
        for row in self.recorder.query("SELECT outputs FROM results WHERE kind = 'noop'"):
            outputs = json.loads(row["outputs"]) if isinstance(row["outputs"], str) else row["outputs"]
            digests |= set(outputs.values())
        return tuple(sorted(digest for digest in digests - set(self.spoiled) if not self._is_whole(digest)))

    def _is_whole(self, digest: str) -> bool:
        path = self.blob(digest)
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest

    def blob(self, digest: str) -> Path:
        """Return where a blob's bytes lie."""
        return self.blobs / "sha256" / digest[:2] / digest

    def crashes(self) -> list[str]:
        """Return what died that nobody killed."""
        return list(self.user_errors)
