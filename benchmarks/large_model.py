"""Peak memory of each task on a large random pipeline, each task in a process of its own.

    python -m benchmarks.large_model --home FOLDER --out benchmarks/results/large-model.json

Makes a class-conditional DiT of random bfloat16 weights in shards (1.5 billion numbers by default), registers it and
runs a recipe on it, a few seeds of two steps. `peak_rss_bytes` is the most that the process of a task held (VmHWM),
pages of mapped files among it; `share` is that by the bytes of the bfloat16 weights.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.cli import give, parser
from orchestrator.actions.submission import Request, submit
from orchestrator.db.jobs import find_job
from orchestrator.scheduling.scheduler import Scheduler, SchedulerConfig
from orchestrator.search.advance import Steps
from orchestrator.service import Service, open_service
from orchestrator.settings import resolve_settings
from quant_spec.tasks import inspect
from tests.orchestrator.in_process import InProcess
from workers.execution.execute import TaskCall
from workers.execution.local import run_in_subprocess

_SHARD_BYTES = 1 << 29
_HEAD = 64
_SMALL = {
    "sampler.num_inference_steps": 2,
    "sampler.guidance_scale": 1,
    "calibration.seeds": 1,
    "evaluation.seeds": 2,
    "evaluation.sqnr_seeds": 1,
    "evaluation.grid": 1,
}


class OneProcessEach(InProcess):
    """Runs each call in a process of its own, one after another, and keeps what its memory was."""

    def __init__(self, notes: Path) -> None:
        super().__init__()
        self.notes = notes  # outlive this process, so that a benchmark that was stopped can go on
        self.peaks: dict[str, list[int]] = json.loads(notes.read_text()) if notes.is_file() else {}

    def answer(self, call: TaskCall) -> dict[str, Any]:
        """Run a call to its end."""
        output = run_in_subprocess(call)
        self.peaks.setdefault(call.kind, []).append(output.ran["peak_rss_bytes"])
        self.notes.write_text(json.dumps(self.peaks))
        sys.stderr.write(f"{call.kind}: {output.ran['peak_rss_bytes'] / 2**30:.2f} GiB\n")
        return {"outputs": output.outputs, "metrics": output.metrics, "ran": output.ran}


def save_model(folder: Path, layers: int, width: int) -> int:
    """Write a random DiTPipeline with bfloat16 weights, one shard in memory at a time; return its denoiser's bytes."""
    config: dict[str, Any] = {
        "num_attention_heads": width // _HEAD, "attention_head_dim": _HEAD, "in_channels": 4, "out_channels": 8,
        "num_layers": layers, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "attention_bias": True,
        "activation_fn": "gelu-approximate",
    }  # fmt: skip
    home = folder / "transformer"
    home.mkdir(parents=True, exist_ok=True)
    with init_empty_weights():
        model = diffusers.DiTTransformer2DModel(**config)
    model.save_config(home)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = held = number = 0
    if (folder / "model_index.json").is_file():
        return 2 * sum(tensor.numel() for tensor in model.state_dict().values())

    def write() -> None:
        nonlocal shard, held, number
        number += 1
        name = f"diffusion_pytorch_model-{number:05}.safetensors"
        save_file(shard, home / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard, held = {}, 0

    for key, tensor in model.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator) * (0.02 if tensor.dim() > 1 else 0.0)
        shard[key] = values.to(torch.bfloat16)
        total, held = total + 2 * tensor.numel(), held + 2 * tensor.numel()
        if held >= _SHARD_BYTES:
            write()
    if shard:
        write()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (home / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16, **blocks
    )
    vae.save_pretrained(folder / "vae")
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    parts = {"transformer": "DiTTransformer2DModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}
    index = {"_class_name": "DiTPipeline", "_diffusers_version": diffusers.__version__}
    index |= {name: ["diffusers", cls] for name, cls in parts.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    return total


def measure(service: Service, folder: Path, recipe: str) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Run a recipe; return the peak of every task by kind, and what the job measured."""
    executor = OneProcessEach(service.settings.home / "peaks.json")
    overrides = tuple(f"{name}={value}" for name, value in _SMALL.items())
    submitted = submit(service, Request(recipe, str(folder), overrides), notify=lambda line: None)
    settings = service.settings
    looked = TaskCall(
        kind=inspect.KIND.name,
        params=inspect.Params().to_json(),
        inputs={"model": [submitted.job.model_digest]},
        store_url=settings.store_url,
        cache_dir=str(settings.cache_dir),
        cache_bytes=settings.cache_bytes,
        device="cpu",
        threads=1,
    )
    if inspect.KIND.name not in executor.peaks:
        executor.submit(looked)
        executor.wait(0)
    config = SchedulerConfig(settings.store_url, settings.cache_dir, settings.cache_bytes)
    scheduler = Scheduler(service.database, lambda: executor, config, None, Steps(service))
    scheduler.run(stop=threading.Event(), until_job=submitted.job.id)
    with service.database.session(read_only=True) as session:
        job = find_job(session, submitted.job.id)
    if job.error is not None:
        raise RuntimeError(f"{recipe}: {job.error}")
    return executor.peaks, dict(job.metrics or {})


def main() -> None:
    """Make the model, run the recipe, and print one JSON document."""
    options = parser(__doc__)
    options.add_argument("--home", type=Path, required=True)
    options.add_argument("--layers", type=int, default=24)
    options.add_argument("--width", type=int, default=1792)
    options.add_argument("--recipe", default="minmax-w8a8")
    options.add_argument("--out", type=Path)
    arguments = options.parse_args()
    folder = arguments.home / "random-dit"
    size = save_model(folder, arguments.layers, arguments.width)
    with open_service(resolve_settings(os.environ, home=str(arguments.home / "home"))) as service:
        peaks, metrics = measure(service, folder, arguments.recipe)
    most = {kind: max(found) for kind, found in peaks.items()}
    give(
        {
            "model": {"layers": arguments.layers, "width": arguments.width, "parameters": size // 2},
            "bytes_bf16": size,
            "recipe": arguments.recipe,
            "settings": _SMALL,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "bytes": metrics.get("bytes"),
            "tasks": {
                kind: {"n": len(peaks[kind]), "peak_rss_bytes": peak, "share": round(peak / size, 3)}
                for kind, peak in most.items()
            },
            "largest_share": round(max(most.values()) / size, 3),
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
