"""Pack: put the states of all units into one folder that diffusers loads.

Metrics: `bytes` of the packed weights file.
"""

from __future__ import annotations

import json
from dataclasses import replace

from quant_core.artifact.folder import WEIGHTS_FILE, write_artifact
from quant_core.diffusion.sampler import make_scheduler
from quant_core.fit.unit_state import UnitState, load_states, merge_formats
from quant_core.nn.model import build_quantized
from quant_spec.quantization_config import quantization_config
from quant_spec.tasks.pack import PACKED, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.storage.manifest import put_tree
from workers.tasks.inputs import fetch_model, read_states


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Pack one model."""
    denoiser = fetch_model(inputs.model, context, streamed=None)
    # one at a time: all of them are as large as the packed model
    formats = merge_formats([_without_tensors(digest, context) for digest in inputs.states], params.unknown_timestep)
    build_quantized(denoiser.model, formats)
    for digest in inputs.states:
        load_states(denoiser.model, read_states([digest], context))
    scheduler = make_scheduler(params.sampler, denoiser.scheduler_config)
    folder = context.scratch / "packed"
    write_artifact(denoiser.model, denoiser.config, quantization_config(formats), _scheduler_config(scheduler), folder)
    size = (folder / WEIGHTS_FILE).stat().st_size
    return TaskOutput({PACKED: put_tree(context.store, folder)}, {"bytes": size})


def _without_tensors(digest: str, context: TaskContext) -> UnitState:
    """Read what a state is of."""
    (state,) = read_states([digest], context)
    return replace(state, tensors={})


def _scheduler_config(scheduler: object) -> dict[str, object]:
    """Return a scheduler's configuration as JSON, as diffusers saves it."""
    return dict(json.loads(scheduler.to_json_string()))  # type: ignore[attr-defined]
