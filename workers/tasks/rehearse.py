"""Rehearse: a sampler's steps with noise for predictions, to see whether its arithmetic gives samples at all."""

from __future__ import annotations

from quant_core.diffusion.rehearsal import rehearse
from quant_spec.tasks.rehearse import Inputs, Params
from workers.execution.context import TaskContext, TaskOutput


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Rehearse one sampler."""
    del inputs, context
    return TaskOutput({}, {"steps": rehearse(params.sampler, params.scheduler_config)})
