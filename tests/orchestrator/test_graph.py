"""Names of tasks: what enters an id and a key, and what does not."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.graph import Resources, TaskRef, task_node
from quant_spec.keys import canonical_json, task_key
from quant_spec.kinds import KINDS

DIGEST = "ab" * 32
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=8,
)


def test_task_key_is_the_sha256_of_canonical_json() -> None:
    text = '{"inputs":{"model":["' + DIGEST + '"]},"kind":"noop","params":{"a":1,"ö":[2]},"version":3}'
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert task_key("noop", 3, {"ö": [2], "a": 1}, {"model": (DIGEST,)}) == expected


def test_task_node_without_references_has_its_key_as_id() -> None:
    node = task_node("noop", {"a": 1}, {"model": [DIGEST]})
    assert node.id == task_key("noop", KINDS["noop"].version, {"a": 1}, {"model": [DIGEST]})


def test_task_node_names_what_decides_the_bytes() -> None:
    base = task_node("noop", {"a": 1}, {"x": [DIGEST]}, version=1)
    others = [
        task_node("score", {"a": 1}, {"x": [DIGEST]}, version=1),
        task_node("noop", {"a": 2}, {"x": [DIGEST]}, version=1),
        task_node("noop", {"a": 1}, {"y": [DIGEST]}, version=1),
        task_node("noop", {"a": 1}, {"x": [DIGEST, DIGEST]}, version=1),
        task_node("noop", {"a": 1}, {"x": [TaskRef(DIGEST, "out")]}, version=1),
        task_node("noop", {"a": 1}, {"x": [TaskRef(DIGEST, "in")]}, version=1),
        task_node("noop", {"a": 1}, {"x": [DIGEST]}, version=2),
    ]
    assert len({node.id for node in [base, *others]}) == len(others) + 1


def test_task_node_ignores_how_it_is_run_and_the_order_of_names() -> None:
    one = task_node("noop", {"a": 1, "b": 2}, {"x": [DIGEST], "y": []})
    other = task_node(
        "noop", {"b": 2, "a": 1}, {"y": (), "x": (DIGEST,)}, resources=Resources(4, 1, 5), work=9.0, label="z"
    )
    assert one.id == other.id


def test_task_node_keeps_the_order_of_inputs() -> None:
    a, b = TaskRef("1" * 64, "out"), TaskRef("2" * 64, "out")
    one, other = task_node("noop", {}, {"x": [a, b]}), task_node("noop", {}, {"x": [b, a]})
    assert one.id != other.id
    assert one.sources() == other.sources() == {a.task, b.task}


def test_task_node_takes_the_version_of_its_kind() -> None:
    assert task_node("noop", {}, {}).version == KINDS["noop"].version
    with pytest.raises(KeyError, match="unheard"):
        task_node("unheard", {}, {})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_task_node_refuses_numbers_that_json_has_not(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        task_node("noop", {"a": number}, {})


@pytest.mark.parametrize("amounts", [(-1.0, 0.0, 0), (1.0, float("nan"), 0), (1.0, 0.0, -1), (float("inf"), 0.0, 0)])
def test_resources_refuse_what_no_machine_has(amounts: tuple[float, float, int]) -> None:
    with pytest.raises(ValueError, match="wanted finite amounts of 0 or more"):
        Resources(*amounts)


@given(JSON)
def test_canonical_json_reads_back_and_is_stable(value: object) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text
