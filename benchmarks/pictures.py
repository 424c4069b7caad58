"""Samples of jobs of one home, from the same seeds, one row of pictures each, full precision's first.

    python -m benchmarks.pictures --home FOLDER --out docs/NAME.png "plain W2A4=JOB" "mpqdm-w2a4=JOB" ...

Samples are those that the jobs' evaluations recorded: nothing is sampled again, and no seed is chosen. Those of a
pipeline have their prompts below them.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.cli import named, parser
from benchmarks.records import Records
from quant_core.metrics.images import to_rgb
from quant_spec.pipeline import sample_space

#: Pixels of a pixel, of the row's name above it, between rows, and of a line of a prompt.
ZOOM, TITLE, GAP, LINE = 2, 16, 4, 13
#: Pixels of a letter of PIL's font, at most on average.
_LETTER = 6.2


def samples(records: Records, count: int) -> tuple[Tensor, Tensor]:
    """Return full precision's and the job's samples of the first seeds, each (count, C, H, W)."""
    evaluations, references = records.shards("evaluate"), records.shards("reference")
    first = min(evaluations)
    return records.tensor(references[first], "sample", count), records.tensor(evaluations[first], "sample", count)


def prompts(records: Records, count: int) -> list[str]:
    """Return what a pipeline was told for the first seeds; nothing for a bare denoiser."""
    _, outputs = next(iter(records.of("score")))
    shown = json.loads(records.path(outputs["score"]).read_text()).get("shown_prompts", [])
    return list(shown[:count])


def row(images: Tensor) -> Image.Image:
    """Put samples (N, C, H, W) side by side."""
    pixels = ((to_rgb(images, images, sample_space(images.shape[1:])) + 1) * 127.5).round().byte()
    wide = torch.cat(list(pixels), dim=2).permute(1, 2, 0)
    picture = Image.fromarray(wide.numpy())
    return picture.resize((picture.width * ZOOM, picture.height * ZOOM), Image.Resampling.NEAREST)


def sheet(rows: dict[str, Image.Image], texts: list[str]) -> Image.Image:
    """Put named rows below each other, and a text below each column."""
    first = next(iter(rows.values()))
    column = first.width // max(1, len(texts))
    wrapped = [textwrap.wrap(text, int(column / _LETTER)) for text in texts]
    foot = LINE * max(map(len, wrapped), default=0)
    page = Image.new("RGB", (first.width, (first.height + TITLE + GAP) * len(rows) + foot), "white")
    draw = ImageDraw.Draw(page)
    for place, (name, picture) in enumerate(rows.items()):
        top = place * (first.height + TITLE + GAP)
        draw.text((2, top + 2), name, fill="black")
        page.paste(picture, (0, top + TITLE))
    for place, lines in enumerate(wrapped):
        draw.multiline_text((place * column + 2, page.height - foot - GAP), "\n".join(lines), fill="black", spacing=2)
    return page


def main() -> None:
    """Write one PNG."""
    options = parser(__doc__)
    options.add_argument("--home", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--seeds", type=int, default=16)
    options.add_argument("jobs", nargs="+", metavar="NAME=JOB")
    arguments = options.parse_args()
    rows: dict[str, Image.Image] = {}
    texts: list[str] = []
    for name, job in named(arguments.jobs).items():
        records = Records(arguments.home, job)
        reference, made = samples(records, arguments.seeds)
        texts = texts or prompts(records, arguments.seeds)
        rows.setdefault("full precision", row(reference))
        rows[name] = row(made)
    sheet(rows, texts).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
