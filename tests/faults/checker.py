"""What must hold of any history, whatever went wrong in it. Each check returns one line for each violation.

The rules are written down here once more, apart from the code that they judge: nothing of `orchestrator` is imported.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.faults.history import Body, Change, History

ACTIVE_JOBS = frozenset({"queued", "running"})
#: Changes of state that a task may make. A success is taken back by lineage repair alone, which withdraws its result.
TASK_MOVES = frozenset(
    {
        (None, "blocked"),
        ("blocked", "queued"),
        ("blocked", "succeeded"),
        ("queued", "succeeded"),
        ("queued", "running"),
        ("running", "succeeded"),
        ("running", "queued"),
        ("running", "failed"),
        ("running", "blocked"),  # what it reads was lost, and is made again first
        ("queued", "blocked"),
        ("blocked", "failed"),
        ("blocked", "cancelled"),
        ("queued", "cancelled"),
        ("running", "cancelled"),
        ("failed", "blocked"),
        ("cancelled", "blocked"),
        ("succeeded", "blocked"),
    }
)
JOB_MOVES = frozenset(
    {
        (None, "queued"),
        ("queued", "running"),
        *((state, end) for state in ACTIVE_JOBS for end in ("succeeded", "failed", "cancelled")),
        ("failed", "queued"),
        ("cancelled", "queued"),
    }
)
# Clocks of databases are read in steps of a millisecond.
_TICK = 0.002
# Faults of each sort that a task may have before it fails for good.
_BUDGETS = {"faults_task": 3, "faults_infrastructure": 10}


def states_legal(history: History) -> Iterator[str]:
    """Jobs and tasks only make the moves that they may, and no row of either goes away."""
    for table, moves in (("tasks", TASK_MOVES), ("jobs", JOB_MOVES)):
        for change in history.of(table):
            before, after = change.states
            if before != after and (before, after) not in moves:
                yield f"{table[:-1]} {_name(change)}: went from {before} to {after}"


def leases_exclusive(history: History) -> Iterator[str]:
    """A task is held by one lease at a time, a key by one task; a lease that ran out is good for nothing any more."""
    holders: dict[str, str] = {}
    tokens: set[tuple[str, str]] = set()
    expired = {(each.task, each.attempt) for each in history.log if each.event == "expired"}
    for change in history.of("tasks"):
        before, after = change.before or {}, change.after or {}
        was, now = change.states
        name = _name(change)
        if change.enters("running"):
            yield from _claim_faults(change, holders, tokens)
            tokens.add((after["id"], after["lease_token"]))
            holders[after["key"]] = after["id"]
        elif now == "running":
            if (before["lease_token"], before["attempt"]) != (after["lease_token"], after["attempt"]):
                yield f"task {name}: attempt {before['attempt']} was taken over by {after['attempt']} while it ran"
        elif was == "running":
            holders.pop(before["key"], None)
            late = change.at - before["lease_until"]
            if now == "succeeded" and late > _TICK:
                yield f"task {name}: attempt {before['attempt']} finished {late:.3f} s after its lease had run out"
            if (before["id"], before["attempt"]) in expired and late < -_TICK:
                yield f"task {name}: attempt {before['attempt']} was taken back {-late:.3f} s before its lease ran out"
        if now != "running" and before and after and before["attempt"] != after["attempt"]:
            yield f"task {name}: attempt {before['attempt']} became {after['attempt']} without a claim"


def renewals_in_time(history: History) -> Iterator[str]:
    """No lease is renewed after it has run out, even if nobody has taken the task since.

    A service that waits out outages of its database may do so: then this is not asked of it.
    """
    for change in history.of("tasks"):
        before, after = change.before or {}, change.after or {}
        renewed = change.states == ("running", "running") and after["lease_until"] != before["lease_until"]
        if renewed and before["lease_until"] < change.at - _TICK:
            yield f"task {_name(change)}: attempt {before['attempt']} was renewed after its lease had run out"


def _claim_faults(change: Change, holders: Mapping[str, str], tokens: set[tuple[str, str]]) -> Iterator[str]:
    before, after = change.before or {}, change.after or {}
    name = _name(change)
    if after["key"] in holders:
        yield f"task {name}: claimed while {holders[after['key']][:12]} ran with the same key"
    if after["attempt"] != before.get("attempt", 0) + 1:
        yield f"task {name}: attempt {before.get('attempt')} was followed by {after['attempt']}"
    if after["lease_token"] is None or (after["id"], after["lease_token"]) in tokens:
        yield f"task {name}: claimed for attempt {after['attempt']} without a token of its own"
    if after["lease_until"] is None or after["lease_until"] <= change.at:
        yield f"task {name}: claimed with a lease that had run out already"


def completed_once(history: History) -> Iterator[str]:
    """A key gets one result, and a task one success, unless the result was withdrawn since; neither ever changes."""
    results: set[str] = set()
    succeeded: set[str] = set()
    for change in history.changes:
        if change.table == "results":
            yield from _result_faults(change, results)
        elif change.table == "tasks":
            was, now = change.states
            task = change.row["id"]
            if now == "succeeded" and was != "succeeded":
                if task in succeeded:
                    yield f"task {_name(change)}: succeeded twice"
                succeeded.add(task)
            elif was == "succeeded" and now != "succeeded":
                succeeded.discard(task)
                if (change.before or {})["key"] in results:
                    yield f"task {_name(change)}: its success was taken back though its result was not withdrawn"


def _result_faults(change: Change, results: set[str]) -> Iterator[str]:
    key = change.row["key"]
    if change.before is None:
        if key in results:
            yield f"key {key[:12]}: got a second result"
        results.add(key)
    elif change.after is None:
        results.discard(key)
    elif _json(change.before["outputs"]) != _json(change.after["outputs"]):
        yield f"key {key[:12]}: its recorded outputs were changed"


def finished_not_repeated(history: History) -> Iterator[str]:
    """What has a recorded result is not claimed again, under whatever id, unless the result was withdrawn."""
    results: set[str] = set()
    for change in history.changes:
        if change.table == "results":
            (results.discard if change.after is None else results.add)(change.row["key"])
        elif change.table == "tasks" and change.enters("running") and change.row["key"] in results:
            yield f"task {_name(change)}: claimed for attempt {change.row['attempt']} though its result is recorded"


def inputs_first(history: History) -> Iterator[str]:
    """A task is claimed when all that it reads has succeeded."""
    states: dict[str, str | None] = {}
    for change in history.of("tasks"):
        states[change.row["id"]] = change.states[1]
        if change.enters("running"):
            missing = [each for each in history.sources.get(change.row["id"], ()) if states.get(each) != "succeeded"]
            if missing:
                yield f"task {_name(change)}: claimed while {len(missing)} of its inputs had not succeeded"


def releases_immutable(history: History) -> Iterator[str]:
    """Versions count up from 1 without holes, mean one digest for ever, and no job publishes twice."""
    last: dict[str, int] = {}
    digests: dict[tuple[str, str], int] = {}
    published: dict[str, str] = {}
    for change in history.of("releases"):
        row = change.row
        ref = f"{row['name']}@{row['version']}"
        if change.before is not None:
            yield f"release {ref}: was {'deleted' if change.after is None else 'changed'}"
            continue
        if row["version"] != last.get(row["name"], 0) + 1:
            yield f"release {ref}: came after version {last.get(row['name'], 0)}"
        last[row["name"]] = row["version"]
        if (row["name"], row["digest"]) in digests:
            yield f"release {ref}: published again, as it was version {digests[row['name'], row['digest']]} already"
        digests[row["name"], row["digest"]] = row["version"]
        if row["job_id"] in published:
            yield f"job {row['job_id']}: published {published[row['job_id']]} and {ref}"
        published[row["job_id"]] = ref
    for change in history.of("jobs"):
        before = (change.before or {}).get("release")
        if before is not None and change.row["release"] != before:
            yield f"job {_name(change)}: its release changed from {before} to {change.row['release']}"


def cancel_wins(history: History) -> Iterator[str]:
    """A cancelled job stays cancelled unless the user retries it, and nothing begins that no active job wants."""
    retries = Counter(each.job for each in history.log if each.event == "retried" and each.job and not each.task)
    for change in history.of("jobs"):
        if change.states[0] == "cancelled" and change.states[1] != "cancelled":
            retries[change.row["id"]] -= 1
            if retries[change.row["id"]] < 0:
                yield f"job {_name(change)}: left the state cancelled though nobody retried it"
    ends = _ends(history)
    active: set[str] = set()
    for change in history.changes:
        if change.table == "jobs":
            (active.add if change.states[1] in ACTIVE_JOBS else active.discard)(change.row["id"])
        elif change.table == "tasks" and change.enters("running"):
            jobs = history.wanted_by.get(change.row["id"], frozenset())
            if not jobs & active and not any(change.seq <= ends.get(job, -1) for job in jobs):
                yield f"task {_name(change)}: claimed though no active job wants it"


def _ends(history: History) -> dict[str, int]:
    """Return, for each job, the last change of the transaction in which it last ended."""
    ending = {each.row["id"]: each for each in history.of("jobs") if each.states[1] not in ACTIVE_JOBS}
    last_of: dict[int, int] = {}
    for change in history.changes:
        if change.tx is not None:
            last_of[change.tx] = change.seq
    return {job: each.seq if each.tx is None else last_of[each.tx] for job, each in ending.items()}


def nothing_lost(history: History) -> Iterator[str]:
    """Every job that was submitted is there and has ended, and what the user was told happened."""
    jobs = {each.row["id"]: each for each in history.of("jobs")}
    seen = {(each.row["id"], *each.states) for each in history.of("jobs")}
    for request in history.requests:
        if request.job not in jobs:
            yield f"job {request.job}: the user was told of its {request.what}, and it is not there"
        elif request.what == "cancel" and not any((request.job, was, "cancelled") in seen for was in ACTIVE_JOBS):
            yield f"job {request.job}: the user was told that it is cancelled, and it never was"
        elif request.what == "retry" and not any(
            (request.job, was, "queued") in seen for was in ("failed", "cancelled")
        ):
            yield f"job {request.job}: the user was told of its retry, and there was none"
    states = {each.row["id"]: str(each.row["state"]) for each in history.of("tasks")}
    for name, change in jobs.items():
        if change.row["state"] in ACTIVE_JOBS:
            left = Counter(states[task] for task, wanting in history.wanted_by.items() if name in wanting)
            yield f"job {name}: has not ended, its tasks are {dict(left)}"


def failures_explained(history: History) -> Iterator[str]:
    """A task fails for good when its budget of faults is spent or its input is bad, and a job only with a task.

    Or when a blob is lost once more: whatever loses it would do so for ever.
    """
    invalid = {each.task for each in history.log if each.event == "failed" and each.data.get("fault") == "invalid"}
    for change in history.of("tasks"):
        row = change.row
        spent = any(row[name] >= budget for name, budget in _BUDGETS.items())
        if change.enters("failed") and row["id"] not in invalid and not spent:
            counts = {name: row[name] for name in _BUDGETS}
            yield f"task {_name(change)}: failed for good with {counts} of {_BUDGETS}"
    failed = {each.row["id"] for each in history.of("tasks") if each.states[1] == "failed"}
    for change in history.of("jobs"):
        mine = (change.row["id"] in history.wanted_by.get(task, ()) for task in failed)
        is_worn_out = any(digest in (change.row.get("error") or "") for digest in history.spoiled_again)
        if change.enters("failed") and not any(mine) and not is_worn_out:
            yield f"job {_name(change)}: failed though none of its tasks did"


def digests_as_undisturbed(history: History) -> Iterator[str]:
    """Results, artifacts and the bytes in the store are those of a run that nothing disturbed."""
    for change in history.of("results"):
        wanted = history.expected_outputs.get(change.row["key"])
        if change.after is not None and wanted is not None and _mapping(change.after["outputs"]) != dict(wanted):
            yield f"key {change.row['key'][:12]}: got {change.after['outputs']}, wanted {dict(wanted)}"
    for change in history.of("jobs"):
        artifact = history.expected_artifacts.get(change.row["id"])
        if change.states[1] == "succeeded" and artifact is not None and change.row["digest"] != artifact:
            yield f"job {_name(change)}: got digest {change.row['digest']}, wanted {artifact}"
    for digest in history.damaged:
        yield f"blob {digest[:12]}: recorded, and its bytes are missing or others"


def log_tells_it(history: History) -> Iterator[str]:
    """The service's own log has each claim, success and cancellation of a task once, and no other."""
    moves: Counter[tuple[str, str, Any]] = Counter()
    names = {("queued", "running"): "claimed", ("running", "succeeded"): "finished", ("running", "failed"): "failed"}
    for change in history.of("tasks"):
        if change.states[0] != change.states[1] and change.states in names:
            moves[names[change.states], change.row["id"], change.row["attempt"]] += 1
    told = Counter(
        (each.event, each.task, each.attempt)
        for each in history.log
        if each.task is not None and each.attempt is not None and each.event in names.values()
    )
    for event, task, attempt in sorted((moves - told) + (told - moves)):
        key = (event, task, attempt)
        yield f"task {task[:12]}: was {event} {moves[key]} times in attempt {attempt}, the log says {told[key]}"
    ids = [each.id for each in history.log]
    if ids != sorted(set(ids)):
        yield "log: its numbers do not rise"


