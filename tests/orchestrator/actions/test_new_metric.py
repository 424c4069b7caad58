"""A new metric is one row of `quant_spec.metrics`, besides what computes it: every place that shows metrics follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant_core.artifact.card import CardContent, render_card
from quant_spec.formats import ModelFormat
from quant_spec.metrics import METRICS, Direction, Metric, Place, Shown, check_computed
from quant_spec.metrics_page import reference_table
from tests.orchestrator.finished_jobs import METRICS as VALUES
from tests.orchestrator.finished_jobs import finish_job, put_release

Cli = Callable[..., Any]
TOY = Metric(
    "How much the samples please",
    unit="dB",
    direction=Direction.HIGHER,
    format=".2f",
    is_number=True,
    places={
        Place.CARD: Shown("joy, dB"),
        Place.REPORT: Shown("Joy"),
        Place.COST: Shown("joy, compared"),
        Place.JOB: Shown("joy"),
        Place.RELEASES: Shown("JOY"),
    },
)
SERIES = Metric("The same at each step", places={Place.STEPS: Shown("Joy by step", lambda _: ("joy, dB", "More is."))})


def test_a_row_of_the_table_is_shown_everywhere(
    cli: Cli, with_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**VALUES, "joy_db": 12.5, "joy_db_per_step": [1.0, 2.0, 3.0]}
    monkeypatch.setitem(METRICS, "joy_db", TOY)
    monkeypatch.setitem(METRICS, "joy_db_per_step", SERIES)
    check_computed(values)
    assert "| `joy_db` | dB | higher | no |" in reference_table()
    card = render_card(CardContent("digits", "mine", {"_class_name": "UNet2DModel"}, values))
    assert "| joy, dB | 12.50 | – |" in card
    assert "- joy" not in card

    words = ["submit", "minmax-w8a8", "--model", "digits", "--name", "small", "--json"]
    job = cli(*words).json["job"]
    plain = ModelFormat({}, {})
    finish_job(with_digits, put_release(with_digits, plain, {"name": "mine"}), values)
    assert "joy       12.50 dB" in cli("jobs", "show", job).out
    assert cli("jobs", "show", job, "--json").json["metrics"]["joy_db"] == 12.5
    listed = cli("artifacts", "ls").out.splitlines()
    assert "JOY" in listed[0]
    assert "12.50 dB" in listed[1]
    compared = cli("artifacts", "diff", "small@1", "small@1", "--json").json["metrics"]
    assert compared["joy_db"] == {"a": 12.5, "b": 12.5}
    assert "joy_db_per_step" not in compared
    page = tmp_path / "report.html"
    assert cli("report", job, "--out", page).code == 0
    text = page.read_text()
    assert '<div class="name">Joy</div><b>12.50 dB</b>' in text
    assert "<td>joy, compared</td>" in text
    assert "<h2>Joy by step</h2>" in text
    assert "joy db" not in text
