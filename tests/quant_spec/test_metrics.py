"""The table of metrics, and what is generated from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quant_spec.errors import InvalidInputError
from quant_spec.generated_table import with_table
from quant_spec.metrics import METRICS, Listing, Place, check_computed, headings, lines, missing, numbers, protocol
from quant_spec.metrics_page import reference_table
from tests.orchestrator.finished_jobs import METRICS as VALUES

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_table_as_it_is() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert page == with_table(page, reference_table()), "run: python -m quant_spec.metrics_page docs/metrics.md"
    with pytest.raises(ValueError, match="wanted both"):
        with_table("no markers", "")


def test_every_row_says_what_it_means_in_a_sentence() -> None:
    for name, metric in METRICS.items():
        assert metric.meaning[0].isupper() or metric.meaning.startswith(tuple(METRICS)), name
        assert not metric.meaning.endswith("."), name


def test_what_is_computed_is_what_the_table_has() -> None:
    check_computed(VALUES)
    with pytest.raises(InvalidInputError, match=r"got mood, wanted only what quant_spec\.metrics has a row for"):
        check_computed({**VALUES, "mood": 1.0})
    with pytest.raises(InvalidInputError, match="got none of fd, n, wanted all"):
        check_computed({name: value for name, value in VALUES.items() if name not in ("fd", "n")})


def test_what_a_release_needs_is_designs_list_with_its_protocol() -> None:
    assert set(missing({})) == {
        *("psnr_db", "psnr_db_ci95", "fd", "fd_extractor", "n", "weight_bits_mean", "act_bits_mean", "bytes"),
        *("bytes_fp16", "bops", "bops_fp32", "sqnr_db_per_step", "sampler"),
    }


def test_single_numbers_are_compared() -> None:
    found = numbers(VALUES)
    assert list(found)[:3] == ["psnr_db", "psnr_db_ci95", "fd"]
    assert found["sqnr_seeds"] == 4
    assert not {"sampler", "seeds", "sqnr_db_per_step", "fd_extractor"} & found.keys()


def test_places_have_an_order_of_their_own_and_leave_out_what_there_is_not() -> None:
    assert list(lines(Place.CARD, VALUES))[:2] == ["bytes", "weight_bits_mean"]
    assert list(lines(Place.JOB, VALUES)) == ["psnr_db", "fd", "weight_bits_mean", "bytes", "bops"]
    assert lines(Place.JOB, VALUES)["psnr_db"] == (
        "psnr",
        "33.25 dB ± 0.50 (same seeds against full precision, n=8)",
    )
    assert lines(Place.CARD, VALUES)["fd"] == (
        "feature distance, same seeds, efficientnet-lite0-imagenet@224",
        "0.0421",
        "0",
    )
    assert lines(Place.JOB, {}) == {}


def test_bit_operations_by_step_are_a_cost_and_no_protocol() -> None:
    values = {**VALUES, "bops_per_step": [1e12, 2.5e12]}
    assert lines(Place.COST, values)["bops_per_step"] == ("bit operations by step", "1T to 2.5T", "–", "–")
    assert "bops_per_step" not in protocol(Listing.REPORT, values)


def test_entries_that_the_table_does_not_know_are_listed_with_the_protocol() -> None:
    listed = protocol(Listing.REPORT, {**VALUES, "mood": "good"})
    assert set(listed) == {"sampler", "seeds", "sqnr_seeds", "n", "fd_extractor", "mood"}
    assert set(protocol(Listing.CARD, VALUES)) - set(listed) == {"timesteps"}


def test_readme_has_the_columns_and_figures_of_the_table() -> None:
    readme = (ROOT / "README.md").read_text()
    head, *rows = [line for line in readme.splitlines() if line.startswith("| ")]
    found = [cell.strip(" ¹²³⁴⁵⁶⁷") for cell in head.strip("|").split("|")]
    assert found[1:-1] == list(headings(Place.README).values())
    recorded = json.loads((ROOT / "benchmarks" / "results" / "recipes-emoji32.json").read_text())["results"]
    by_recipe: dict[str, dict[str, Any]] = {result["recipe"]: result["metrics"] for result in recorded}
    cells = {row.split("`")[1]: [cell.strip() for cell in row.strip("|").split("|")] for row in rows if "`" in row}
    compared = by_recipe.keys() & cells.keys()
    assert len(compared) >= 3
    for recipe in compared:
        assert cells[recipe][1:-1] == [text for _, text in lines(Place.README, by_recipe[recipe]).values()], recipe
