"""Codes that answer for the layers before, from the command line to the packed file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.main import run_cli
from tests.orchestrator.cli.test_choose import SET
from tests.orchestrator.cli.test_search import write_model
from tests.orchestrator.in_process import InProcess

Cli = Callable[..., Any]


#: A recipe, what is left out of it, and kinds of task that come before the codes are chosen.
CASES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "codes of one width": (
        "dynamic-w4a8",
        ("passes.choose=null", "passes.exceptions=null", "passes.round.positions=64"),
        ("round",),
    ),
    "chosen bits, scaled channels, and inputs of other bits": (
        "dmq-w4a6",
        ("passes.reconstruct=null", "passes.scale.iterations=4", "passes.exceptions.seeds=1"),
        ("scale", "menu", "choose", "exceptions"),
    ),
    "bits of output channels": ("mpqdm-w4a4", ("passes.distill=null", "passes.choose=null"), ("scale", "allocate")),
    "a low-rank branch": ("svdquant-w4a4", ("passes.choose=null",), ("low_rank",)),
}


@pytest.mark.parametrize(("recipe", "told", "before"), CASES.values(), ids=CASES)
def test_codes_answer_in_as_many_bytes(
    recipe: str,
    told: tuple[str, ...],
    before: tuple[str, ...],
    cli: Cli,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_model(tmp_path / "tiny", 0)
    monkeypatch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess())
    words = ["--home", str(home), "run", recipe, "--model", str(tmp_path / "tiny"), *SET]
    words += [word for each in told for word in ("--set", each)]
    kinds: dict[str, list[str]] = {}
    for name, inputs in (("plain", "fp"), ("answering", "quantized")):
        capfd.readouterr()
        assert run_cli([*words, "--name", name, "--set", f"passes.round.inputs={inputs}", "--json"]) == 0
        kinds[name] = [task["kind"] for task in json.loads(capfd.readouterr().out)["ran"]]
    assert kinds["answering"].count("answer") == 1
    assert "answer" not in kinds["plain"]
    assert set(before) <= set(kinds["plain"])
    plain, answering = (cli("artifacts", "show", name, "--json").json["metrics"] for name in kinds)
    assert answering["bytes"] == plain["bytes"]
    assert answering["psnr_db"] != plain["psnr_db"]