def bodies_exclusive(history: History) -> Iterator[str]:
    """No body of a key begins while another of the same key runs, unless the other's lease had run out.

    Stronger than exclusive leases: who takes a task away from a holder that answers waits until its body has ended.
    """
    expired = {(each.task, each.attempt) for each in history.log if each.event == "expired"}
    claims: dict[tuple[str, str], list[Change]] = {}
    for change in history.of("tasks"):
        if change.states == ("queued", "running"):
            claims.setdefault((change.row["lease_owner"], change.row["key"]), []).append(change)
    by_key: dict[str, list[Body]] = {}
    for body in sorted(history.bodies, key=lambda each: each.started):
        for other in by_key.setdefault(body.key, []):
            if body.started < other.ended:
                made = [each for each in claims.get((other.owner, other.key), ()) if each.at <= other.started + _TICK]
                if made and (made[-1].row["id"], made[-1].row["attempt"]) in expired:
                    continue
                yield f"key {body.key[:12]}: a body began {other.ended - body.started:.3f} s before another had ended"
        by_key[body.key].append(body)


Check = Callable[[History], Iterator[str]]
CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        states_legal,
        leases_exclusive,
        renewals_in_time,
        completed_once,
        finished_not_repeated,
        inputs_first,
        releases_immutable,
        cancel_wins,
        nothing_lost,
        failures_explained,
        digests_as_undisturbed,
        log_tells_it,
    )
}


