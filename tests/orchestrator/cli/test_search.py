"""`quantmill search` from the command line: whole searches on tiny models, what goes on, and what is refused."""

from __future__ import annotations

import html
import json
import re
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from orchestrator.cli.main import run_cli
from orchestrator.db.session import open_database
from tests.orchestrator.in_process import InProcess
from tests.warm import Warm

Cli = Callable[..., Any]
ROOT = Path(__file__).parents[3]

#: A search that a second of computing can do.
SPEC: dict[str, Any] = {
    "models": ["tiny"],
    "recipe": "minmax-w8a8",
    "set": {
        "sampler.num_inference_steps": 2,
        "calibration.seeds": 2,
        "evaluation.seeds": 4,
        "evaluation.shard_seeds": 4,
        "evaluation.sqnr_seeds": 2,
        "evaluation.grid": 2,
    },
    "space": {"weight_bits": [4, 8], "fixed": ["@first", "@last"]},
    "screening": {"seeds": 2, "batch_size": 2},
    "effort": {"rounds": 2, "candidates": 2},
    "points": 2,
    "publish": 1,
    "baselines": False,
}

#: The command line with tasks in its own process: what is killed is no cluster.
IN_PROCESS = """
import sys
from functools import partial
from orchestrator.actions import execution
from orchestrator.cli.main import run_cli
from tests.orchestrator.in_process import InProcess
from tests.warm import Warm
execution.RayExecutor.start = lambda *_, **__: InProcess()
execution.SchedulerConfig = partial(execution.SchedulerConfig, lease_seconds=2.0, poll_seconds=0.1)
sys.exit(run_cli(sys.argv[1:]))
"""


def write_model(folder: Path, seed: int) -> Path:
    """Write a UNet on images of 16 x 16 as diffusers does."""
    from diffusers import DDIMScheduler, UNet2DModel

    torch.manual_seed(seed)
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    model.save_pretrained(folder / "unet")
    DDIMScheduler(num_train_timesteps=100).save_pretrained(folder / "scheduler")
    return folder


def write_spec(folder: Path, name: str = "small", **changes: Any) -> Path:
    """Write a search's file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(SPEC | changes))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models of one architecture."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "tiny", 0)
    write_model(folder / "tuned", 1)
    return folder


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which a search has gone through; to be copied, not used."""
    home = tmp_path_factory.mktemp("searched") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess())
        assert run_cli(["--home", str(home), "search", "run", str(write_spec(place)), "--json"]) == 0
    return home


@pytest.fixture
def done(finished: Path, home: Path) -> Path:
    """The test's home, in which a search has gone through."""
    shutil.copytree(finished, home)
    return home


def front(view: dict[str, Any], model: str = "tiny") -> list[tuple[Any, ...]]:
    """Return what of a model's front does not depend on when it was found."""
    keys = ("allocation", "bytes", "psnr_db", "n", "release")
    return sorted(tuple(point[key] for key in keys) for point in view["models"][model] if point["on_front"])


def test_run_measures_screens_and_publishes(done: Path, cli: Cli):
    view = cli("search", "show", "small", "--json").json
    assert view["state"] == "succeeded"
    points = view["models"]["tiny"]
    assert {point["stage"] for point in points} == {"screening", "final"}
    final = [point for point in points if point["stage"] == "final"]
    assert 1 <= len(final) <= 2
    assert {point["n"] for point in final} == {4}
    assert {point["n"] for point in points if point["stage"] == "screening"} == {2}
    assert all(point["dropped"] for point in points if not point["on_front"])
    assert view["task_seconds"] > 0
    assert view["saved_seconds"] > 0
    assert sum(point["task_seconds"] for point in points) <= view["task_seconds"] + 0.01
    assert view["tasks"]["total"] == view["tasks"]["succeeded"]


def test_pareto_gives_validated_points_alone_and_a_release_that_holds_them(done: Path, cli: Cli):
    view = cli("search", "pareto", "small", "--json").json
    points = view["models"]["tiny"]
    assert points
    assert all(point["on_front"] and point["stage"] == "final" for point in points)
    assert [point["bytes"] for point in points] == sorted(point["bytes"] for point in points)
    (release,) = [point["release"] for point in points if point["release"]]
    assert release == "tiny-small@1"
    shown = cli("artifacts", "show", release, "--json").json
    (point,) = [point for point in points if point["release"] == release]
    assert shown["metrics"]["bytes"] == point["bytes"]
    assert shown["metrics"]["psnr_db"] == point["psnr_db"]
    assert cli("artifacts", "alias", release, "prod").code == 0
    assert cli("artifacts", "verify", "tiny-small@prod").code == 0


