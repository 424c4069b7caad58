"""What rounding and what clipping of the layers' inputs cost on samples that calibration has not seen.

    quantmill --home FOLDER run dmq-w8a8 --model examples/models/emoji32 --set passes.reconstruct=null
    python -m benchmarks.clipping --home FOLDER "no scales=JOB" "scales=JOB" > benchmarks/results/clipping-emoji32.json

Every layer gets the inputs that the full-precision model has on trajectories of new seeds, quantized with the tables of
a finished job; its weights are in full precision. With c(x) the input clamped to the range of its step, and q(x) its
quantized value, c(x) - x is what clipping does and q(x) - c(x) what rounding does. Both are taken through the layer,
and divided by the power of its output (without bias).
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cli import give, named, parser
from benchmarks.records import Records
from quant_core.diffusion.calibration import CalibrationSet, RecordSpec, record_trajectories, replay
from quant_core.diffusion.denoiser import Denoiser, load_denoiser
from quant_core.fit.unit_state import load_states, merge_formats
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.layers import QuantLayer
from quant_core.nn.model import build_quantized
from quant_core.runtime.layer import layer_quantizers
from quant_spec.sampler import Sampler


def clipped(quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
    """Return `x` clamped to what the grid of its step reaches, divided by the channel scales as `quantizer` does."""
    channels, clock = quantizer.channels, quantizer.clock
    scale, zero_point = clock.gather(quantizer.scale, x), clock.gather(quantizer.zero_point, x)
    if channels is not None and channels.shifted:
        rows = quantizer.channel_shift[int(clock.index) if len(quantizer.channel_shift) > 1 else 0]
        scale = scale * torch.exp2(channels.shape(x, rows).float())
    if channels is not None and channels.scaled:
        x = x / channels.shape(x, quantizer.channel_scale)
    tops = quantizer.tops if len(quantizer.tops) else torch.tensor([2.0**quantizer.spec.bits - 1])
    top = clock.gather(tops, x)
    return torch.minimum(torch.maximum(x, -zero_point * scale), (top - zero_point) * scale)


class Watched:
    """One layer's powers: of its output, and of what rounding and clipping of its input add, by trajectory step."""

    def __init__(self, original: nn.Module, quantized: QuantLayer) -> None:
        self.original, self.quantizers = original, layer_quantizers(quantized)
        self.parts = quantized.spec.split or (quantized.shape[1],)
        self.dim = -1 if quantized.kind is nn.Linear else 1
        self.powers: dict[int, Tensor] = {}

    def _undone(self, quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
        """Return a quantizer's output multiplied by the channel scales, which else the weight holds."""
        channels = quantizer.channels
        return x * channels.shape(x, quantizer.channel_scale) if channels is not None and channels.scaled else x

    def see(self, step: int, x: Tensor) -> None:
        """Add the inputs of one step."""
        pairs = list(zip(self.quantizers, x.split(self.parts, dim=self.dim), strict=True))
        cut = torch.cat([self._undone(q, clipped(q, part)) for q, part in pairs], self.dim)
        rounded = torch.cat([self._undone(q, q(part)) for q, part in pairs], self.dim)
        zero = self.original.forward(torch.zeros_like(x))
        results = [self.original.forward(each) - zero for each in (x, cut, rounded)]
        powers = [results[0], results[2] - results[1], results[1] - results[0]]
        found = torch.stack([each.double().square().sum() for each in powers])
        self.powers[step] = self.powers.get(step, torch.zeros(3, dtype=torch.float64)) + found

    def shares(self) -> Tensor:
        """Return rounding's and clipping's share of the output's power at each step, shape (S, 2)."""
        powers = torch.stack([self.powers[step] for step in sorted(self.powers)])
        return powers[:, 1:] / powers[:, :1]


@torch.no_grad()
def measure(folder: str, records: Records, trajectories: CalibrationSet) -> dict[str, Any]:
    """Return the figures of one job's tables."""
    model, quantized = (load_denoiser(folder).model.eval() for _ in range(2))
    states = records.states()
    parts = build_quantized(quantized, merge_formats(states))
    load_states(quantized, states)
    static = {n: q for n, q in parts.layers.items() if q.spec.activation and not q.spec.activation.is_dynamic}
    watched = {name: Watched(model.get_submodule(name), layer) for name, layer in static.items()}

    def hook(name: str) -> Any:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            watched[name].see(int(parts.clock.index), args[0].float())

        return see

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in watched]
    for step in range(trajectories.steps):
        batch = trajectories.rows(step, 0, trajectories.samples)
        parts.clock.set_timestep(batch.timestep)
        replay(model, batch)
    for handle in handles:
        handle.remove()
    shares = {name: layer.shares() for name, layer in watched.items()}
    every = torch.stack(list(shares.values()))  # (layers, S, 2)
    ratios = {name: -10 * math.log10(float(share.mean(0).sum())) for name, share in shares.items()}
    return {
        "job": records.job,
        "layers": len(shares),
        "rounding": float(every[..., 0].mean()),
        "clipping": float(every[..., 1].mean()),
        "least_sqnr_db": min(ratios.values()),
        "least_sqnr_layer": min(ratios, key=lambda name: ratios[name]),
    }


def new_trajectories(denoiser: Denoiser, sampler: Sampler, seeds: Sequence[int], folder: Path) -> CalibrationSet:
    """Record full-precision trajectories."""
    path = folder / "trajectories.safetensors"
    record_trajectories(denoiser, seeds, RecordSpec(sampler), path)
    return CalibrationSet([path])


def main() -> None:
    """Print one JSON document."""
    options = parser(__doc__)
    options.add_argument("--home", type=Path, required=True)
    options.add_argument("--model", default="examples/models/emoji32")
    options.add_argument("--first-seed", type=int, default=100)
    options.add_argument("--seeds", type=int, default=4)
    options.add_argument("jobs", nargs="+", metavar="NAME=JOB")
    arguments = options.parse_args()
    jobs = {name: Records(arguments.home, job) for name, job in named(arguments.jobs).items()}
    calibrate, _ = next(next(iter(jobs.values())).of("calibrate"))
    sampler = Sampler.from_json(calibrate["sampler"])
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        trajectories = new_trajectories(load_denoiser(arguments.model), sampler, seeds, Path(folder))
        for name, records in jobs.items():
            rows[name] = measure(arguments.model, records, trajectories)
            sys.stderr.write(f"{name}: {rows[name]}\n")
    document = {"model": arguments.model, "sampler": sampler.to_json(), "seeds": [seeds.start, seeds.stop - 1]}
    give(document | {"rows": rows})


if __name__ == "__main__":
    main()