def violations(history: History) -> dict[str, list[str]]:
    """Return what is wrong with a history, by check; empty if nothing is."""
    found = {name: list(check(history)) for name, check in CHECKS.items()}
    return {name: lines for name, lines in found.items() if lines}


def figures(history: History) -> dict[str, int]:
    """Return how much happened in a history, to show that something did."""
    log = Counter(each.event for each in history.log if each.task is not None)
    ends = {each.row["id"]: str(each.row["state"]) for each in history.of("jobs")}
    renewed = sum(
        change.states == ("running", "running") and change.before["lease_until"] != change.after["lease_until"]
        for change in history.of("tasks")
        if change.before is not None and change.after is not None
    )
    return {
        "changes": len(history.changes),
        "renewed": renewed,
        **{
            name: log[name]
            for name in ("claimed", "finished", "retried", "expired", "released", "cancelled", "revived")
        },
        "releases": len(history.of("releases")),
        "bodies": len(history.bodies),
        **{f"jobs_{state}": count for state, count in sorted(Counter(ends.values()).items())},
    }


def _name(change: Change) -> str:
    return str(change.row["id"])[:12]


def _mapping(value: Any) -> dict[str, Any]:
    return dict(json.loads(value) if isinstance(value, str) else value)


def _json(value: Any) -> str:
    return json.dumps(_mapping(value), sort_keys=True)
