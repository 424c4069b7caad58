"""A model's name means what was registered, a path what is there now; neither is taken for the other."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

Cli = Callable[..., Any]
Snapshot = Callable[[], dict[str, bytes]]

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SUBMIT = ["submit", "minmax-w8a8", "--json", "--model"]


def retrain(model: Path) -> None:
    """Write other weights in the place of those of a model folder."""
    tensors = load_file(model / WEIGHTS)
    save_file(
        {name: (value + np.float32(0.01)).astype(value.dtype) for name, value in tensors.items()}, model / WEIGHTS
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def trained(digits: Path, with_digits: Path, here: Path) -> Path:
    """A folder here that has the name, and the bytes, of the registered model."""
    return shutil.copytree(digits, here / "digits")


def model_of(cli: Cli, answer: Any) -> str:
    """Return the name of the model that a job is about."""
    assert answer.code == 0, answer.err
    return str(cli("jobs", "show", answer.json["job"], "--json").json["model"])


def test_a_name_and_a_folder_with_the_same_bytes_are_one_model(cli: Cli, trained: Path) -> None:
    for text in ("digits", "./digits", trained):
        answer = cli(*SUBMIT, text)
        assert model_of(cli, answer) == "digits"
        assert "changed" not in answer.err
    assert [row["name"] for row in cli("models", "ls", "--json").json] == ["digits"]


def test_a_retrained_folder_is_not_taken_for_the_registered_model(
    cli: Cli, home: Path, digits: Path, snapshot: Snapshot, here: Path
) -> None:
    folder = shutil.copytree(digits, here / "mymodel")
    assert model_of(cli, cli(*SUBMIT, "mymodel")) == "mymodel"
    digest = cli("models", "show", "mymodel", "--json").json["digest"]
    retrain(folder)
    before = snapshot()
    for words in (["submit"], ["submit", "--dry-run"], ["run"]):
        refused = cli(*words, "minmax-w8a8", "--model", "mymodel")
        assert (refused.code, refused.out) == (2, "")
        (line,) = refused.err.splitlines()
        assert re.search(rf"got 'mymodel'.*{digest[:8]}.*wanted \./mymodel .* or mymodel@{digest[:8]} ", line), line
    assert snapshot() == before
    # Both of the ways that it names; the first is mended by what it says of the folder.
    answer = cli(*SUBMIT, f"mymodel@{digest[:8]}")
    assert (model_of(cli, answer), "changed since" in answer.err) == ("mymodel", True)
    taken = cli(*SUBMIT, "./mymodel")
    new = model_of(cli, taken)
    assert re.fullmatch("mymodel-[0-9a-f]{8}", new)
    assert re.search(rf"mymodel: .*{folder} have changed since .*; registered as {new}", taken.err), taken.err
    # From now on it is registered too, and nothing is said.
    again = cli(*SUBMIT, folder)
    assert (model_of(cli, again), "changed" in again.err) == (new, False)
    # The name still has two meanings.
    assert cli(*SUBMIT, "mymodel").code == 2


def test_a_dry_run_says_what_would_be_registered(cli: Cli, trained: Path, snapshot: Snapshot) -> None:
    retrain(trained)
    before = snapshot()
    dry = cli("submit", "minmax-w8a8", "--dry-run", "--json", "--model", "./digits")
    assert re.fullmatch("digits-[0-9a-f]{8}", dry.json["model"])
    assert f"would be registered as {dry.json['model']}" in dry.err
    assert snapshot() == before


def test_a_folder_that_holds_no_model_is_not_meant(cli: Cli, with_digits: Path, here: Path) -> None:
    (here / "digits").mkdir()
    (here / "digits" / "0.png").write_bytes(b"a picture")
    answer = cli(*SUBMIT, "digits")
    assert model_of(cli, answer) == "digits"


def test_a_folder_whose_weights_cannot_be_read_is_not_passed_over(cli: Cli, trained: Path) -> None:
    (trained / WEIGHTS).unlink()
    refused = cli(*SUBMIT, "digits")
    assert refused.code == 2
    assert "no weights" in refused.err
    assert "digits@" in refused.err


def test_by_its_name_from_elsewhere_a_changed_folder_is_mentioned(
    cli: Cli, home: Path, digits: Path, here: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(digits, tmp_path / "models" / "mine")
    assert cli("models", "add", source).code == 0
    assert "changed" not in cli(*SUBMIT, "mine").err
    (source / WEIGHTS).touch()
    assert "changed" not in cli(*SUBMIT, "mine").err, "the same bytes"
    retrain(source)
    answer = cli(*SUBMIT, "mine")
    assert model_of(cli, answer) == "mine"
    assert re.search(rf"mine: the folder {source} has changed since .*; this is the model as it was", answer.err)
    shutil.rmtree(source)
    assert "changed" not in cli(*SUBMIT, "mine").err


def test_adding_a_changed_folder_says_so(cli: Cli, trained: Path, tmp_path: Path) -> None:
    other = shutil.copytree(trained, tmp_path / "other" / "digits")
    assert cli("models", "add", trained, "--name", "first").code == 0
    retrain(trained)
    added = cli("models", "add", trained, "--json")
    assert "changed since" in added.err
    assert "registered as first" in added.err
    assert f"registered as {added.json['name']}" in added.err
    retrain(other)
    retrain(other)
    apart = cli("models", "add", other, "--json")
    assert re.search(rf"this name is that of another model, from .*; registered as {apart.json['name']}", apart.err)
    refused = cli("models", "add", other, "--name", "first")
    assert refused.code == 2
    assert "wanted another name" in refused.err


def test_a_name_that_is_taken_is_refused_before_anything_is_copied_or_inspected(
    cli: Cli, trained: Path, snapshot: Snapshot
) -> None:
    retrain(trained)
    before = snapshot()
    refused = cli("models", "add", trained, "--name", "digits")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith("error: model name 'digits': got digest ")
    assert snapshot() == before


def test_a_digest_after_a_name_must_be_its_own(cli: Cli, with_digits: Path) -> None:
    digest = cli("models", "show", "digits", "--json").json["digest"]
    assert cli("models", "show", f"digits@{digest[:4]}", "--json").json["digest"] == digest
    for text in ("digits@", "digits@0000", "digits@xyz", f"other@{digest[:8]}", f"digits@{digest}0"):
        assert cli("models", "show", text).code == 102, text


def test_help_says_how_to_mean_each(cli: Cli) -> None:
    for command in ("submit", "run"):
        text = " ".join(cli(command, "--help").out.split())
        assert "./NAME is the folder, and NAME@DIGEST the registered model" in text