def test_the_same_search_again_computes_nothing(done: Path, cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch):
    before = cli("search", "show", "small", "--json").json

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing was to be computed")

    monkeypatch.setattr("orchestrator.actions.execution.RayExecutor.start", refuse)
    again = cli("search", "run", write_spec(place), "--json")
    assert again.code == 0, again.err
    assert again.json["search"] != before["search"]
    assert again.json["task_seconds"] == 0
    assert again.json["tasks"]["cached"] == again.json["tasks"]["total"]
    assert front(again.json) == front(before)


@pytest.mark.parametrize("kills", [(12,), pytest.param((2, 12, 24), marks=pytest.mark.slow)])
def test_a_search_that_is_killed_ends_with_the_same_front(
    finished: Path, home: Path, cli: Cli, place: Path, without_ray: None, warm: Warm, kills: tuple[int, ...]
):
    spec = write_spec(place)
    for wanted in kills:
        process = warm.start_python(IN_PROCESS, ["--home", str(home), "search", "run", str(spec), "--json"])
        while process.is_running() and results(home) < wanted:
            time.sleep(0.02)
        with suppress(psutil.NoSuchProcess):
            process.kill()
        process.wait()
    end_leases(home)
    answer = cli("search", "run", spec, "--json")
    assert answer.code == 0, answer.err
    assert len(cli("search", "ls", "--json").json) == 1
    shutil.copytree(finished, home.with_name("other"))
    assert run_cli(["--home", str(home.with_name("other")), "search", "show", "small", "--json"]) == 0
    with sqlite3.connect(finished / "quantmill.db") as undisturbed, sqlite3.connect(home / "quantmill.db") as killed:
        asked = "SELECT digest, stage, origin, dropped, release FROM search_points ORDER BY digest"
        assert killed.execute(asked).fetchall() == undisturbed.execute(asked).fetchall()


