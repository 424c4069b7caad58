"""Fuse: a whole pipeline with LoRA files added to its weights, as a model of its own.

Weight files that do not change stay the model's blobs; those that do have the same tensors in the same dtypes. What was
fused is in the tree as `loras.json`, after what had been fused before.
"""

from __future__ import annotations

import json
import shutil

from torch import nn

from quant_core.diffusion.denoiser import load_denoiser
from quant_core.diffusion.lora import fuse_loras, write_changed
from quant_core.diffusion.pipeline import load_pipeline
from quant_core.diffusion.sampler import make_scheduler
from quant_core.errors import DenoiserError
from quant_spec.documents import read_json
from quant_spec.sampler import Sampler
from quant_spec.scheduler_choice import default_scheduler
from quant_spec.tasks.fuse import FUSED, LORAS_FILE, Inputs, Params
from workers.errors import TaskError
from workers.execution.context import TaskContext, TaskOutput
from workers.storage.manifest import link_tree, put_manifest, read_files


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Fuse some files."""
    store, folder, target = context.store, context.scratch / "model", context.scratch / "fused"
    if len(params.scales) != len(inputs.loras):
        raise TaskError(f"loras: got {len(inputs.loras)} files, wanted one for each of {len(params.scales)} scales")
    link_tree(store, inputs.model, folder)
    denoiser = load_denoiser(folder)
    config = denoiser.scheduler_config
    pipeline = load_pipeline(
        folder, denoiser.model, make_scheduler(Sampler(scheduler=default_scheduler(config)), config)
    )
    loras = []
    for place, (digest, scale) in enumerate(zip(inputs.loras, params.scales, strict=True)):
        path = context.scratch / f"lora_{place}" / "lora.safetensors"
        path.parent.mkdir()
        shutil.copyfile(store.local_path(digest), path)
        loras.append((path, scale))
    fuse_loras(pipeline, loras)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    changed = [name for name, part in parts.items() if write_changed(part, folder / name, target / name)]
    if not changed:
        raise DenoiserError("LoRA: got files that change no weight in the model's dtype, wanted some that do")
    files = read_files(store, inputs.model)
    for path in target.rglob("*.safetensors"):
        files[path.relative_to(target).as_posix()] = (store.put_file(path), path.stat().st_size)
    before = read_json(store.get_bytes(files[LORAS_FILE][0]), LORAS_FILE) if LORAS_FILE in files else []
    told = [{"scale": scale, "sha256": digest} for digest, scale in zip(inputs.loras, params.scales, strict=True)]
    data = (json.dumps([*before, *told], indent=2, sort_keys=True) + "\n").encode()
    files[LORAS_FILE] = (store.put_bytes(data), len(data))
    return TaskOutput({FUSED: put_manifest(store, files)}, {"changed": changed})
