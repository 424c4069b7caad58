"""Quality and size of recipes on whole pipelines, in pixels: one job each, as a user runs it.

    python -m benchmarks.pipelines --model examples/models/emoji-sd --prompts examples/prompts/emoji.txt \\
        --home FOLDER --recipes fast-w4a8 dmq-w8a8 dmq-w4a8 > benchmarks/results/pipelines-emoji-sd.json

Every figure is the job's own: images that the release draws in its pipeline against those of full precision, for the
same prompts and seeds, none of which calibration used (`--prompts` is split between them; class labels are all used by
both, with other seeds; without a file, all of the model's configuration, which may be many more than it was trained on:
emoji-dit has `examples/prompts/emoji-labels.txt`). Each recipe is measured at guidance 4 and without guidance; jobs of
one home share their full-precision samples. A recipe may be followed by overrides: "fast-w4a8 weights.group_size=64".
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.cli import Job, give, parser, run_recipe

SEEDS, STEPS = 64, 20
_METRICS = (
    *("psnr_db", "psnr_db_ci95", "ssim", "ssim_ci95", "fd", "latent_sqnr_db", "sqnr_db_per_step", "n", "sampler"),
    *("bytes", "bytes_fp16", "weight_bits_mean", "act_bits_mean", "worst_prompts", "prompts"),
)


def result(job: Job, guidance: float, overrides: list[str]) -> dict[str, Any]:
    """Return what is recorded of a job."""
    return {
        "recipe": job.recipe,
        "overrides": overrides,
        "guidance_scale": guidance,
        "digest": job.digest,
        "tasks": dict(job.tasks),
        "seconds": job.seconds,
        "metrics": {name: job.metrics[name] for name in _METRICS if name in job.metrics},
    }


def main() -> None:
    """Run all recipes at each guidance and print one JSON document."""
    options = parser(__doc__)
    options.add_argument("--model", required=True)
    options.add_argument("--prompts", type=Path)
    options.add_argument("--home", type=Path, required=True)
    options.add_argument("--recipes", nargs="+", default=["fast-w4a8"])
    options.add_argument("--guidance", nargs="+", type=float, default=[4.0, 1.0])
    options.add_argument("--arguments", default="{}", help="sampler.arguments, such as '{max_sequence_length: 24}'")
    arguments = options.parse_args()
    results = []
    for entry in arguments.recipes:
        recipe, *overrides = entry.split()
        for guidance in arguments.guidance:
            sets = [
                f"evaluation.seeds={SEEDS}",
                f"sampler.num_inference_steps={STEPS}",
                f"sampler.guidance_scale={guidance:g}",
                f"sampler.arguments={arguments.arguments}",
                *overrides,
            ]
            if arguments.prompts is not None:
                sets.append(f"prompts={arguments.prompts.absolute()}")
            job = run_recipe(recipe, arguments.model, arguments.home, sets)
            results.append(result(job, guidance, overrides))
    machine = {"machine": platform.machine(), "cores": os.cpu_count()}
    versions = {name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "quantmill")}
    give({"model": arguments.model, **machine, "versions": versions, "results": results})


if __name__ == "__main__":
    main()
