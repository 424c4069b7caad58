"""The model card of a release, made with huggingface_hub's ModelCard from what the release records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from quant_core.errors import ArtifactError
from quant_spec.metrics import Listing, Place, lines, missing, protocol
from quant_spec.prompts import ARRAY
from quant_spec.tasks.bench import BENCHED, BY_BLOCK, GRAPH

_SPEED_HEAD, _LIMITS_HEAD = "## Speed and memory", "## Limits"
_TEXT_INPUTS = ("cross_attention_dim", "caption_channels", "joint_attention_dim")
_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

A {{ made }} with packed low-bit weights ({{ label }}), made from `{{ base_model }}` by Quantmill with the recipe
`{{ recipe }}`.

## Use

```python
import quant_core  # registers the method with diffusers
{% if pipeline -%}
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER")
{{ call }}
{% else -%}
from diffusers import {{ class_name }}

model = {{ class_name }}.from_pretrained("FOLDER")
# or: verified against manifest.json
model = quant_core.load_quantized("FOLDER")
{% if corrected -%}
# corrects the model's predictions before the sampler uses them
scheduler = quant_core.QuantmillCorrectedScheduler.from_pretrained("FOLDER", subfolder="scheduler")
{% endif -%}
{% endif -%}
```

Sample with the scheduler in `scheduler/` and the settings below: activation ranges belong to the timesteps of that
trajectory.

## Quality and size

| | this model | full precision |
|---|---|---|
{% for row in table -%}
| {{ row | join(" | ") }} |
{% endfor %}
PSNR compares samples of the same seeds; the Fréchet distance is between the two sets of samples.

{% if prompts -%}
### Prompts

The first samples were told, in order: {{ prompts | join("; ") }}.

Farthest from full precision:

| prompt | seed | PSNR, dB |
|---|---|---|
{% for each in worst -%}
| {{ each.prompt }} | {{ each.seed }} | {{ "%.2f" | format(each.psnr_db) }} |
{% endfor %}
{% endif -%}
## Protocol

{% for name, value in protocol -%}
- {{ name }}: {{ value }}
{% endfor %}
## Limits

It is as biased as the model that it was made from. How far it is from that is known for the protocol above only.
`recipe.json` has every setting of the method, `provenance.json` what it was made from, `metrics.json` all figures.
"""


@dataclass(frozen=True, slots=True)
class CardContent:
    """What a card says.

    `base_model` is the Hub's `owner/name`, or the registered name of a model that is not from there; `config` is the
    denoiser's config.json; `license` is the base model's, None if not known; `corrected` says whether the scheduler is
    a `QuantmillCorrectedScheduler`; `pipeline` is the `model_index.json` of a whole pipeline.
    """

    base_model: str
    recipe: str
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    license: str | None = None
    corrected: bool = False
    pipeline: Mapping[str, Any] | None = None


def render_card(content: CardContent) -> str:
    """Return README.md of a release.

    Raises
    ------
    ArtifactError
        If a figure is missing, or the figures come without their protocol.
    """
    settings = check_metrics(content.metrics)
    metrics = content.metrics
    label = f"W{round(metrics['weight_bits_mean'])}A{round(metrics['act_bits_mean'])}"
    title = f"{content.base_model.rpartition('/')[2]}, {content.recipe}"
    task = "text-to-image" if any(content.config.get(key) for key in _TEXT_INPUTS) else "unconditional-image-generation"
    data = ModelCardData(
        base_model=content.base_model,
        base_model_relation="quantized",
        library_name="diffusers",
        license=content.license,
        pipeline_tag=task,
        tags=["quantization", "quantmill", label.lower(), content.recipe],
        model_name=title,
        eval_results=_eval_results(metrics, task),
    )
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=title,
        class_name=content.config["_class_name"],
        made=_made(content),
        pipeline=content.pipeline is not None,
        call="" if content.pipeline is None else _call(metrics),
        base_model=content.base_model,
        recipe=content.recipe,
        label=label,
        corrected=content.corrected,
        prompts=[_cell(prompt) for prompt in metrics.get("shown_prompts", ())],
        worst=[each | {"prompt": _cell(each["prompt"])} for each in metrics.get("worst_prompts", ())],
        table=list(lines(Place.CARD, metrics).values()),
        protocol=[(name.replace("_", " "), _plain(value)) for name, value in settings.items()],
    )
    return str(card).rstrip("\n") + "\n"


def _made(content: CardContent) -> str:
    """Return what a release is: its class, or its pipeline's and which component of that is quantized."""
    name = str(content.config["_class_name"])
    return name if content.pipeline is None else f"{content.pipeline['_class_name']} whose {name} is quantized,"


