"""Compare jobs of one home that were evaluated on the same seeds, each with the first: paired by seed.

    python -m benchmarks.compare --home FOLDER JOB JOB ... > benchmarks/results/NAME.json

The difference of PSNR has a normal interval over seeds; that of the Fréchet distance a bootstrap interval: seeds are
drawn with replacement, the same for full precision and for both jobs. Samples are those that the jobs' evaluations
recorded, so nothing is sampled again.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cli import give, parser
from benchmarks.records import Records
from quant_core.metrics.frechet import BATCH, ResizedFeatures, efficientnet_lite0
from quant_core.metrics.images import to_rgb
from quant_core.metrics.psnr import mean_with_ci
from quant_spec.enums import SampleSpace


@dataclass(frozen=True, slots=True)
class Measured:
    """A job's figures by seed: PSNR (n,) in dB, features (n, D) of its samples and of full precision, all float64."""

    name: str
    psnr: Tensor
    features: Tensor
    reference: Tensor


def read_job(home: Path, job: str, extractor: ResizedFeatures) -> Measured:
    """Read the samples of a job and take their features."""
    records = Records(home, job)
    [(release, _)] = records.of("release")
    [(score, _)] = records.of("score")
    evaluations, references = records.shards("evaluate"), records.shards("reference")
    truth = torch.cat([records.tensor(references[first], "sample") for first in evaluations])
    made, psnr = (
        torch.cat([records.tensor(digest, name) for digest in evaluations.values()]) for name in ("sample", "psnr_db")
    )
    assert len(psnr) == score["seeds"]["count"], "shards of all seeds"
    space = SampleSpace(score["samples"])
    reference, features = (_features(to_rgb(images, truth, space), extractor) for images in (truth, made))
    return Measured(f"{release['recipe']['name']} ({records.job[:12]})", psnr, features, reference)


@torch.no_grad()
def _features(images: Tensor, extractor: ResizedFeatures) -> Tensor:
    return torch.cat([extractor(batch) for batch in images.split(BATCH)]).double()


def frechet(reference: Tensor, features: Tensor) -> float:
    """Return the Fréchet distance of two sets of features, (n, D) each, n below D.

    The trace of the root of the product of covariances is the sum of singular values of X Y^T, with X and Y the centred
    features over the root of n - 1: exact, and of size n instead of D.
    """
    means = [values.mean(dim=0) for values in (reference, features)]
    x, y = (
        (values - mean) / math.sqrt(len(values) - 1) for values, mean in zip((reference, features), means, strict=True)
    )
    shift = float((means[0] - means[1]).square().sum())
    return shift + float(x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum())


def compare(base: Measured, other: Measured, draws: int, seed: int) -> dict[str, Any]:
    """Return how `other` differs from `base`, with 95 % intervals."""
    generator = torch.Generator().manual_seed(seed)
    n = len(base.psnr)
    gain = mean_with_ci((other.psnr - base.psnr).tolist())
    found = []
    for _ in range(draws):
        pick = torch.randint(n, (n,), generator=generator)
        found.append(
            frechet(other.reference[pick], other.features[pick]) - frechet(base.reference[pick], base.features[pick])
        )
    low, high = torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist()
    distances = [frechet(each.reference, each.features) for each in (base, other)]
    return {
        "psnr_db_difference": round(gain.value, 4),
        "psnr_db_difference_ci95": round(gain.ci95, 4),
        "fd_difference": round(distances[1] - distances[0], 4),
        "fd_difference_interval": [round(low, 4), round(high, 4)],
        "fd_share_below": round(sum(value < 0 for value in found) / max(draws, 1), 4),
    }


def main() -> None:
    """Print one JSON document."""
    options = parser(__doc__)
    options.add_argument("--home", type=Path, required=True)
    options.add_argument("--draws", type=int, default=500)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("jobs", nargs="+")
    arguments = options.parse_args()
    extractor = efficientnet_lite0()
    rows = []
    base: Measured | None = None
    for job in arguments.jobs:
        measured = read_job(arguments.home, job, extractor)
        base = base or measured
        psnr = mean_with_ci(measured.psnr.tolist())
        row: dict[str, Any] = {
            "job": measured.name,
            "n": psnr.n,
            "psnr_db": round(psnr.value, 4),
            "psnr_db_ci95": round(psnr.ci95, 4),
            "fd": round(frechet(measured.reference, measured.features), 4),
        }
        if measured is not base:
            row |= compare(base, measured, arguments.draws, arguments.seed)
        sys.stderr.write(f"{row}\n")
        rows.append(row)
    give({"draws": arguments.draws, "seed": arguments.seed, "rows": rows})


if __name__ == "__main__":
    main()
