"""What a release loses on seeds that calibration did not see: PSNR on calibration's own seeds, beside that on new ones.

    quantmill --home FOLDER artifacts pull dmq-w8a8@1 dmq-w8a8
    python -m benchmarks.seen_seeds --model examples/models/emoji32 --releases dmq-w8a8 ... > FILE

Releases are folders as `artifacts pull` writes them, loaded as a user does, of a denoiser without conditions. Both sets
are sampled with DDIM, 20 steps, eta 0, and compared with full precision seed by seed. `loss_db` is the difference of
the means, with the 95 % interval of two independent means (Welch). Seeds differ by more than a release loses, so:

    quantmill --home FOLDER run dmq-w8a8 --set calibration.first_seed=2000000 --name other ...
    python -m benchmarks.seen_seeds --model examples/models/emoji32 --releases dmq-w8a8 --others other > FILE

compares each release with one of the same recipe that was calibrated on other seeds, on the seeds of both: what the
release that has seen a seed has there more than the one that has not, paired (`paired_loss_db`).
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
#: Those of releases for comparison.
OTHER = range(2_000_000, 2_000_032)
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
    options.add_argument("--others", type=Path, nargs="*", default=[])
    arguments = options.parse_args()
    if len(arguments.others) not in (0, len(arguments.releases)):
        raise SystemExit(f"--others: got {len(arguments.others)}, wanted one for each of {len(arguments.releases)}")
    torch.set_num_threads(1)
    denoiser = load_denoiser(arguments.model)
    sets = (SEEN, OTHER) if arguments.others else (SEEN, NEW)
    expected = {seeds: draw(denoiser.model, denoiser.scheduler_config, seeds) for seeds in sets}

    def measure(folder: Path) -> dict[range, Tensor]:
        model = load_quantized(folder, backend=KernelBackend.REFERENCE)
        config = read_json_file(folder / SCHEDULER_FILE)
        return {s: psnr_per_sample(expected[s], draw(model, config, s), SampleSpace.PIXELS) for s in sets}

    rows: list[dict[str, Any]] = []
    for folder, other in zip(arguments.releases, arguments.others, strict=False):
        one, two = measure(folder), measure(other)
        loss = mean_with_ci(torch.cat([one[SEEN] - two[SEEN], two[OTHER] - one[OTHER]]).tolist())
        told = {"paired_loss_db": round(loss.value, 4), "paired_loss_db_ci95": round(loss.ci95, 4), "n": loss.n}
        rows.append({"release": folder.name, "other": other.name, **told})
    for folder in () if arguments.others else arguments.releases:
        psnr = measure(folder)
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