def results(home: Path) -> int:
    """Return how many tasks of a home have succeeded, 0 while it has no database."""
    try:
        with sqlite3.connect(f"file:{home / 'quantmill.db'}?mode=ro", uri=True) as connection:
            return int(connection.execute("SELECT count(*) FROM results").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def end_leases(home: Path) -> None:
    """Let all leases run out, as they would by themselves."""
    with sqlite3.connect(home / "quantmill.db") as connection:
        connection.execute("UPDATE tasks SET lease_until = 1 WHERE lease_until IS NOT NULL")


def test_extend_computes_only_what_is_new(done: Path, cli: Cli, place: Path, without_ray: None):
    before = cli("search", "show", "small", "--json").json
    answer = cli("search", "extend", "small", "--models", place / "tuned", "--json")
    assert answer.code == 0, answer.err
    assert cli("serve", "--drain").code == 0
    view = cli("search", "show", "small", "--json").json
    assert view["state"] == "succeeded"
    assert view["models"]["tiny"] == before["models"]["tiny"]
    assert front(view, "tuned")
    # The second model started from the front of the first, with one round less.
    assert view["stages"]["tuned"]["parent"] == {"search": view["search"], "model": "tiny"}
    assert view["stages"]["tuned"]["rounds"] == 1
    warm = {point["allocation"] for point in view["models"]["tuned"] if point["origin"] == "warm"}
    assert warm == {point["allocation"] for point in before["models"]["tiny"] if point["on_front"]}


def test_a_search_may_be_started_from_by_its_name(done: Path, cli: Cli, place: Path, without_ray: None):
    spec = write_spec(place, "named", models=["tuned"], warm_start="small")
    view = cli("search", "run", spec, "--json").json
    assert {point["origin"] for point in view["models"]["tuned"]} & {"warm"}


def test_a_budget_for_sensitivities_alone_is_refused(done: Path, cli: Cli, place: Path, without_ray: None):
    assert cli("search", "run", write_spec(place), "--only", "sensitivity").code == 0
    refused = cli("search", "extend", "small", "--budget", "weight_bits_mean=6")
    assert (refused.code, refused.out) == (2, "")
    assert "which is of sensitivity only and measures nothing" in refused.err


def test_extend_by_a_budget_that_is_known_already_is_refused_or_goes_on(done: Path, cli: Cli, without_ray: None):
    refused = cli("search", "extend", "small", "--budget", "weight_bits_mean=1")
    assert refused.code == 2
    assert "budgets.0.weight_bits_mean: got 1, wanted 4" in refused.err
    tasks = cli("search", "show", "small", "--json").json["tasks"]["total"]
    assert cli("search", "extend", "small", "--budget", "weight_bits_mean=6").code == 0
    again = cli("search", "extend", "small", "--budget", "weight_bits_mean=6.0")
    assert (again.code, again.out) == (2, "")
    assert "search extend: got nothing new" in again.err
    assert cli("search", "show", "small", "--json").json["state"] == "running"
    assert cli("serve", "--drain").code == 0
    view = cli("search", "show", "small", "--json").json
    assert view["state"] == "succeeded"
    assert view["budgets"] == [{"weight_bits_mean": 6.0}]
    assert view["tasks"]["total"] > tasks


def test_cancel_ends_a_search_and_its_jobs(home: Path, cli: Cli, place: Path):
    submitted = cli("search", "submit", write_spec(place), "--json")
    assert submitted.code == 0, submitted.err
    search = submitted.json["search"]
    take_steps(home)
    assert cli("jobs", "ls", "--json").json
    assert cli("search", "cancel", search, "--json").json["state"] == "cancelled"
    assert {job["state"] for job in cli("jobs", "ls", "--json").json} == {"cancelled"}
    assert cli("serve", "--drain").code == 0


def take_steps(home: Path) -> None:
    """Take the steps that an orchestrator would take between claims."""
    from orchestrator.search.advance import Steps
    from orchestrator.service import open_service
    from orchestrator.settings import resolve_settings

    with open_service(resolve_settings({}, home=str(home))) as service:
        Steps(service)()


def test_a_search_belongs_to_whoever_submits_it(home: Path, cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUANTMILL_OWNER", "ada")
    assert cli("search", "submit", write_spec(place)).code == 0
    monkeypatch.setenv("QUANTMILL_OWNER", "ben")
    assert cli("search", "submit", write_spec(place, name="other")).code == 0
    assert {view["name"]: view["owner"] for view in cli("search", "ls", "--json").json} == {
        "small": "ada",
        "other": "ben",
    }
    take_steps(home)
    assert {job["owner"] for job in cli("jobs", "ls", "--json").json} == {"ada", "ben"}


def test_a_model_whose_search_fails_leaves_the_others_whole(home: Path, cli: Cli, place: Path, without_ray: None):
    submitted = cli("search", "submit", write_spec(place, models=["tiny", "tuned"], warm_start=False), "--json")
    assert submitted.code == 0, submitted.err
    database = open_database(f"sqlite:///{home / 'quantmill.db'}")
    database.close()
    with sqlite3.connect(home / "quantmill.db") as connection:
        connection.execute("UPDATE models SET inspection = json_remove(inspection, '$.units') WHERE name = 'tuned'")
    assert cli("serve", "--drain").code == 0
    view = cli("search", "show", "small", "--json").json
    assert view["state"] == "failed"
    assert set(view["errors"]) == {"tuned"}
    assert front(view, "tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["none-*"]}, "models.0: got 'none-*', which matches no registered model and no folder with one"),
        ({"models": []}, "models: got [], wanted"),
        ({"models": ["absent"]}, "models: absent: model: got 'absent'"),
        ({"space": {"weight_bits": [4]}}, "weight_bits: got [4], keep false and no other choice"),
        ({"space": {"fixed": ["*"]}}, "space.fixed: got patterns that fix every layer"),
        ({"space": {"fixed": ["nothing.*"]}}, "space.fixed.0: got 'nothing.*', wanted a pattern that matches"),
        ({"space": {"weight_bits": [4, 8], "step_ranges": 2}}, "step_ranges: got 2 without activation_bits"),
        (
            {"space": {"weight_bits": [4, 8], "activation_bits": [4, 8], "step_ranges": 2}},
            "step_ranges: got 2 with attention.mode dynamic_token, wanted per_step: set: {attention.mode: per_step}",
        ),
        ({"budgets": [{"weight_bits_mean": 1.0}]}, "budgets.0.weight_bits_mean: got 1, wanted 4"),
        ({"budgets": [{"weight_bits_mean": 9.0}]}, "budgets.0.weight_bits_mean: got 9, wanted 4"),
        ({"budgets": [{"bytes": "1kB"}]}, "budgets.0.bytes: got 1.0 kB, wanted"),
        ({"budgets": [{"bytes": "1GB"}]}, "budgets.0.bytes: got 1.0 GB, wanted"),
        ({"budgets": [{"bytes": "many"}]}, "budgets.0.bytes: got 'many', wanted a number of bytes, or text like 2.8MB"),
        ({"budgets": [{}]}, "got a budget without a limit"),
        ({"budgets": [{"latency_ms": 1.0}]}, "budgets.0.latency_ms: got 1 without latency_table"),
        ({"screening": {"seeds": 0}}, "screening.seeds: got 0 with objective psnr_db, which is measured on samples"),
        ({"screening": {"first_seed": 1_000_000}}, "screening.first_seed: got seeds 1000000..1000015, wanted none of"),
        ({"publish": 3}, "publish: got 3 with points 2, wanted at most as many"),
        ({"latency_table": "table.json", "latency_device": "H100"}, "got latencies of 'a CPU', wanted those of 'H100'"),
        ({"recipe": "absent"}, "recipe: got 'absent', wanted a file or a shipped recipe"),
        ({"space": {"variants": {"bad": {"weights.bits": 7}}}}, "space.variants.bad: weights.bits: got 7"),
        ({"warm_start": "nobody"}, "warm_start: search: got 'nobody', wanted one of search ls"),
        ({"warm_start": "small"}, "for model tiny, which has no other model of that architecture, wanted"),
        ({"space": {"weight_bits": [8], "variants": {"x": {}}}}, "space.variants.x: got what the base recipe says"),
        ({"modles": []}, "modles: unknown key; nearest: models"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_changes_nothing(
    changes: dict[str, Any], message: str, done: Path, cli: Cli, tmp_path: Path, snapshot: Callable[[], Any]
):
    (tmp_path / "table.json").write_text(json.dumps({"device": "a CPU", "layers": {}}))
    before = snapshot()
    answer = cli("search", "submit", write_spec(tmp_path, **changes))
    assert answer.code == 2
    assert message in answer.err
    assert len(answer.err.strip().splitlines()) == 1
    assert snapshot() == before


def test_models_that_do_not_load_are_named_and_can_be_left_out(cli: Cli, place: Path, tmp_path: Path, home: Path):
    shutil.copytree(place / "tiny", tmp_path / "good")
    (tmp_path / "broken" / "unet").mkdir(parents=True)
    (tmp_path / "broken" / "unet" / "config.json").write_text("{}")
    spec = write_spec(tmp_path, models=["./*"])
    refused = cli("search", "submit", spec)
    assert refused.code == 2
    assert "broken" in refused.err
    assert "--skip-bad goes on with the others" in refused.err
    assert cli("search", "ls", "--json").json == []
    assert cli("models", "ls", "--json").json == []
    taken = cli("search", "submit", spec, "--skip-bad", "--json")
    assert taken.code == 0, taken.err
    assert "left out" in taken.err
    assert list(cli("search", "show", taken.json["search"], "--json").json["models"]) == ["good"]


def test_of_fine_tunes_of_one_model_only_the_first_is_inspected(cli: Cli, place: Path, tmp_path: Path, home: Path):
    for name in ("tiny", "tuned"):
        shutil.copytree(place / name, tmp_path / name)
    shutil.copytree(place / "tiny", tmp_path / "wider")
    config = tmp_path / "wider" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 12}))
    answer = cli("search", "submit", write_spec(tmp_path, models=["./t*", "./wider"]))
    assert answer.code == 0, answer.err
    looked = [line for line in answer.err.splitlines() if line.startswith("inspecting")]
    assert looked == [f"inspecting {tmp_path / name}" for name in ("tiny", "wider")]
    shown = {name: cli("models", "show", name, "--json").json for name in ("tiny", "tuned", "wider")}
    assert len({model["digest"] for model in shown.values()}) == len(shown)
    shapes = {name: shown[name]["inspection"]["sample_shape"] for name in ("tuned", "wider")}
    assert shapes == {"tuned": [1, 8, 8], "wider": [1, 12, 12]}


def test_report_is_one_page_with_points_samples_sensitivities_and_cost(done: Path, cli: Cli, tmp_path: Path):
    answer = cli("search", "report", "small", "--out", tmp_path / "small.html")
    assert answer.code == 0, answer.err
    page = (tmp_path / "small.html").read_text()
    view = cli("search", "show", "small", "--json").json
    for point in view["models"]["tiny"]:
        assert f'id="m0-p{point["number"]}"' in page
        if point["dropped"]:
            assert html.escape(point["dropped"]) in page
    finals = [point for point in view["models"]["tiny"] if point["stage"] == "final"]
    assert page.count('alt="quantized samples"') == len(finals)
    assert page.count('alt="" id="m0-reference-') == 1, "full precision is there once"
    assert page.count("<h3>Where the next bit pays most</h3>") == 1
    assert page.count('<div class="pareto chart"><svg') == 1
    assert page.count('<div class="sensitivity chart"><svg') == 1
    assert f"<b>{view['models']['tiny'][0]['release'] or 'tiny-small@1'}</b>" in page
    assert re.search(r"seeds 0 to 3\. Candidates were screened with seeds 2000000 to 2000001\.", page)
    in_home = cli("search", "report", view["search"], "--json").json["report"]
    assert Path(in_home).name == f"{view['search']}.html"
    assert cli("search", "report", "small", "--out", tmp_path / "none" / "x.html").code == 2
    assert cli("search", "report", "other").code == 102


def test_sensitivity_tells_each_layer_and_where_the_next_bit_pays(done: Path, cli: Cli):
    found = cli("search", "sensitivity", "small", "--json").json["models"]["tiny"]
    layers = found["tables"]["base"]["layers"]
    assert "mid_block.resnets.0.conv1" in layers
    assert set(layers["mid_block.resnets.0.conv1"]["weights"]) == {"4", "8"}
    text = cli("search", "sensitivity", "small", "--layers", "3").out
    assert "where the next bit pays most, all else at 4:" in text
    steps = [line for line in text.splitlines() if "4 -> 8" in line]
    assert len(steps) == 3
    best = max(
        (each for name, each in layers.items() if len(each["weights"]) == 2),
        key=lambda each: (
            (each["weights"]["4"]["damage"] - each["weights"]["8"]["damage"])
            / (each["weights"]["8"]["bytes"] - each["weights"]["4"]["bytes"])
        ),
    )
    assert layers[steps[0].split()[0]] == best
    refused = cli("search", "sensitivity", "small", "--start", "5")
    assert (refused.code, "wanted one of 4, 8" in refused.err) == (2, True)
    assert cli("search", "sensitivity", "small", "--model", "other").code == 102


def test_the_smallest_model_within_a_damage_or_for_a_quality(done: Path, cli: Cli, place: Path, without_ray: None):
    front = cli("search", "sensitivity", "small", "--json").json["models"]["tiny"]["front"]
    assert len(front) > 2
    most = sorted(damage for _, damage, _ in front)[len(front) // 2]
    only = ("search", "run", write_spec(place, "only"), "--only", "sensitivity")
    told = cli(*only, "--damage", f"{most}", "--json")
    assert told.code == 0, told.err
    assert told.json["smallest"]["tiny"]["bytes"] == min(size for size, damage, _ in front if damage <= most)
    assert told.json["models"]["tiny"] == [], "nothing was measured"
    worst = min(psnr for *_, psnr in front)
    assert "is the smallest" in cli(*only, "--psnr-db", f"{worst - 1:.1f}").out
    assert "is the smallest" not in cli(*only, "--psnr-db", "143").out


def test_a_dry_run_says_tasks_time_and_room_and_queues_nothing(home: Path, cli: Cli, place: Path):
    told = cli("search", "run", write_spec(place), "--dry-run", "--json")
    assert told.code == 0, told.err
    assert told.json["tasks"]["total"] == told.json["tasks"]["queued"] > 10
    assert told.json["estimated_seconds"] > 0
    assert told.json["estimated_store_bytes"] > 0
    assert cli("search", "ls", "--json").json == []
    assert cli("jobs", "ls", "--json").json == []
