"""Bytes that the database believes in and the store has lost: what each command makes of that, and how it is mended."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator.cli.main import run_cli
from orchestrator.db.session import open_database
from orchestrator.scheduling.losses import examine_loss
from tests.orchestrator.in_process import InProcess
from workers.errors import Dependency, Fault
from workers.execution.execute import TaskCall
from workers.execution.executor import Finished
from workers.storage.blobs import blob_key
from workers.storage.manifest import read_files
from workers.storage.store import open_store

SMALL = {
    "sampler.num_inference_steps": "2",
    "calibration.seeds": "2",
    "calibration.shard_seeds": "2",
    "evaluation.seeds": "2",
    "evaluation.shard_seeds": "2",
    "evaluation.sqnr_seeds": "2",
    "evaluation.grid": "2",
}
SET = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
RUN = ["run", "minmax-w8a8", "--model", "digits", *SET, "--name", "small", "--json"]

Cli = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.fixture(scope="module")
def finished(home_with_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one finished job; to be copied, not used."""
    home = shutil.copytree(home_with_digits, tmp_path_factory.mktemp("finished") / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess())
        assert run_cli(["--home", str(home), *RUN]) == 0
    return home


@pytest.fixture
def done(finished: Path, home: Path) -> Path:
    """The test's home, a copy of one with a finished job."""
    shutil.copytree(finished, home)
    return home


def outputs(home: Path, kind: str, number: int = 0) -> dict[str, str]:
    """Return what a recorded task of some kind gave."""
    with sqlite3.connect(home / "quantmill.db") as connection:
        rows = connection.execute("SELECT outputs FROM results WHERE kind = ? ORDER BY key", [kind]).fetchall()
    connection.close()
    found: dict[str, str] = json.loads(rows[number][0])
    return found


def weights(home: Path) -> str:
    """Return the digest of the packed weights, which lie in the trees of `pack` and of the release."""
    files = read_files(open_store(str(home / "store")), outputs(home, "pack")["packed"])
    return next(digest for path, (digest, _) in files.items() if path.endswith(".safetensors"))


def path_of(home: Path, digest: str) -> Path:
    return home / "store" / blob_key(digest)


def lose(home: Path, digest: str) -> None:
    """Delete a blob."""
    path_of(home, digest).unlink()


def damage(home: Path, digest: str) -> None:
    """Change one byte of a blob."""
    path = path_of(home, digest)
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_run_makes_a_deleted_blob_of_a_cached_job_again(cli: Cli, done: Path, tmp_path: Path) -> None:
    before = cli("artifacts", "show", "small@1", "--json").json
    lose(done, weights(done))
    again = cli(*RUN, "--out", tmp_path / "out")
    assert again.code == 0, again.err
    assert (again.json["state"], again.json["release"]) == ("succeeded", "small@1")
    assert again.json["digest"] == before["digest"]
    tasks = again.json["tasks"]
    assert tasks["succeeded"] == tasks["total"]
    assert tasks["total"] - tasks["cached"] == 2, "the packing and the release are made again, and nothing else"
    assert cli("artifacts", "verify", "--all").code == 0


def test_a_damaged_input_of_a_running_job_is_made_again_in_it(cli: Cli, done: Path, tmp_path: Path) -> None:
    state = outputs(done, "round")
    digest = next(iter(state.values()))
    lose(done, weights(done))
    damage(done, digest)
    again = cli(*RUN, "--out", tmp_path / "out")
    assert again.code == 0, again.err
    assert again.json["release"] == "small@1"
    events = cli("jobs", "logs", again.json["job"], "--json").json
    repaired = [event for event in events if event["event"] == "repaired"]
    assert [(event["kind"], event["data"]["digest"]) for event in repaired] == [("round", digest)]
    assert [event["kind"] for event in events if event["event"] == "waiting"] == ["pack"]
    assert cli("artifacts", "verify", "--all").code == 0


def test_run_makes_again_what_its_report_finds_damaged(cli: Cli, done: Path) -> None:
    samples = outputs(done, "score")["samples"]
    damage(done, samples)
    again = cli(*RUN)
    assert again.code == 0, again.err
    assert again.json["release"] == "small@1"
    assert samples in again.err
    assert "makes it again" in again.err
    assert Path(again.json["report"]).is_file()
    assert cli("artifacts", "verify", "--all").code == 0


def test_a_store_that_loses_the_same_blob_again_fails_the_job_and_says_what(
    cli: Cli, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = next(iter(outputs(done, "round").values()))
    lose(done, weights(done))

    class Thief(InProcess):
        """Takes what a packing is about to read."""

        def submit(self, call: TaskCall) -> int:
            if call.kind == "pack":
                lose(done, digest)
            return super().submit(call)

    monkeypatch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: Thief())
    failed = cli(*RUN)
    assert (failed.code, failed.json["state"]) == (100, "failed")
    assert digest in failed.json["error"]
    assert "once more, after round" in failed.json["error"]


