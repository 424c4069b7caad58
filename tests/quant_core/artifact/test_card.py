from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from quant_core.artifact.card import CardContent, add_speed, check_metrics, render_card
from quant_core.errors import ArtifactError
from quant_spec.metrics import METRICS as METRICS_TABLE

METRICS: dict[str, Any] = {
    "psnr_db": 33.25,
    "psnr_db_ci95": 0.5,
    "fd": 1.5,
    "fd_extractor": "efficientnet-lite0",
    "n": 256,
    "weight_bits_mean": 4.125,
    "act_bits_mean": 8.0,
    "bytes": 3 << 20,
    "bytes_fp16": 9 << 20,
    "bops": 1.0e9,
    "bops_fp32": 3.2e10,
    "sqnr_db_per_step": [30.0, 20.5, 25.0],
    "sampler": {"scheduler": "DDIMScheduler", "num_inference_steps": 20, "eta": 0.0},
    "first_seed": 0,
}
CONTENT = CardContent("owner/emoji", "fast-w4a8", {"_class_name": "UNet2DModel"}, METRICS, "apache-2.0")


def test_the_head_is_what_the_hub_reads() -> None:
    card = ModelCard(render_card(CONTENT))
    data = card.data.to_dict()
    assert data["base_model"] == "owner/emoji"
    assert data["base_model_relation"] == "quantized"
    assert data["library_name"] == "diffusers"
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert data["tags"] == ["quantization", "quantmill", "w4a8", "fast-w4a8"]
    results = {result.metric_type: result for result in card.data["eval_results"]}
    assert results["psnr"].metric_value == 33.25
    assert results["fd"].metric_value == 1.5
    assert results["fd"].metric_name == "Feature distance, same seeds, efficientnet-lite0"
    assert results["psnr"].dataset_name == "samples of 256 seeds"


def test_the_body_has_figures_protocol_and_how_to_load() -> None:
    text = render_card(CONTENT)
    assert "| weights, MiB | 3.00 | 9.00 (fp16) |" in text
    assert "| PSNR, dB (95 % interval) | 33.25 (32.75 to 33.75) | – |" in text
    assert "| SQNR of the prediction, dB, worst step | 20.50 | – |" in text
    assert '- sampler: {"eta": 0.0, "num_inference_steps": 20, "scheduler": "DDIMScheduler"}' in text
    assert "- first seed: 0\n- n: 256\n" in text
    assert 'UNet2DModel.from_pretrained("FOLDER")' in text
    assert "None" not in text
    assert "{{" not in text


def test_a_text_conditioned_model_is_tagged_so() -> None:
    config = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768}
    assert ModelCard(render_card(replace(CONTENT, config=config))).data["pipeline_tag"] == "text-to-image"


def test_an_unknown_license_is_left_out() -> None:
    assert ModelCard(render_card(replace(CONTENT, license=None))).data.get("license") is None


def test_the_card_is_the_same_every_time() -> None:
    shuffled = dict(reversed(METRICS.items()))
    assert render_card(CONTENT) == render_card(replace(CONTENT, metrics=shuffled))


@pytest.mark.parametrize("missing", [name for name, metric in METRICS_TABLE.items() if metric.is_required])
def test_a_figure_without_its_protocol_is_refused(missing: str) -> None:
    with pytest.raises(ArtifactError, match=f"metrics: got none of {missing};"):
        check_metrics({name: value for name, value in METRICS.items() if name != missing})


def test_the_protocol_is_what_is_not_a_figure() -> None:
    assert list(check_metrics(METRICS)) == ["fd_extractor", "first_seed", "n", "sampler"]


def test_a_corrected_release_says_how_to_sample() -> None:
    plain, corrected = render_card(CONTENT), render_card(replace(CONTENT, corrected=True))
    added = [line for line in corrected.splitlines() if line not in plain.splitlines()]
    assert added == [
        "# corrects the model's predictions before the sampler uses them",
        'scheduler = quant_core.QuantmillCorrectedScheduler.from_pretrained("FOLDER", subfolder="scheduler")',
    ]
    assert [line for line in corrected.splitlines() if line not in added] == plain.splitlines()


def test_a_measurement_goes_before_the_limits_and_replaces_an_earlier_one() -> None:
    figures = {
        "step_ms": {"1": 2.0, "8": 9.5},
        "images_per_second": 3.0,
        "peak_memory_bytes": 3 << 20,
        "bytes": 1 << 20,
    }
    bench = {
        "device": "H200",
        "threads": 4,
        "backend": "triton",
        "way": "CUDA graph",
        "compiled_way": None,
        "release_figures": figures,
        "original_figures": figures | {"bytes": 8 << 20},
        "bf16_figures": figures | {"peak_memory_bytes": None},
        "bf16_compiled_figures": None,
    }
    plain = render_card(CONTENT)
    card = add_speed(plain, bench)
    before, limits = plain.split("## Limits")
    assert card.startswith(before)
    assert card.endswith(f"\n## Limits{limits}")
    said = "Measured by `quantmill bench` on H200, 4 threads, triton backend."
    assert f"{said} Each step is replayed from a CUDA graph.\n" in card
    blocks = add_speed(plain, bench | {"way": "eager", "compiled_way": "by block"})
    assert f"{said} What is compiled are the blocks that the original repeats.\n" in blocks
    assert f"{said}\n" in add_speed(plain, bench | {"way": "eager", "compiled_way": "whole"})
    assert (
        "| | this model | float32 | bfloat16 |\n|---|---|---|---|\n| one step, batch 1, ms | 2.00 | 2.00 | 2.00 |"
        in card
    )
    assert "| peak memory, MiB | 3 | 3 | – |\n| weights, MiB | 1.00 | 8.00 | 1.00 |" in card
    again = add_speed(card, bench | {"device": "A100"})
    assert "H200" not in again
    assert again.replace("A100", "H200") == card
    assert add_speed("# x\n", bench).startswith("# x\n\n## Speed and memory\n")
