"""The comparison of codes for attention's operands: all else exact, each way measured on what it quantizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import attention_codes

DIGITS = Path(__file__).parents[2] / "examples" / "models" / "digits"


def test_ways_are_compared_on_samples_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = ["static", "static, exact probabilities", "by token, exact probabilities"]
    out = tmp_path / "codes.json"
    words = ["--model", str(DIGITS), "--seeds", "4", "--calibration", "2", "--steps", "3", "--variants", *ways]
    monkeypatch.setattr("sys.argv", ["attention_codes", *words, "--out", str(out)])
    attention_codes.main()
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ways
    found = [rows[way]["psnr_db"] for way in ways]
    assert 30 < found[0] < found[1] < found[2]