def _call(metrics: Mapping[str, Any]) -> str:
    """Return a call of a pipeline with the settings that it was calibrated with."""
    sampler = metrics["sampler"]
    told = (metrics.get("worst_prompts") or [{"prompt": "…"}])[-1]["prompt"]
    is_label = told.startswith("class ") and told.removeprefix("class ").isdecimal()
    files = metrics.get("prompts", {}).get("files", [])
    is_file = bool(files) and told.split(", ")[0].endswith(ARRAY)  # a line of files alone is named after them
    given = [] if is_file else [json.dumps(told, ensure_ascii=False)]
    given = [f"class_labels=[{told.removeprefix('class ')}]"] if is_label else given
    given += [f"{name}=…" for name in files]
    settings = {"num_inference_steps": sampler["num_inference_steps"], "guidance_scale": sampler["guidance_scale"]}
    settings |= sampler.get("arguments", {})
    given += [f"{name}={value!r}" for name, value in settings.items()]
    return f"images = pipeline({', '.join(given)})[0]" if files else f"images = pipeline({', '.join(given)}).images"


def _cell(text: str) -> str:
    """Return a prompt as it may stand in a table of Markdown, in one line."""
    return " ".join(text.split()).translate({ord(letter): f"\\{letter}" for letter in "|`<>[]*_"})


def add_speed(card: str, bench: Mapping[str, Any]) -> str:
    """Return a card with what `quantmill bench` measured, before its limits; an earlier measurement is replaced.

    Parameters
    ----------
    card : str
        As from `render_card`.
    bench : mapping
        `device`, `threads`, `backend`, `way` and `compiled_way` (`quant_spec.tasks.bench`), and of each model in
        `BENCHED` its figures, or None.
    """
    figures = {label: bench[name] for label, name in BENCHED.items() if bench.get(name) is not None}
    batches = list(next(iter(figures.values()))["step_ms"])
    rows = [
        (f"one step, batch {batch}, ms", [f"{each['step_ms'][batch]:.2f}" for each in figures.values()])
        for batch in batches
    ]
    rows.append(("images per second", [f"{each['images_per_second']:.3g}" for each in figures.values()]))
    where = f"{bench['device']}, {bench['threads']} threads"
    how = " Each step is replayed from a CUDA graph." if bench["way"] == GRAPH else ""
    how += " What is compiled are the blocks that the original repeats." if bench["compiled_way"] == BY_BLOCK else ""
    peaks = [each["peak_memory_bytes"] for each in figures.values()]
    rows.append(("peak memory, MiB", ["–" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks]))
    rows.append(("weights, MiB", [f"{each['bytes'] / 2**20:.2f}" for each in figures.values()]))
    lines = [
        _SPEED_HEAD,
        "",
        f"Measured by `quantmill bench` on {where}, {bench['backend']} backend.{how}",
        "",
        f"| | {' | '.join(figures)} |",
        f"|{'---|' * (len(figures) + 1)}",
        *(f"| {name} | {' | '.join(values)} |" for name, values in rows),
    ]
    before, found, rest = card.partition(f"\n{_SPEED_HEAD}\n")
    before, limits = (before, rest[rest.index(_LIMITS_HEAD) :]) if found else _split_before(card, _LIMITS_HEAD)
    return f"{before.rstrip()}\n\n" + "\n".join(lines) + f"\n\n{limits}"


def _split_before(text: str, head: str) -> tuple[str, str]:
    """Split where a line begins with `head`; at the end if none does."""
    place = text.find(f"\n{head}")
    return (text, "") if place < 0 else (text[:place], text[place + 1 :])


def check_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the protocol in a release's metrics, sorted by name; ArtifactError if that or a figure is missing."""
    if names := missing(metrics):
        raise ArtifactError(f"metrics: got none of {', '.join(names)}; a figure is not stored without its protocol")
    return dict(sorted(protocol(Listing.CARD, metrics).items()))


def _eval_results(metrics: Mapping[str, Any], task: str) -> list[EvalResult]:
    """Return the figures in the Hub's form."""
    dataset = f"samples of {metrics['n']} seeds"
    return [
        EvalResult(
            task_type=task,
            dataset_type="generated",
            dataset_name=dataset,
            metric_type=kind,
            metric_name=label,
            metric_value=metrics[name],
        )
        for name, (label, kind) in lines(Place.HUB, metrics).items()
    ]


def _plain(value: Any) -> str:
    """Write a setting in one line."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
