"""Codes that answer for the layers before, from the command line to the packed file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.main import run_cli
from tests.orchestrator.cli.test_choose import SET
from tests.orchestrator.cli.test_search import write_model
from tests.orchestrator.in_process import InProcess

Cli = Callable[..., Any]


def test_one_task_rounds_all_layers_into_as_many_bytes(
    cli: Cli, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "tiny", 0)
    monkeypatch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess())
    words = ["--home", str(home), "run", "dynamic-w4a8", "--model", str(tmp_path / "tiny"), *SET]
    words += ["--set", "passes.choose=null", "--set", "passes.exceptions=null", "--set", "passes.round.positions=64"]
    for name, inputs in (("plain", "fp"), ("answering", "quantized"), ("again", "quantized")):
        assert run_cli([*words, "--name", name, "--set", f"passes.round.inputs={inputs}"]) == 0
    shown = {name: cli("artifacts", "show", name, "--json").json for name in ("plain", "answering", "again")}
    assert shown["answering"]["metrics"]["bytes"] == shown["plain"]["metrics"]["bytes"]
    assert shown["answering"]["metrics"] != shown["plain"]["metrics"]
    assert shown["answering"]["metrics"] == shown["again"]["metrics"]
    assert cli("recipes", "show", "gptaq-w4a8").out.count("inputs: quantized") == 1
    refused = cli("run", "dmq-w4a8", "--model", "tiny", "--set", "passes.round.inputs=quantized")
    assert refused.code == 2
    assert "passes.round.inputs: got quantized beside passes.scale, wanted one of them" in refused.err
