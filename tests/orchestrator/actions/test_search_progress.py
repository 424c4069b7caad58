"""A search's progress: lines for logs, a table for terminals."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from orchestrator.actions.live import LinePace, Live
from orchestrator.actions.search_progress import (
    FrontPoint,
    ModelProgress,
    SearchProgress,
    front_text,
    search_line,
)

FRONT = (FrontPoint(1_900_000, 36.12, True, "emoji-search@1"), FrontPoint(2_440_000, 39.91, False))
MODEL = ModelProgress("emoji32", "running", "screening", 1, 2, 120, 48, 20, 2, 70, FRONT)
SEARCH = SearchProgress("0123abcd4567", "emoji", "running", (MODEL,), 75.0, 200.0)


class Terminal(io.StringIO):
    """A stream that says it is a terminal, of a width that no machine decides."""

    def isatty(self) -> bool:
        return True


def test_line_of_one_model_says_stage_and_front() -> None:
    assert search_line(SEARCH) == (
        "search 0123abcd4567: running 48/120 tasks; screening 1/2; front 1.90 MB 36.1 dB, 2.44 MB ~39.9 dB; "
        "1 min 15 s; about 3 min 20 s left of what is planned"
    )
    waiting = replace(SEARCH, waiting="store", gpus="1 of 2 GPUs busy")
    assert "; waiting for the store; " in search_line(waiting)
    assert search_line(waiting).endswith("1 of 2 GPUs busy; 1 min 15 s")


def test_line_of_several_models_counts_them_by_stage_and_names_what_failed() -> None:
    others = (
        replace(MODEL, name="digits", state="succeeded", stage="done", round=2),
        replace(MODEL, name="broken", state="failed", front=(), error="weights hold NaN"),
    )
    line = search_line(replace(SEARCH, models=(MODEL, *others), eta_seconds=None))
    assert (
        "144/360 tasks; 3 models: screening 1, done 1, failed 1; 4 points on 2 fronts; broken: weights hold NaN" in line
    )
    assert "left" not in line


def test_a_long_front_keeps_its_ends() -> None:
    front = [FrontPoint(1_000_000 * size, 30.0 + size, True) for size in range(1, 21)]
    text = front_text(front)
    assert text.count(",") == 4
    assert text.startswith("1.00 MB 31.0 dB")
    assert text.endswith("20.00 MB 50.0 dB")


def test_lines_are_due_when_a_stage_or_the_front_changes_and_are_no_flood() -> None:
    pace = LinePace()
    assert pace.is_due(SEARCH, 0.0, last=False)
    assert not pace.is_due(SEARCH, 1.0, last=False)
    assert pace.is_due(replace(SEARCH, models=(replace(MODEL, front=FRONT[:1]),)), 1.0, last=False)
    many = [replace(MODEL, name=f"m{index}", total=1000, done=0) for index in range(10)]
    lines = 0
    for step in range(10_000):
        many[step % 10] = replace(many[step % 10], done=many[step % 10].done + 1)
        lines += pace.is_due(replace(SEARCH, models=tuple(many)), 1.0 + step / 100, last=False)
    assert lines <= 130


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["plain", "live"])
def test_a_search_is_shown_while_the_block_runs(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    models = tuple(replace(MODEL, name=f"model-{index}", state="queued") for index in range(20))
    last = replace(SEARCH, models=(*models, MODEL))
    with Live(lambda: last, stream):
        pass
    text = stream.getvalue()
    assert "0123abcd4567" in text
    if isinstance(stream, Terminal):
        for shown in ("\x1b[", "emoji32", "screening 1/2", "48/120", "36.1 dB", "model-14", "and 5 more"):
            assert shown in text
        assert text.index("emoji32") < text.index("model-0")
        assert "model-15" not in text
    else:
        assert len(text.splitlines()) == 1
