"""What a release loses on seeds that calibration did not see: PSNR on calibration's own seeds, beside that on new ones.

    quantmill --home FOLDER artifacts pull dmq-w8a8@1 dmq-w8a8
    python -m benchmarks.seen_seeds --model examples/models/emoji32 --releases dmq-w8a8 ... > FILE

Releases are folders as `artifacts pull` writes them, loaded as a user does, of a denoiser without conditions. Both sets
are sampled with DDIM, 20 steps, eta 0, and compared with full precision seed by seed. `loss_db` is the difference of
the means, with the 95 % interval of two independent means (Welch).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cli import give, parser
from quant_core import load_quantized
from quant_core.diffusion.denoiser import load_denoiser
from quant_core.diffusion.sampler import make_scheduler, sample, trajectory_conditioning
from quant_core.metrics.psnr import mean_with_ci, psnr_per_sample
from quant_spec.documents import read_json_file
from quant_spec.enums import KernelBackend, SampleSpace
from quant_spec.model_files import SCHEDULER_FILE
from quant_spec.sampler import Sampler

SAMPLER = Sampler(scheduler="DDIMScheduler", num_inference_steps=20)
#: Those that shipped recipes calibrate with, and as many as are looked at that none has.
SEEN, NEW = range(1_000_000, 1_000_032), range(0, 128)
BATCH = 32


def draw(model: nn.Module, scheduler_config: Any, seeds: range) -> Tensor:
    """Return the samples of some seeds, shape (N, C, H, W)."""
    conditioning = trajectory_conditioning(model, SAMPLER, seeds, None)
    scheduler = make_scheduler(SAMPLER, scheduler_config)
    return sample(model, scheduler, SAMPLER, seeds, conditioning, batch_size=BATCH)


def main() -> None:
    """Measure each release, and print one JSON document."""
    options = parser(__doc__)
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--releases", type=Path, nargs="+", required=True)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    denoiser = load_denoiser(arguments.model)
    expected = {seeds: draw(denoiser.model, denoiser.scheduler_config, seeds) for seeds in (SEEN, NEW)}
    rows = []
    for folder in arguments.releases:
        model = load_quantized(folder, backend=KernelBackend.REFERENCE)
        config = read_json_file(folder / SCHEDULER_FILE)
        psnr = {
            seeds: psnr_per_sample(expected[seeds], draw(model, config, seeds), SampleSpace.PIXELS)
            for seeds in (SEEN, NEW)
        }
        seen, new = (mean_with_ci(psnr[seeds].tolist()) for seeds in (SEEN, NEW))
        rows.append(
            {
                "release": folder.name,
                "seen": {"psnr_db": round(seen.value, 4), "ci95": round(seen.ci95, 4), "n": seen.n},
                "new": {"psnr_db": round(new.value, 4), "ci95": round(new.ci95, 4), "n": new.n},
                "loss_db": round(seen.value - new.value, 4),
                "loss_db_ci95": round(math.hypot(seen.ci95, new.ci95), 4),
            }
        )
    give({"model": arguments.model.name, "sampler": "DDIM 20, eta 0", "rows": rows})


if __name__ == "__main__":
    main()
