"""Releases exported as GGUF and loaded by diffusers, beside the releases and what GGUF's own rounding makes.

    quantmill run gguf-w8 --model emoji-sd3 --prompts examples/prompts/emoji.txt --name w8 ...
    quantmill artifacts pull w8 w8-release; quantmill artifacts export w8 --format gguf --out w8-gguf
    python -m benchmarks.gguf_export --model examples/models/emoji-sd3 --prompts examples/prompts/emoji.txt \\
        --release gguf-w8=w8-release --export gguf-w8=w8-gguf --out benchmarks/results/gguf-emoji-sd3.json

Each release is drawn with by diffusers' own loaders, packed and from the exported file; and so is a file with the same
types of block of the same layers, whose weights the package gguf rounded (ggml's reference, which sees the weights
alone). All are called in float32 with the same prompts, which calibration did not see, and the same generators; images
are compared with those of full precision. `bytes` are of the denoiser's file. `worst` is the greatest change of a
weight by the export and diffusers' float16, as a share of its row's greatest; `gain_db` what the exported file has more
than GGUF's own rounding, by pairs of images.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import gguf
import numpy as np
import torch
from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

from benchmarks.cli import give, keep, named, parser
from benchmarks.other_tools import FIRST_SEED, Images, compare, drawing, known, load
from quant_core.artifact.dequantize import dequantized_state
from quant_core.artifact.gguf_file import GGUF_FILE
from quant_spec.prompts import PromptPart, read_prompts, select_part

PART = "transformer"
_FLOATS = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)


def load_gguf(file: Path, around: Path) -> Any:
    """Load a file as a user of diffusers does, with the rest of a pipeline."""
    told = {"config": str(around), "subfolder": PART, "torch_dtype": torch.float32}
    cls = getattr(diffusers, json.loads((around / PART / "config.json").read_text())["_class_name"])
    kind = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    denoiser = cls.from_single_file(str(file), quantization_config=kind, **told)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(around, **{PART: denoiser}, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def round_again(exported: Path, model: Any, file: Path) -> None:
    """Write the file that the package gguf's rounding of a model's weights gives, in the types of another file."""
    weights = model.state_dict()
    writer = gguf.GGUFWriter(file, "diffusers")
    for tensor in gguf.GGUFReader(exported).tensors:
        values = weights[tensor.name].float().numpy()
        data = gguf.quants.quantize(values, tensor.tensor_type)
        writer.add_tensor(tensor.name, data, raw_dtype=None if tensor.tensor_type in _FLOATS else tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def worst_change(release: Any, exported: Any) -> float:
    """Return the greatest difference of weights between a release and its export, of the greatest in a row."""
    wanted, worst = dequantized_state(release), 0.0
    for name, value in exported.state_dict().items():
        if hasattr(value, "quant_type"):
            off = (dequantize_gguf_tensor(value).float() - wanted[name]).abs().amax(dim=1)
            worst = max(worst, float((off / wanted[name].abs().amax(dim=1).clamp(min=1e-12)).max()))
    return worst


def gain(images: Images, others: Images, reference: Images) -> dict[str, float]:
    """Return how much closer images are than others, in dB, by pairs; and its 95 % interval's half-width."""
    one, other = (((each - reference) ** 2).mean(axis=(1, 2, 3)) for each in (images, others))
    pairs = 10 * np.log10(other / one)
    half = 1.96 * float(pairs.std(ddof=1)) / math.sqrt(len(pairs))
    return {"gain_db": round(float(pairs.mean()), 3), "gain_db_ci95": round(half, 3)}


def main() -> None:
    """Measure every release and write one JSON document."""
    options = parser(__doc__)
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--prompts", type=Path, required=True)
    options.add_argument("--release", action="append", default=[], metavar="NAME=FOLDER")
    options.add_argument("--export", action="append", default=[], metavar="NAME=FOLDER")
    options.add_argument("--seeds", type=int, default=16)
    options.add_argument("--out", type=Path, required=True, help="what it has already is kept, if measured alike")
    given = options.parse_args()
    torch.set_num_threads(1)
    protocol = {"steps": 20, "guidance": 4.0, "side": 64, "max_sequence_length": 24, "batch": 16}
    draw, seeds = drawing(Namespace(**protocol)), range(FIRST_SEED, FIRST_SEED + given.seeds)
    lines = select_part(read_prompts(given.prompts.read_bytes(), given.prompts.name), PromptPart.EVALUATION)
    full = load(given.model)
    reference, plain = draw(full, lines, seeds), getattr(full, PART)
    versions = {each: metadata.version(each) for each in ("torch", "diffusers", "gguf", "quantmill")}
    size16 = sum(value.numel() * 2 for value in plain.state_dict().values())
    document = {"model": given.model.name, **protocol, "seeds": given.seeds, "bytes_fp16": size16, "versions": versions}
    results: dict[str, Any] = known(given.out, document)
    exports = named(given.export)
    for name, folder in named(given.release).items():
        exported, file = Path(exports[name]), Path(exports[name], PART, GGUF_FILE)
        reader = gguf.GGUFReader(file)
        release, loaded = load(Path(folder)), load_gguf(file, exported)
        images = draw(loaded, lines, seeds)
        with TemporaryDirectory() as scratch:
            round_again(file, plain, Path(scratch, GGUF_FILE))
            again = draw(load_gguf(Path(scratch, GGUF_FILE), exported), lines, seeds)
        kinds = [tensor.tensor_type.name for tensor in reader.tensors]
        packed = sum(each.stat().st_size for each in Path(folder, PART).glob("*.safetensors"))
        results[name] = {
            "digest": reader.fields["quantmill.artifact"].contents(),
            "release": {**compare(draw(release, lines, seeds), reference), "bytes": packed},
            "gguf": {**compare(images, reference), "bytes": file.stat().st_size},
            "gguf's own rounding": compare(again, reference),
            **gain(images, again, reference),
            "types": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
            "worst": round(worst_change(release.transformer, loaded.transformer), 6),
        }
        keep({**document, "results": results}, given.out)
    give({**document, "results": results}, given.out)


if __name__ == "__main__":
    main()
