"""Pack: put the states of all units into one folder that diffusers loads.

params
    sampler: see `SamplerSpec`; units: names, in the order of `states`; unknown_timestep: what the model does at a
    timestep that it was not calibrated for, "error" by default
inputs
    model: tree; states: one for each unit
outputs
    packed: tree
metrics
    bytes: of the packed weights file
"""

from __future__ import annotations

import json

from quant_core.artifact.folder import WEIGHTS_FILE, write_artifact
from quant_core.diffusion.sampler import SamplerSpec, make_scheduler
from quant_core.fit.unit_state import UnitState, load_states, merge_plans
from quant_core.nn.model import build_quantized
from quant_spec.enums import UnknownTimestep
from quant_spec.quantization_config import quantization_config
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.storage.manifest import put_tree
from workers.tasks.common import fetch_model


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Pack one model."""
    denoiser = fetch_model(inputs, context)
    states = [UnitState.from_bytes(context.store.get_bytes(digest)) for digest in inputs["states"]]
    plan = merge_plans(states, UnknownTimestep(params.get("unknown_timestep", "error")))
    build_quantized(denoiser.model, plan)
    load_states(denoiser.model, states)
    scheduler = make_scheduler(SamplerSpec.from_json(params["sampler"]), denoiser.scheduler_config)
    folder = context.scratch / "packed"
    write_artifact(denoiser.model, denoiser.config, quantization_config(plan), _scheduler_config(scheduler), folder)
    size = (folder / WEIGHTS_FILE).stat().st_size
    return TaskOutput({"packed": put_tree(context.store, folder)}, {"bytes": size})


def _scheduler_config(scheduler: object) -> dict[str, object]:
    """Return a scheduler's configuration as JSON, as diffusers saves it."""
    return dict(json.loads(scheduler.to_json_string()))  # type: ignore[attr-defined]
