"""A record reads what it wrote, and says in one line what is other than that."""

from __future__ import annotations

from typing import Any

import pytest

from quant_spec.errors import InvalidInputError
from quant_spec.tasks.noop import Params
from quant_spec.tasks.scale import Params as ScaleParams


@pytest.mark.parametrize("data", [{}, {"seconds": 300.0}, {"payload": {"a": [1, 2.5]}}])
def test_what_a_record_wrote_is_read(data: dict[str, Any]) -> None:
    assert Params.from_json(data).to_json() == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"seconds": 300}, "got seconds 300, which is written 300.0, wanted seconds"),
        ({"seconds": 0.0}, "got seconds, which cannot matter beside the others, wanted "),
        ({"second": 1.0}, "second: unknown key; nearest: seconds"),
    ],
)
def test_what_it_would_not_write_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Params.from_json(data)


def test_what_is_missing_is_named() -> None:
    written = ScaleParams(seed=0, forward_batch_size=1, units=()).to_json()
    del written["iterations"]
    with pytest.raises(InvalidInputError, match="got no iterations, wanted "):
        ScaleParams.from_json(written)
