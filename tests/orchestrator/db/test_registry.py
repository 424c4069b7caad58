"""Models, releases, aliases, timings, and the digests that are still meant."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.db.queries import (
    add_model,
    cancel_job,
    find_model,
    find_release,
    kind_timings,
    known_results,
    list_models,
    list_releases,
    references,
    retry_job,
    set_alias,
)
from orchestrator.db.rows import ModelRow, ReleaseRow, Timing
from orchestrator.errors import NotFoundError
from orchestrator.graph import TaskNode
from quant_spec.errors import InvalidInputError
from quant_spec.keys import task_key

Driver = Any  # the fixture's class lives in conftest.py

MODEL = ModelRow("emoji32", "ab" * 32, "UNet2DModel", "examples/models/emoji32", 17, 4, {"units": ["z", "a"]})


def release_task(queue: Driver, name: str) -> TaskNode:
    node: TaskNode = queue.node(name, kind="release")
    return node


def publish(queue: Driver, name: str, artifact: str, metrics: dict[str, Any] | None = None) -> str:
    """Run a job that publishes an artifact under a name; return the job."""
    node = release_task(queue, f"{name} {artifact}")
    job: str = queue.submit([node], release=name)
    if claimed := queue.claim():
        finish_release(queue, claimed[0].lease, artifact, metrics)
    return job


def finish_release(queue: Driver, lease: Any, artifact: str, metrics: dict[str, Any] | None = None) -> None:
    from orchestrator.db.queries import finish_task

    outputs = {"artifact": queue.digest(artifact), "card": queue.digest("card")}
    recorded = {"artifact_bytes": 1234, "metrics": metrics or {"psnr_db": 38.5}}
    with queue.database.session() as session:
        assert finish_task(session, lease, outputs, recorded, 1.0)


def releases(queue: Driver, name: str | None = None) -> list[ReleaseRow]:
    with queue.database.session(read_only=True) as session:
        return list_releases(session, name)


def find(queue: Driver, ref: str) -> ReleaseRow:
    with queue.database.session(read_only=True) as session:
        return find_release(session, ref)


# Models


def test_add_model_registers_once(queue: Driver) -> None:
    with queue.database.session() as session:
        first = add_model(session, MODEL)
        assert add_model(session, replace(MODEL, source="elsewhere")) == first
        assert replace(first, created_at=None) == MODEL
        assert first.created_at is not None
        assert list(first.inspection["units"]) == ["z", "a"]
        other = add_model(session, replace(MODEL, name="again", digest="cd" * 32))
        assert list_models(session) == [other, first]


def test_add_model_refuses_another_model_of_that_name(queue: Driver) -> None:
    with queue.database.session() as session:
        add_model(session, MODEL)
    refusal = pytest.raises(InvalidInputError, match="'emoji32': got digest cdcdcdcdcdcd, but it names abababababab")
    with refusal, queue.database.session() as session:
        add_model(session, replace(MODEL, digest="cd" * 32))
    for name in ("", "Upper", "../x", "a" * 129, "a/b"):
        with pytest.raises(InvalidInputError), queue.database.session() as session:
            add_model(session, replace(MODEL, name=name))
    with queue.database.session() as session:
        assert [model.digest for model in list_models(session)] == [MODEL.digest]


def test_add_model_by_two_at_once_registers_one(queue: Driver) -> None:
    def add(_: int) -> ModelRow:
        with queue.database.session() as session:
            return add_model(session, MODEL)

    with ThreadPoolExecutor(4) as pool:
        assert len({row.created_at for row in pool.map(add, range(8))}) == 1


def test_find_model_by_name_or_digest(queue: Driver) -> None:
    with queue.database.session() as session:
        first = add_model(session, MODEL)
        add_model(session, replace(MODEL, name="same"))
        add_model(session, replace(MODEL, name="near", digest="abab" + "c" * 60))
        assert find_model(session, "emoji32") == first
        assert find_model(session, "ababa") == first
        assert find_model(session, "ab" * 32) == first
        with pytest.raises(InvalidInputError, match="fits 3 models"):
            find_model(session, "abab")
        for name in ("emoji", "aba", "%", "ffff"):
            with pytest.raises(NotFoundError):
                find_model(session, name)


# Publishing


def test_a_finished_release_task_publishes_in_the_same_transaction(queue: Driver) -> None:
    metrics = {"psnr_db": 38.5, "sqnr_db_per_step": [30.0, 31.0], "n": 256}
    job = publish(queue, "emoji", "bytes", metrics)
    row = queue.job(job)
    assert (row.state, row.release, row.digest, row.metrics) == (
        "succeeded",
        "emoji@1",
        queue.digest("bytes"),
        metrics,
    )
    (release,) = releases(queue)
    assert (release.name, release.version, release.digest) == ("emoji", 1, queue.digest("bytes"))
    assert (release.bytes, release.aliases, release.job, release.metrics) == (1234, ("latest",), job, metrics)
    assert release.ref == "emoji@1"


def test_versions_count_up_by_name_and_latest_follows(queue: Driver) -> None:
    for artifact in ("one", "two", "three"):
        publish(queue, "emoji", artifact)
    publish(queue, "digits", "one")
    assert [(each.ref, each.aliases) for each in releases(queue)] == [
        ("digits@1", ("latest",)),
        ("emoji@1", ()),
        ("emoji@2", ()),
        ("emoji@3", ("latest",)),
    ]
    assert [each.ref for each in releases(queue, "emoji")] == ["emoji@1", "emoji@2", "emoji@3"]


def test_the_same_bytes_under_the_same_name_are_one_version(queue: Driver) -> None:
    first = publish(queue, "emoji", "one")
    publish(queue, "emoji", "two")
    before = releases(queue)
    again = publish(queue, "emoji", "one")
    assert (queue.job(first).release, queue.job(again).release) == ("emoji@1", "emoji@1")
    assert queue.job(again).state == "succeeded"
    # What was published last is the latest, whatever its number.
    assert [(each.ref, each.aliases) for each in releases(queue)] == [("emoji@1", ("latest",)), ("emoji@2", ())]
    assert [replace(each, aliases=()) for each in releases(queue)] == [replace(each, aliases=()) for each in before]


def test_a_cached_job_publishes_under_its_own_name(queue: Driver) -> None:
    publish(queue, "emoji", "one")
    node = release_task(queue, "emoji one")
    job = queue.submit([node], release="other")
    assert queue.job(job).release == "other@1"
    assert find(queue, "other").digest == find(queue, "emoji").digest


def test_a_job_without_a_release_name_publishes_nothing(queue: Driver) -> None:
    node = release_task(queue, "node")
    job = queue.submit([node])
    finish_release(queue, queue.take(node), "bytes")
    row = queue.job(job)
    assert (row.state, row.release, row.digest) == ("succeeded", None, queue.digest("bytes"))
    assert releases(queue) == []


def test_a_target_that_is_no_release_task_publishes_nothing(queue: Driver) -> None:
    node = queue.node("node", kind="score")
    job = queue.submit([node], release="emoji")
    finish_release(queue, queue.take(node), "bytes")
    assert (queue.job(job).state, queue.job(job).release) == ("succeeded", None)
    assert releases(queue) == []


def test_a_release_task_without_an_artifact_fails_the_job(queue: Driver) -> None:
    node = release_task(queue, "node")
    job = queue.submit([node], release="emoji")
    queue.finish(queue.take(node))
    row = queue.job(job)
    assert row.state == "failed"
    assert "got no artifact" in row.error
    assert releases(queue) == []


def test_a_crash_before_the_commit_publishes_nothing(queue: Driver) -> None:
    node = release_task(queue, "node")
    job = queue.submit([node], release="emoji")
    lease = queue.take(node)
    queue.database.commit_hook = lambda stage: 1 // 0
    with pytest.raises(ZeroDivisionError):
        finish_release(queue, lease, "bytes")
    queue.database.commit_hook = None
    assert releases(queue) == []
    assert queue.job(job).state == "running"
    finish_release(queue, lease, "bytes")
    assert queue.job(job).release == "emoji@1"


def test_a_cancelled_job_publishes_nothing_and_its_retry_does(queue: Driver) -> None:
    node = release_task(queue, "node")
    job = queue.submit([node], release="emoji")
    queue.take(node)
    with queue.database.session() as session:
        cancel_job(session, job)
    assert releases(queue) == []
    with queue.database.session() as session:
        retry_job(session, job)
    queue.skip_backoff()
    finish_release(queue, queue.take(node), "bytes")
    assert queue.job(job).release == "emoji@1"


# References and aliases


def test_find_release_by_every_kind_of_reference(queue: Driver) -> None:
    for artifact in ("one", "two"):
        publish(queue, "emoji", artifact)
    with queue.database.session() as session:
        set_alias(session, "emoji@1", "prod")
    one, two = queue.digest("one"), queue.digest("two")
    refs = {
        "emoji@1": one,
        "emoji@2": two,
        "emoji": two,
        "emoji@latest": two,
        "emoji@prod": one,
        two[:8]: two,
        one: one,
    }
    assert {ref: find(queue, ref).digest for ref in refs} == refs
    assert find(queue, "emoji@1").aliases == ("prod",)


def test_find_release_finds_nothing_by_what_names_none(queue: Driver) -> None:
    publish(queue, "emoji", "one")
    odd = ["", "@1", "nothing", "%", "fff"]
    for ref in [*odd, *(f"emoji@{version}" for version in ("3", "0", "-1", "", "staging", "9" * 20, "²"))]:
        with pytest.raises(NotFoundError, match=re.escape(repr(ref))) as error:
            find(queue, ref)
        assert error.value.exit_code == 102


def test_find_release_by_digits_that_fit_several(queue: Driver) -> None:
    publish(queue, "emoji", "one")
    publish(queue, "other", "one")
    assert find(queue, queue.digest("one")[:6]).name == "other"
    changed = queue.digest("one")[:6] + "0" * 58
    queue.execute("UPDATE releases SET digest = :digest WHERE name = 'other'", digest=changed)
    with pytest.raises(InvalidInputError, match="fits 2 releases"):
        find(queue, changed[:6])


def test_set_alias_moves_and_stays_within_its_name(queue: Driver) -> None:
    for name in ("emoji", "digits"):
        for artifact in ("one", "two"):
            publish(queue, name, artifact)
    with queue.database.session() as session:
        assert set_alias(session, "emoji@1", "prod").aliases == ("prod",)
        assert set_alias(session, "emoji", "prod").aliases == ("latest", "prod")
        assert set_alias(session, "digits@1", "prod").ref == "digits@1"
    assert find(queue, "emoji@prod").version == 2
    assert find(queue, "emoji@1").aliases == ()
    assert find(queue, "digits@prod").version == 1


def test_set_alias_refuses_what_is_no_alias(queue: Driver) -> None:
    publish(queue, "emoji", "one")
    before = queue.snapshot()
    for alias in ("latest", "7", "Prod", "", "a@b", "../up", "²"):
        with (
            pytest.raises(InvalidInputError, match=re.escape(repr(alias))) as error,
            queue.database.session() as session,
        ):
            set_alias(session, "emoji@1", alias)
        assert error.value.exit_code == 2
    assert queue.snapshot() == before


def test_set_alias_of_no_release(queue: Driver) -> None:
    with pytest.raises(NotFoundError), queue.database.session() as session:
        set_alias(session, "emoji@1", "prod")


# Results


def test_known_results_gives_outputs_of_recorded_keys(queue: Driver) -> None:
    node = queue.node("node")
    queue.submit([node])
    queue.finish(queue.take(node), "bytes")
    assert node.id == task_key(node.kind, node.version, node.params, {"data": [queue.digest("data")]})
    with queue.database.session(read_only=True) as session:
        keys = [node.id, *(queue.digest(str(number)) for number in range(2500))]
        assert known_results(session, keys) == {node.id: {"out": queue.digest("bytes")}}
        assert known_results(session, []) == {}


def test_kind_timings_sum_what_was_computed_by_the_newest_version(queue: Driver) -> None:
    for version in (1, 2):
        nodes = [queue.node(number, version=version, work=3.0) for number in range(version + 1)]
        queue.submit([*nodes, queue.node("last", *nodes, version=version, kind="pack")])
        while claimed := queue.claim():
            queue.finish(claimed[0].lease, seconds=version * 10.0)
    queue.submit(nodes)
    with queue.database.session(read_only=True) as session:
        assert kind_timings(session) == {"noop": Timing(3, 60.0, 9.0), "pack": Timing(1, 20.0, 0.0)}


def test_references_are_those_of_models_releases_and_results(queue: Driver) -> None:
    publish(queue, "emoji", "one")
    node = queue.node("node")
    queue.submit([node])
    queue.finish(queue.take(node), "bytes")
    with queue.database.session(read_only=True) as session:
        found = references(session)
        assert not isinstance(found, list)
        rows = {(row.owner.value, row.digest) for row in found}
    assert {digest for _, digest in rows} == {queue.digest(name) for name in ("model", "one", "card", "bytes")}
    assert {("model", queue.digest("model")), ("release", queue.digest("one")), ("result", queue.digest("one"))} <= rows
