from __future__ import annotations

import json

import pytest

from quant_spec.errors import InvalidInputError
from quant_spec.sampler import Sampler


def test_a_sampler_survives_json() -> None:
    sampler = Sampler(scheduler="DDIMScheduler", num_inference_steps=7, eta=0.5, options={"a": 1})
    assert Sampler.from_json(json.loads(json.dumps(sampler.to_json()))) == sampler


@pytest.mark.parametrize(("field", "value"), [("num_inference_steps", 0), ("eta", 2.0), ("timestep_scale", 0.0)])
def test_a_sampler_that_cannot_be_is_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidInputError, match=f"{field}: got {value}, wanted"):
        Sampler.from_json(Sampler().to_json() | {field: value})


def test_guidance_calls_the_denoiser_twice() -> None:
    assert (Sampler().is_guided, Sampler().calls_per_step) == (False, 1)
    guided = Sampler(guidance_scale=3.0)
    assert (guided.is_guided, guided.calls_per_step) == (True, 2)