def test_a_task_on_a_node_that_sees_another_store_takes_back_no_result(
    cli: Cli, done: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lose(done, weights(done))
    (tmp_path / "elsewhere").mkdir()
    blind = [True]

    class BlindAtFirst(InProcess):
        """Runs the first packing on a node whose store is empty."""

        def submit(self, call: TaskCall) -> int:
            if call.kind == "pack" and blind:
                blind.clear()
                call = replace(call, store_url=str(tmp_path / "elsewhere"))
            return super().submit(call)

    monkeypatch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: BlindAtFirst())
    again = cli(*RUN)
    assert (again.code, again.json["release"]) == (0, "small@1"), again.err
    events = cli("jobs", "logs", again.json["job"], "--json").json
    assert [event["data"]["fault"] for event in events if event["event"] == "retried"] == ["infrastructure"]
    assert "repaired" not in {event["event"] for event in events}


def recorded(home: Path) -> int:
    """Return how many results are recorded."""
    with sqlite3.connect(home / "quantmill.db") as connection:
        count: int = connection.execute("SELECT count(*) FROM results").fetchone()[0]
    connection.close()
    return count


@pytest.mark.parametrize("words", [RUN, ["artifacts", "verify", "--all", "--repair"]], ids=["run", "verify"])
def test_nothing_is_taken_for_lost_while_the_store_is_away(cli: Cli, done: Path, words: list[str]) -> None:
    """As when its file system is not mounted: an empty folder is in its place."""
    before = recorded(done)
    (done / "store").rename(done / "away")
    (done / "store").mkdir()
    refused = cli(*words)
    assert refused.code == 2
    assert "is it mounted?" in refused.err.splitlines()[-1]
    assert recorded(done) == before
    shutil.rmtree(done / "store")
    (done / "away").rename(done / "store")
    again = cli(*RUN)
    assert again.json["tasks"]["cached"] == again.json["tasks"]["total"]


def test_blobs_that_are_really_gone_are_said_to_be(cli: Cli, done: Path) -> None:
    before = recorded(done)
    shutil.rmtree(done / "store")
    assert cli("init", "--adopt").code == 0
    cli("artifacts", "verify", "--all", "--repair")
    assert recorded(done) < before


def test_a_task_that_finds_the_store_away_waits_for_it(done: Path) -> None:
    (done / "store" / "quantmill.json").unlink()
    for blob in (done / "store" / "sha256").rglob("*"):
        if blob.is_file():
            blob.unlink()
    database = open_database(f"sqlite:///{done / 'quantmill.db'}")
    lost = Finished(1, None, Fault.LOST, "got no blob", ("0" * 64,))
    found = examine_loss(database, str(done / "store"), "0" * 64, lost)
    database.close()
    assert (found.fault, found.dependency) == (Fault.OUTAGE, Dependency.STORE)


def test_who_reads_a_damaged_release_sends_it_to_be_made_again(cli: Cli, done: Path, tmp_path: Path) -> None:
    digest = weights(done)
    damage(done, digest)
    for words in (["pull", "small", tmp_path / "out"], ["export", "small", "--format", "dequantized"]):
        refused = cli("artifacts", *words)
        assert (refused.code, digest in refused.err) == (2, True), refused.err
        again, old = cli("jobs", "ls", "--json").json  # one job, however many readers find the loss
        assert (again["state"], old["state"]) == ("queued", "succeeded")
        assert f"job {again['job']} makes it again: quantmill serve --drain" in refused.err
    assert list(tmp_path.iterdir()) == [done]
    assert cli("artifacts", "verify", "small").code == 2
    repaired = cli("artifacts", "verify", "small", "--repair", "--json")
    assert (repaired.code, repaired.json["job"]) == (0, again["job"])
    assert [digest in problem for problem in repaired.json["problems"]] == [True]
    assert cli("serve", "--drain").code == 0
    view = cli("jobs", "show", repaired.json["job"], "--json").json
    assert (view["state"], view["release"]) == ("succeeded", "small@1")
    assert cli("artifacts", "pull", "small@1", tmp_path / "out").code == 0
    assert len(cli("artifacts", "ls", "--json").json) == 1


