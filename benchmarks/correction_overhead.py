"""What a corrected scheduler adds to a run: its step against the wrapped one's, and against the denoiser's call.

python -m benchmarks.correction_overhead FOLDER    a pulled release of a recipe with passes.correct
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

import quant_core
from benchmarks.cli import give, parser
from benchmarks.timing import Call, take_turns, wall_ms
from quant_core.diffusion.conditioning import draw_conditioning
from quant_core.diffusion.denoiser import call_denoiser, sample_shape

BATCHES = (1, 8, 32)
REPEATS = 5


def median_ms(call: Call, repeats: int) -> float:
    """Return the median time of a call, after one that is not counted."""
    return statistics.median(take_turns({"": call}, repeats, wall_ms)[""])


@torch.no_grad()
def measure(folder: Path, batch: int) -> dict[str, Any]:
    """Time one batch size."""
    model = quant_core.load_quantized(folder, backend="reference")
    scheduler = quant_core.QuantmillCorrectedScheduler.from_pretrained(folder, subfolder="scheduler")
    assert isinstance(scheduler, quant_core.QuantmillCorrectedScheduler)
    scheduler.set_timesteps(len(scheduler.correction.timesteps))
    timestep = scheduler.timesteps[len(scheduler.timesteps) // 2]
    x = torch.randn(batch, *sample_shape(model))
    told = draw_conditioning(model, range(batch), None)
    call = median_ms(lambda: call_denoiser(model, x, timestep, told), REPEATS)
    plain = median_ms(lambda: scheduler.wrapped.step(x, timestep, x, eta=1.0), 100 * REPEATS)
    corrected = median_ms(lambda: scheduler.step(x, timestep, x, eta=1.0), 100 * REPEATS)
    added = corrected - plain
    return {"batch": batch, "denoiser_ms": call, "step_ms": plain, "added_ms": added, "share": added / (call + plain)}


def main() -> None:
    """Measure and print one JSON document."""
    options = parser(__doc__)
    options.add_argument("folder", type=Path)
    folder = options.parse_args().folder
    rows = [measure(folder, batch) for batch in BATCHES]
    give({"threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    main()
