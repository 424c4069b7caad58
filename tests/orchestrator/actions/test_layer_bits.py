"""What the command line says of the bits of layers, where channels or steps differ and where they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.db.queries import find_model
from orchestrator.db.session import open_database
from quant_spec.formats import ActivationSpec, FeatureSpec, LayerSpec, ModelFormat, WeightSpec
from tests.orchestrator.finished_jobs import METRICS, finish_job, put_release

Cli = Callable[..., Any]
PLAIN = LayerSpec(WeightSpec(4), ActivationSpec(8))
CHANNELS = replace(PLAIN, weight=WeightSpec(3, mixture=((1, 10), (2, 80), (3, 10))))
STEPS = replace(PLAIN, activation=ActivationSpec(8, step_bits=(4,) * 19 + (8,)))


@dataclass(frozen=True, slots=True)
class Releases:
    """Two published releases of the small model, and the names of four of its layers."""

    jobs: tuple[str, str]
    channels: str
    steps: str
    table: str
    dropped: str


@pytest.fixture
def releases(cli: Cli, with_digits: Path) -> Releases:
    """`plain@1` has all layers alike; in `mixed@1` channels, steps and tables differ."""
    database = open_database(f"sqlite:///{with_digits / 'quantmill.db'}")
    with database.session(read_only=True) as session:
        layers = list(find_model(session, "digits").inspection["layers"])
    database.close()
    channels, steps, table, dropped, *rest = layers
    timesteps = tuple(float(step) for step in range(20))
    plain = ModelFormat(dict.fromkeys(layers, PLAIN), {}, timesteps)
    some = {channels: CHANNELS, steps: STEPS} | dict.fromkeys(rest, PLAIN)
    mixed = ModelFormat(some, {}, timesteps, features={table: FeatureSpec(8)}, unserved=(dropped,))
    jobs = []
    for name, plan, seed in (("plain", plain, 1), ("mixed", mixed, 2)):
        words = ["submit", "minmax-w8a8", "--model", "digits", "--name", name, "--set", f"evaluation.first_seed={seed}"]
        jobs.append(cli(*words, "--json").json["job"])
        finish_job(with_digits, put_release(with_digits, plan, {"name": name}), METRICS)
        assert cli("jobs", "show", jobs[-1], "--json").json["release"] == f"{name}@1"
    return Releases((jobs[0], jobs[1]), channels, steps, table, dropped)


def test_diff_compares_means_and_says_how_bits_are_distributed(cli: Cli, releases: Releases) -> None:
    difference = cli("artifacts", "diff", "plain@1", "mixed@1", "--json").json
    four = {"weights": 4, "activations": 8}
    assert {row["layer"]: (row["a"], row["b"]) for row in difference["layers"]} == {
        releases.channels: (four, {"weights": 2.0, "activations": 8, "mixture": [[1, 10], [2, 80], [3, 10]]}),
        releases.steps: (four, {"weights": 4, "activations": 4.2, "step_bits": [4] * 19 + [8]}),
        releases.table: (four, {"weights": None, "activations": None, "table": 8}),
        releases.dropped: (four, {"weights": None, "activations": None, "is_dropped": True}),
    }
    text = cli("artifacts", "diff", "plain@1", "mixed@1").out
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line.strip()}
    assert rows[releases.channels] == "4/8 2.0 (1:10% 2:80% 3:10%)/8"
    assert rows[releases.steps] == "4/8 4/4.2 (4:95% 8:5%)"
    assert rows[releases.table] == "4/8 table of 8"
    assert rows[releases.dropped] == "4/8 not kept"


def test_report_shows_means_and_how_bits_are_distributed(cli: Cli, releases: Releases, tmp_path: Path) -> None:
    pages = []
    for job in releases.jobs:
        path = tmp_path / f"{job}.html"
        assert cli("report", job, "--out", path).code == 0
        pages.append(path.read_text())
    plain, mixed = pages
    assert f"<title>{releases.channels}: W4 A8, 30.0 dB</title>" in plain
    assert "</i>4 bit weights</span>" in plain
    assert f"<title>{releases.channels}: W2.0 (1:10% 2:80% 3:10%) A8, 30.0 dB</title>" in mixed
    assert f"<title>{releases.steps}: W4 A4.2 (4:95% 8:5%), 30.0 dB</title>" in mixed
    assert f"<title>{releases.table}: table of 8 float, 30.0 dB</title>" not in mixed
    assert f"<title>{releases.table}: table of 8, 30.0 dB</title>" in mixed
    assert "</i>about 2 bit weights</span>" in mixed
    cells = {name: row_cells(mixed, name) for name in (releases.channels, releases.steps, releases.table)}
    assert cells[releases.channels] == ["2.0 (1:10% 2:80% 3:10%)", "8"]
    assert cells[releases.steps] == ["4", "4.2 (4:95% 8:5%)"]
    assert cells[releases.table] == ["table of 8", "–"]


def row_cells(page: str, layer: str) -> list[str]:
    """Return what the table of layers says of the bits of one."""
    row = page.split(f'<td class="name">{layer}</td>')[1].split("</tr>")[0]
    return [cell.split("</td>")[0] for cell in row.split('<td class="number">')[1:3]]
