"""A search's report without a browser: charts, heat maps, and a page that needs nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from orchestrator.report.heat_map import activations_map, weights_map
from orchestrator.report.plane import Axis, Mark, plane_chart
from orchestrator.report.search_charts import agreement, pareto_chart, qualities, rank_correlation
from orchestrator.report.search_data import ModelReport, PointRow
from orchestrator.report.search_render import allocation_text, render_search
from orchestrator.report.svg import log_ticks
from quant_spec.allocation import Allocation, LayerChoice
from quant_spec.layer_bits import LayerBits
from tests.orchestrator.report.pages import Outside
from tests.orchestrator.report.searches import failed_model, layer_names, model_report, search_report


@pytest.fixture(scope="module")
def model() -> ModelReport:
    """A model whose search is done."""
    return model_report()


def test_log_ticks_are_within_and_round() -> None:
    assert log_ticks(3e-7, 2e-2) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    assert log_ticks(0.9, 6) == pytest.approx([1, 2, 5])


def test_marks_are_to_scale_labels_cover_nothing_and_texts_are_escaped() -> None:
    marks = [
        Mark(1.0, 10.0, "circle", "front", "a <b>", "p1", label="one"),
        Mark(3.0, 30.0, "square", "uniform", "c & d", "p2", label="two"),
        Mark(2.0, float("nan"), "circle", "front", "nowhere"),
        Mark(2.0, 20.0, "diamond", "paper", "nothing to open", whisker=2.0),
    ]
    chart = ElementTree.fromstring(plane_chart(marks, Axis("bytes"), Axis("dB")))
    links = {element.get("href"): element for element in chart.iter("a")}
    assert set(links) == {"#p1", "#p2"}
    assert links["#p1"].get("data-tip") == links["#p1"].get("aria-label") == "a <b>"
    assert len([each for each in chart.iter() if "mark" in (each.get("class") or "").split()]) == 3
    circle, diamond = next(chart.iter("circle")), next(chart.iter("polygon"))
    square = next(chart.iter("rect"))
    middle = [float(value) for value in (diamond.get("points") or "").split()[0].split(",")]
    left, right = float(circle.get("cx", "")), float(square.get("x", "")) + float(square.get("width", "")) / 2
    assert middle[0] == pytest.approx((left + right) / 2, abs=0.2)
    assert float(circle.get("cy", "")) > middle[1] > float(square.get("y", ""))
    assert [each.text for each in chart.iter("text") if "label" in (each.get("class") or "")] == ["one", "two"]
    crowd = [Mark(1.0, 1.0, "circle", "front", "x", label="a very long label of a point") for _ in range(40)]
    crowded = ElementTree.fromstring(plane_chart(crowd, Axis("bytes"), Axis("dB")))
    assert 0 < len([each for each in crowded.iter("text") if "label" in (each.get("class") or "")]) < 8


def test_pareto_chart_has_every_measured_point_and_both_fronts(model: ModelReport) -> None:
    (quality,) = qualities("psnr_db", model.points)
    unmeasured = replace(model.points[0], number=99, bytes=None, psnr_db=None)
    shown = replace(model, points=(*model.points, unmeasured))
    text = pareto_chart(2, shown, quality, [2_000_000, 90_000_000])
    chart = ElementTree.fromstring(text)
    assert {element.get("href") for element in chart.iter("a")} == {f"#m2-p{point.number}" for point in model.points}
    classes = [(element.get("class") or "").split()[1] for element in chart.iter("a")]
    assert {name: classes.count(name) for name in set(classes)} == {
        "release": 2,
        "front": 7,
        "uniform": 5,
        "paper": 4,
        "screened": 10,
    }
    assert {element.get("class") for element in chart.iter("polyline")} == {"predicted", "measured"}
    assert "2.00 MB" in text
    assert "90.00 MB" not in text, "a budget far off must not squeeze the points together"
    assert pareto_chart(0, replace(model, points=(), front=()), quality, []) == ""
    assert [each.name for each in qualities("fd", model.points)] == ["PSNR, dB", "Fréchet distance (lower is better)"]


def test_agreement_orders_predictions_against_measurements(model: ModelReport) -> None:
    found = agreement(model.points)
    assert found.n == len(model.points)
    assert found.rank is not None
    assert 0.95 < found.rank <= 1
    reversed_points = [
        replace(point, predicted={"psnr_db": -(point.psnr_db or 0), "damage": None}) for point in model.points
    ]
    assert agreement(reversed_points).rank == pytest.approx(-1)
    assert agreement(reversed_points).damage_rank is None
    assert rank_correlation([(1.0, 10.0), (2.0, 20.0), (3.0, 15.0)]) == pytest.approx(0.5)
    assert rank_correlation([(1.0, 1.0), (2.0, 2.0)]) is None
    assert rank_correlation([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]) is None


def point_of(number: int, layers: dict[str, LayerChoice], packed: dict[str, LayerBits] | None = None) -> PointRow:
    """Return a measured point with these choices, and these bits in its file."""
    allocation = Allocation(layers=layers)
    size = 1000 * number
    return PointRow(number, "front", "final", 1, None, allocation, "d" * 64, {}, bytes=size, packed=packed or {})


def test_heat_map_shows_units_widths_and_what_nothing_is_chosen_for() -> None:
    layers = [("conv_in", "conv_in"), ("mid.q", "mid"), ("mid.k", "mid"), ("mid.attention", "mid"), ("conv_out", "out")]
    ranges = LayerChoice(activation_bits=(8, 6, 4))
    points = [
        point_of(1, {"conv_in": LayerChoice(weight_bits=8), "mid.k": LayerChoice(keep=True), "mid.attention": ranges}),
        point_of(
            2, {"mid.q": LayerChoice(weight_bits=4, promoted=0.5), "mid.attention": LayerChoice(activation_bits=6)}
        ),
    ]
    found = weights_map(layers, points)
    assert found is not None
    assert [(unit.name, [row.layer for row in unit.rows]) for unit in found.units] == [
        ("", ["conv_in"]),
        ("mid", ["mid.q", "mid.k"]),
    ]
    cells = {
        row.layer: [(cell.text, cell.css_class) for cell in row.cells] for unit in found.units for row in unit.rows
    }
    assert cells == {
        "conv_in": [("8", "b8"), ("·", "b0")],
        "mid.q": [("·", "b0"), ("4+", "b4 n5")],
        "mid.k": [("full", "b32"), ("·", "b0")],
    }
    assert found.unchosen == ("mid.attention", "conv_out")
    inputs = activations_map(layers, points)
    assert inputs is not None
    assert [cell.text for cell in inputs.units[-1].rows[-1].cells] == ["8/6/4", "6"]
    assert weights_map(layers, [point_of(1, {"mid.attention": ranges})]) is None


def test_heat_map_shows_paler_what_a_file_has_without_a_choice() -> None:
    mixed = {"mid.q": LayerBits(3.8, 8, ((3, 2), (4, 6))), "mid.k": LayerBits(4, 8), "out": LayerBits(None, None)}
    paper = point_of(1, {}, packed=mixed)
    chosen = point_of(2, {"mid.q": LayerChoice(weight_bits=2)}, packed={"mid.q": LayerBits(2, 8)})
    found = weights_map([("mid.q", "mid"), ("mid.k", "mid"), ("out", "out")], [paper, chosen])
    assert found is not None
    cells = [[(cell.text, cell.css_class) for cell in row.cells] for unit in found.units for row in unit.rows]
    assert cells == [[("3.8", "b4 base"), ("2", "b2")], [("4", "b4 base"), ("·", "b0")]]
    assert found.unchosen == ("out",)
    assert weights_map([("mid.q", "mid")], [paper]) is None, "nothing was chosen"


def test_allocations_are_told_in_words() -> None:
    points = [
        point_of(1, {"a": LayerChoice(weight_bits=8), "b": LayerChoice(keep=True)}),
        point_of(2, {}),
    ]
    assert allocation_text(points[0]) == "layers: 1 at 8, 1 in full precision"
    assert allocation_text(points[1]) == "as the base recipe"


def test_report_of_a_search_needs_nothing_outside_itself_and_escapes(model: ModelReport) -> None:
    page = render_search(search_report(model, replace(model_report("digits", 1), parent="emoji32"), failed_model()))
    parser = Outside()
    parser.feed(page)
    assert [each for each in parser.found if "href=#" not in each] == []
    assert parser.open == []
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r'href="#([^"]+)"', page))
    assert targets <= set(ids)
    assert "<script>alert(1)" not in page
    assert "&lt;b&gt;hold NaN" in page
    for text in (
        "started from the front of emoji32",
        "emoji32-search@1",
        "MPQ-DM kurtosis",
        "uniform 3 bits",
        "beaten by point 5, smaller and better",
        "rank correlation 0.9",
        "Where the next bit pays most",
        "The smallest file for a given quality",
        "task-seconds spent",
        "up_blocks.2.resnets.2.time_emb_proj",
    ):
        assert text in page, text


def test_report_of_sensitivities_alone_has_no_points(model: ModelReport) -> None:
    page = render_search(search_report(replace(model, points=(), surrogate=None)))
    assert "Where the next bit pays most" in page
    assert "Predicted and measured" not in page
    assert "Weight bits by layer" not in page
    assert page.count("<dialog") == 0
    for layer, _ in layer_names():
        assert f">{layer}</td>" in page
