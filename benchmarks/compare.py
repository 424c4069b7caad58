"""Compare jobs of one home that were evaluated on the same seeds, each with the first: paired by seed.

    python -m benchmarks.compare --home FOLDER JOB JOB ... > benchmarks/results/NAME.json

The difference of PSNR has an interval by Student's t over seeds. That of the feature distance (Fréchet, same seeds) has
one from its spread over random halves of the seeds, the same for both jobs, which is the spread of the whole's
(delete-d jackknife; Shao and Wu, 1989). A bootstrap draws seeds twice, which lowers the rank of features that are fewer
than their dimensions and so moves every distance: its percentiles need not hold the estimate. Samples are those that
the jobs' evaluations recorded, so nothing is sampled again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cli import give, parser
from benchmarks.records import Records
from quant_core.metrics.frechet import (
    ResizedFeatures,
    efficientnet_lite0,
    frechet_distance,
    kernel_distance,
    sample_features,
)
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
    reference, features = (
        sample_features(to_rgb(images, truth, space), extractor).double() for images in (truth, made)
    )
    return Measured(f"{release['recipe']['name']} ({records.job[:12]})", psnr, features, reference)


def compare(base: Measured, other: Measured, draws: int, seed: int) -> dict[str, Any]:
    """Return how `other` differs from `base`, with 95 % intervals."""
    generator = torch.Generator().manual_seed(seed)
    n = len(base.psnr)
    gain = mean_with_ci((other.psnr - base.psnr).tolist())
    found = []
    for _ in range(draws):
        pick = torch.randperm(n, generator=generator)[: n // 2]
        found.append(
            frechet_distance(other.reference[pick], other.features[pick])
            - frechet_distance(base.reference[pick], base.features[pick])
        )
    distances = [frechet_distance(each.reference, each.features) for each in (base, other)]
    difference = distances[1] - distances[0]
    half_width = 1.96 * float(torch.tensor(found, dtype=torch.float64).std())
    kernels = [kernel_distance(each.reference, each.features) for each in (base, other)]
    return {
        "psnr_db_difference": round(gain.value, 4),
        "psnr_db_difference_ci95": round(gain.ci95, 4),
        "fd_difference": round(difference, 4),
        "fd_difference_interval": [round(difference - half_width, 4), round(difference + half_width, 4)],
        "kid_difference": round(kernels[1] - kernels[0], 6),
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
            "fd": round(frechet_distance(measured.reference, measured.features), 4),
            "kid": round(kernel_distance(measured.reference, measured.features), 6),
        }
        if measured is not base:
            row |= compare(base, measured, arguments.draws, arguments.seed)
        sys.stderr.write(f"{row}\n")
        rows.append(row)
    give({"draws": arguments.draws, "seed": arguments.seed, "rows": rows})


if __name__ == "__main__":
    main()