def test_verify_all_counts_and_repairs(cli: Cli, done: Path) -> None:
    whole = cli("artifacts", "verify", "--all", "--json")
    assert whole.code == 0
    assert whole.json["ok"] == whole.json["blobs"] > 20
    assert (whole.json["missing"], whole.json["damaged"], whole.json["losses"]) == (0, 0, [])
    gone, changed = outputs(done, "calibrate")["calibration"], weights(done)
    lose(done, gone)
    damage(done, changed)
    found = cli("artifacts", "verify", "--all", "--json")
    assert found.code == 2
    assert (found.json["missing"], found.json["damaged"]) == (1, 1)
    losses = {loss["digest"]: loss for loss in found.json["losses"]}
    assert (losses[gone]["state"], losses[gone]["of"]) == ("missing", ["result calibrate calibration"])
    assert losses[changed]["state"] == "damaged"
    assert losses[changed]["of"] == ["release small@1", "result pack packed", "result release artifact"]
    repaired = cli("artifacts", "verify", "--all", "--repair", "--json")
    assert (repaired.code, repaired.json["withdrawn"], len(repaired.json["jobs"])) == (0, 3, 1)
    assert cli("serve", "--drain").code == 0
    again = cli("artifacts", "verify", "--all", "--json")
    assert (again.code, again.json["blobs"]) == (0, whole.json["blobs"])
    assert [row["version"] for row in cli("artifacts", "ls", "--json").json] == [1]
    text = cli("artifacts", "verify", "--all").out
    assert f"{whole.json['blobs']} blobs" in text


def test_what_is_no_plain_file_is_no_blob_and_is_never_read(cli: Cli, done: Path) -> None:
    """A pipe, or a link to a device, in a blob's place would be read for ever."""
    lost = [outputs(done, "calibrate")["calibration"], weights(done), *outputs(done, "round").values()][:3]
    for digest in lost:
        lose(done, digest)
    os.mkfifo(path_of(done, lost[0]))
    path_of(done, lost[1]).symlink_to("/dev/zero")
    path_of(done, lost[2]).mkdir()
    found = cli("artifacts", "verify", "--all", "--repair", "--json")
    assert {loss["digest"]: loss["state"] for loss in found.json["losses"]} == dict.fromkeys(lost, "missing")
    assert cli("serve", "--drain").code == 0
    assert cli("artifacts", "verify", "--all").code == 0
    assert [row["version"] for row in cli("artifacts", "ls", "--json").json] == [1]
    label = done / "store" / "quantmill.json"
    label.unlink()
    os.mkfifo(label)
    # As without a label: the store of the database that knows its blobs.
    assert cli("artifacts", "gc", "--grace", "0").code == 0


def test_a_models_lost_file_is_asked_for_and_mended_by_adding_it_again(cli: Cli, done: Path, digits: Path) -> None:
    model = cli("models", "show", "digits", "--json").json["digest"]
    files = read_files(open_store(str(done / "store")), model)
    damage(done, next(digest for path, (digest, _) in files.items() if path.endswith(".safetensors")))
    failed = cli(*RUN, "--set", "evaluation.seeds=4")
    assert (failed.code, failed.json["state"]) == (100, "failed")
    assert f"quantmill models add {digits} --name digits" in failed.json["error"]
    found = cli("artifacts", "verify", "--all", "--repair", "--json")
    assert found.code == 2
    assert [f"models add {digits}" in line for line in found.json["to_be_given"]] == [True]
    assert cli("models", "add", digits, "--name", "digits").code == 0
    assert cli("artifacts", "verify", "--all").code == 0
    assert cli("jobs", "retry", failed.json["job"]).code == 0
    assert cli("serve", "--drain").code == 0
    assert cli("jobs", "show", failed.json["job"], "--json").json["state"] == "succeeded"


def test_verify_wants_one_release_or_all(cli: Cli, home: Path) -> None:
    assert cli("artifacts", "verify").code == 2
    assert cli("artifacts", "verify", "x", "--all").code == 2


def test_run_goes_on_with_the_job_that_was_interrupted(cli: Cli, with_digits: Path) -> None:
    # Deterministic, and bound to a type of device by its first task: still the job that was asked for.
    words = [*RUN[1:-3], "--set", "deterministic=true", *RUN[-3:-1]]
    first = cli("submit", *words, "--json").json["job"]
    with open_database(f"sqlite:///{with_digits / 'quantmill.db'}").session() as session:
        session.execute(text("UPDATE jobs SET device = 'cpu'"))
    other = cli("submit", *words[:-1], "other", "--json").json["job"]
    again = cli("run", *words, "--json")
    assert (again.code, again.json["job"], again.json["state"]) == (0, first, "succeeded")
    assert "going on with it" in again.err
    assert {row["job"] for row in cli("jobs", "ls", "--json").json} == {first, other}
    assert cli(*RUN).json["job"] != first, "a job that has ended is not gone on with"


def test_a_pull_that_was_kept_is_checked(cli: Cli, done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert cli("artifacts", "pull", "small", folder, "--json").json["kept"] is False
    assert cli("artifacts", "pull", "small", folder, "--json").json["kept"] is True
    (folder / "more.bin").write_bytes(b"")
    refused = cli("artifacts", "pull", "small", folder)
    assert (refused.code, "more.bin" in refused.err) == (2, True)
    (folder / "more.bin").unlink()
    changed = folder / "metrics.json"
    changed.write_bytes(changed.read_bytes() + b" ")
    refused = cli("artifacts", "pull", "small", folder)
    assert (refused.code, "metrics.json" in refused.err) == (2, True)
