"""Every parameter that a task is named by is read when its body runs, under every choice of the others.

Bodies run on the digits model, small: one task of each kind for each choice that decides which other parameters matter.
What is read is noted on the record itself, so a new field that nothing reads fails here, and so does one that matters
only under choices that its record does not know of. A field that is left out of the name may be read, but not matter.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from quant_core.fit.unit_state import UnitState
from quant_spec.allocation import Allocation, LayerChoice
from quant_spec.enums import (
    AllocationMethod,
    Extractor,
    KernelBackend,
    Objective,
    RangeMethod,
    RoundingMethod,
    SampleSpace,
    Scaling,
    Shift,
    StartCodes,
    StepBitsMethod,
    TemporalRounding,
    UnitInputs,
    UnknownTimestep,
    WeightCodes,
    Weighting,
)
from quant_spec.formats import WeightSpec
from quant_spec.kinds import KINDS
from quant_spec.planned import PlannedActivation, PlannedAttention, PlannedLayer, PlannedUnit, VariedLayer
from quant_spec.prompts import PromptPart
from quant_spec.ranges import RangeSpec
from quant_spec.record import Bits
from quant_spec.sampler import Sampler
from quant_spec.search import SearchBudget
from quant_spec.task import Seeds, TaskInputs, TaskKind, TaskParams
from quant_spec.tasks import (
    allocate,
    answer,
    bench,
    calibrate,
    card,
    channel_errors,
    choose,
    components,
    correct,
    differences,
    distill,
    encode,
    evaluate,
    exceptions,
    export,
    fuse,
    inspect,
    layer_table,
    layer_times,
    low_rank,
    menu,
    mix,
    noise,
    noop,
    pack,
    propose,
    reconstruct,
    reference,
    rehearse,
    release,
    round,
    scale,
    score,
    sensitivity,
    step_bits,
    step_effects,
    step_gains,
    temporal,
    text_encoder,
    trials,
)
from tests.tiny_pipelines import save_sd3
from workers.execution.context import TaskContext, TaskOutput
from workers.execution.execute import load_body
from workers.storage.model_folder import import_model
from workers.storage.store import open_cached

DIGITS = Path(__file__).parents[2] / "examples" / "models" / "digits"
SAMPLER = Sampler(scheduler="DDIMScheduler", num_inference_steps=2)
SD3 = Sampler(scheduler="FlowMatchEulerDiscreteScheduler", num_inference_steps=2, guidance_scale=4.0)
#: Units of the model that are quantized: one reads a concatenation, one has an attention, both layers of the temporal
#: information block or none.
UNITS = ("up_blocks.1.resnets.0", "up_blocks.1.attentions.0")
GROUP: dict[str, Any] = {"seed": 0, "forward_batch_size": 8}
#: Learning in two steps.
FEW: dict[str, Any] = {"iterations": 2}
MINMAX = RangeSpec()


def record_reads(params: TaskParams) -> tuple[TaskParams, set[str]]:
    """Return parameters as a worker reads them from JSON, and the set of names that fills as they are read."""
    cls, reads = type(params), set[str]()
    names = frozenset(cls.model_fields)

    class Recorded(cls):  # type: ignore[valid-type, misc]
        def __getattribute__(self, name: str) -> Any:
            if name in names:
                reads.add(name)
            return super().__getattribute__(name)

        def to_json(self) -> dict[str, Any]:
            before = set(reads)
            made: dict[str, Any] = super().to_json()
            reads.intersection_update(before)
            return made

    recorded = Recorded.from_json(params.to_json())
    reads.clear()
    return recorded, reads


def _other(value: float) -> float:
    """Return another value of a count or of a number."""
    return (1 if value > 1 else 2) if isinstance(value, int) else value / 2


class Tasks:
    """Runs tasks, each result once, and checks of each that all of its parameters are read."""

    def __init__(self, folder: Path) -> None:
        (folder / "store").mkdir()
        self.store = open_cached(str(folder / "store"), folder / "cache")
        self._scratch = (folder / f"scratch-{number}" for number in itertools.count())

    def run(self, kind: TaskKind, params: TaskParams, inputs: TaskInputs[str]) -> TaskOutput:
        """Run a body; AssertionError unless it reads what names the task, and nothing else makes a difference."""
        recorded, reads = record_reads(params)
        made = self._run(kind, recorded, inputs)
        named = set(params.to_json())
        assert named <= reads, f"{kind.name}: unread {sorted(named - reads)}"
        idle = reads - named - type(params)._omitted
        if idle:
            others = params.replaced(**{name: _other(getattr(params, name)) for name in idle})
            assert others.to_json() == params.to_json()
            found = self._run(kind, others, inputs)
            assert found.outputs == made.outputs, f"{kind.name}: one of {sorted(idle)} names no task and matters"
        return made

    def _run(self, kind: TaskKind, params: TaskParams, inputs: TaskInputs[str]) -> TaskOutput:
        scratch = next(self._scratch)
        scratch.mkdir()
        return load_body(kind)(params, inputs, TaskContext(self.store, "cpu", lambda: scratch, 1))

    @cached_property
    def model(self) -> str:
        """The digits model's tree."""
        return import_model(self.store, DIGITS).digest

    @cached_property
    def pipeline(self) -> str:
        """A whole pipeline's tree."""
        scratch = next(self._scratch)
        return import_model(self.store, save_sd3(scratch / "sd3")).digest

    @cached_property
    def prompts(self) -> str:
        """A prompts file."""
        return self.store.put_bytes(b"red heart\nred apple\n")

    @cached_property
    def embeddings(self) -> str:
        """What its first line encodes to."""
        return self.run(encode.KIND, *_encode()(self)).outputs[encode.EMBEDDINGS]

    @cached_property
    def inspection(self) -> dict[str, Any]:
        """What is known of the model."""
        made = self.run(inspect.KIND, inspect.Params(), inspect.Inputs(model=self.model))
        found: dict[str, Any] = made.metrics["inspection"]
        return found

    def layer(self, name: str, bits: int | None = 8, *, allocated: bool = False) -> PlannedLayer:
        """Describe a layer of the model to tasks: 4-bit weights."""
        split = self.inspection["layers"][name]["split"]
        activation = PlannedActivation(bits)
        return PlannedLayer(WeightSpec(4), MINMAX, activation, MINMAX, split and tuple(split), allocated)

    def units(self, bits: int | None = 8, *, allocated: bool = False) -> tuple[PlannedUnit, ...]:
        """Describe the units to tasks, without layers of the temporal information block."""
        block, units = self.inspection["temporal"], {unit["name"]: unit for unit in self.inspection["units"]}
        return tuple(
            PlannedUnit(
                name,
                {n: self.layer(n, bits, allocated=allocated) for n in units[name]["layers"] if n not in block},
                {n: PlannedAttention(PlannedActivation(8), MINMAX) for n in units[name]["attention"]},
            )
            for name in UNITS
        )

    @cached_property
    def calibration(self) -> tuple[str, ...]:
        """One shard."""
        params = calibrate.Params(sampler=SAMPLER, seeds=Seeds(first=10, count=2), batch_size=2, steps=None)
        made = self.run(calibrate.KIND, params, calibrate.Inputs(model=self.model))
        return (made.outputs[calibrate.CALIBRATION],)

    @cached_property
    def reference(self) -> str:
        """Samples of two seeds, with their trajectories."""
        params = reference.Params(sampler=SAMPLER, seeds=Seeds(first=0, count=2), batch_size=2, sqnr_seeds=2)
        made = self.run(reference.KIND, params, reference.Inputs(model=self.model))
        return made.outputs[reference.REFERENCE]

    @cached_property
    def block(self) -> str:
        """State of the temporal information block."""
        return self.run(temporal.KIND, *_temporal()(self)).outputs[temporal.STATE]

    @cached_property
    def states(self) -> tuple[str, ...]:
        """States of the units, rounded."""
        return tuple(self.run(round.KIND, *_round()(self)).outputs.values())

    @cached_property
    def menu(self) -> dict[str, str]:
        """The units at two widths."""
        return dict(self.run(menu.KIND, *_menu(method=RoundingMethod.CLOSED_FORM)(self)).outputs)

    def on_menu(self, output: str, width: int | str = "") -> tuple[str, ...]:
        """States of the menu, at one width or at all."""
        return tuple(digest for name, digest in self.menu.items() if name.startswith(f"{output}:{width}"))

    @cached_property
    def gains(self) -> str:
        """Gains of the steps."""
        return self.run(step_gains.KIND, *_step_gains()(self)).outputs[step_gains.GAINS]

    @cached_property
    def table(self) -> str:
        """What each choice does, in the units of the menu."""
        return self.run(sensitivity.KIND, *_sensitivity()(self)).outputs[sensitivity.TABLE]

    @cached_property
    def effects(self) -> str:
        """What bits of each step do."""
        return self.run(step_effects.KIND, *_step_effects()(self)).outputs[step_effects.EFFECTS]

    @cached_property
    def errors(self) -> str:
        """What bits of channels do."""
        return self.run(channel_errors.KIND, *_channel_errors()(self)).outputs[channel_errors.ERRORS]

    @cached_property
    def damages(self) -> str:
        """What quantizing each part does."""
        return self.run(trials.KIND, *_trials()(self)).outputs[trials.DAMAGES]

    @cached_property
    def packed(self) -> str:
        """The packed model."""
        return self.run(pack.KIND, *_pack()(self)).outputs[pack.PACKED]

    @cached_property
    def noise(self) -> str:
        """Noise of the packed model."""
        return self.run(noise.KIND, *_noise()(self)).outputs[noise.NOISE]

    @cached_property
    def evaluation(self) -> str:
        """Samples of the packed model."""
        return self.run(evaluate.KIND, *_evaluate()(self)).outputs[evaluate.EVALUATION]

    @cached_property
    def score(self) -> str:
        """Figures of the packed model."""
        return self.run(score.KIND, *_score()(self)).outputs[score.SCORE]

    @cached_property
    def artifact(self) -> str:
        """The release."""
        return self.run(release.KIND, *_release()(self)).outputs[release.ARTIFACT]


Case = Callable[[Tasks], tuple[TaskParams, TaskInputs[str]]]


def _inspect() -> Case:
    return lambda tasks: (inspect.Params(), inspect.Inputs(model=tasks.model))


def _calibrate(steps: int | None = None) -> Case:
    params = calibrate.Params(sampler=SAMPLER, seeds=Seeds(first=0, count=1), batch_size=1, steps=steps)
    return lambda tasks: (params, calibrate.Inputs(model=tasks.model))


def _reference(sqnr_seeds: int) -> Case:
    params = reference.Params(sampler=SAMPLER, seeds=Seeds(first=0, count=1), batch_size=1, sqnr_seeds=sqnr_seeds)
    return lambda tasks: (params, reference.Inputs(model=tasks.model))


def _temporal(**changes: Any) -> Case:
    settings = {"method": TemporalRounding.NEAREST} | changes

    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        layers = {name: tasks.layer(name) for name in tasks.inspection["temporal"]}
        params = temporal.Params(unit="@temporal", layers=layers, attentions={}, **settings)
        return params, temporal.Inputs(model=tasks.model, calibration=tasks.calibration)

    return case


def _scale(**changes: Any) -> Case:
    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        params = scale.Params(units=tasks.units(), **GROUP, **changes)
        return params, scale.Inputs(model=tasks.model, calibration=tasks.calibration)

    return case


def _low_rank(**changes: Any) -> Case:
    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        params = low_rank.Params(units=tasks.units(), positions=4, **GROUP, **changes)
        return params, low_rank.Inputs(model=tasks.model, calibration=tasks.calibration)

    return case


def _text_encoder(method: RoundingMethod = RoundingMethod.NEAREST) -> Case:
    told = {"sampler": SD3, "seeds": Seeds(first=0, count=2), "forward_batch_size": 2}

    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        params = text_encoder.Params(
            component="text_encoder_3",
            layer=PlannedLayer(WeightSpec(4), MINMAX),
            seed=0,
            method=method,
            **(told if method is RoundingMethod.CLOSED_FORM else {}),
        )
        return params, text_encoder.Inputs(model=tasks.pipeline, prompts=tasks.prompts)

    return case


def _components() -> Case:
    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        packed = tasks.run(text_encoder.KIND, *_text_encoder()(tasks)).outputs[text_encoder.ENCODER]
        return components.Params(components=("text_encoder_3",)), components.Inputs(tasks.pipeline, (packed,))

    return case


def _fuse() -> Case:
    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        name = "transformer.transformer_blocks.0.attn.to_q"
        lora = save({f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(16, 2)})
        return fuse.Params(scales=(0.5,)), fuse.Inputs(tasks.pipeline, (tasks.store.put_bytes(lora),))

    return case


def _round(**changes: Any) -> Case:
    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        params = round.Params(units=tasks.units(), **GROUP, **changes)
        return params, round.Inputs(model=tasks.model, calibration=tasks.calibration)

    return case


def _round_what_was_chosen(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
    step = tasks.run(step_bits.KIND, *_step_bits()(tasks)).outputs[step_bits.STEP_BITS]
    bits = tasks.run(allocate.KIND, *_allocate()(tasks)).outputs[allocate.ALLOCATION]
    factors = tuple(tasks.run(scale.KIND, *_scale(**FEW)(tasks)).outputs.values())
    inputs = round.Inputs(tasks.model, tasks.calibration, step_bits=step, factors=factors, allocation=bits)
    return round.Params(units=tasks.units(None, allocated=True), **GROUP), inputs


def _answer(**changes: Any) -> Case:
    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        inputs = answer.Inputs(model=tasks.model, calibration=tasks.calibration, states=tasks.states)
        ranges = {name: layer.weight_range for unit in tasks.units() for name, layer in unit.layers.items()}
        return answer.Params(seed=0, samples=2, positions=4, ranges=ranges, **changes), inputs

    return case


def _menu(**changes: Any) -> Case:
    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        params = menu.Params(units=tasks.units(), **GROUP, weight_bits=(3, 4), **changes)
        return params, menu.Inputs(model=tasks.model, calibration=tasks.calibration)

    return case


def _mix(**changes: Any) -> Case:
    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        units = tuple(
            mix.MixedUnit(
                unit=unit.unit,
                layers={name: mix.MixedLayer(weights=3, activations=(8,), **changes) for name in unit.layers},
                attentions={name: mix.MixedAttention(activations=(8,), softmax=8) for name in unit.attentions},
            )
            for unit in tasks.units()
        )
        inputs = mix.Inputs(*(tasks.on_menu(output) for output in (menu.WEIGHTS, menu.ACTIVATIONS, menu.ERRORS)))
        return mix.Params(units=units), inputs

    return case


def _choose(**changes: Any) -> Case:
    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        units = tuple(
            mix.MixedUnit(
                unit=unit.unit,
                layers={name: mix.MixedLayer(weights=4, activations=(8,)) for name in unit.layers},
                attentions={name: mix.MixedAttention(activations=(8,), softmax=8) for name in unit.attentions},
            )
            for unit in tasks.units()
        )
        weights = tuple(
            tasks.menu[menu.menu_output(menu.WEIGHTS, bits, unit.unit)] for unit in units for bits in (3, 4)
        )
        inputs = choose.Inputs((tasks.table,), weights, tasks.on_menu(menu.ACTIVATIONS))
        return choose.Params(units=units, widths=((3, 4),) * len(units), **changes), inputs

    return case


def _step_gains() -> Case:
    params = step_gains.Params(sampler=SAMPLER, seeds=Seeds(first=20, count=1), batch_size=1)
    return lambda tasks: (params, step_gains.Inputs(tasks.model, tasks.on_menu(menu.WEIGHTS, 4)))


def _sensitivity(**changes: Any) -> Case:
    settings: dict[str, Any] = {"path": 1, "rows": 1, "forward_batch_size": 8} | changes

    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        layers = {name: 1 for unit in tasks.units() for name in (*unit.layers, *unit.attentions)}
        inputs = sensitivity.Inputs(
            model=tasks.model,
            calibration=tasks.calibration,
            gains=tasks.gains,
            context=tasks.on_menu(menu.WEIGHTS, 4),
            weights=tasks.on_menu(menu.WEIGHTS),
            activations=tasks.on_menu(menu.ACTIVATIONS),
            errors=tasks.on_menu(menu.ERRORS),
        )
        return sensitivity.Params(units=UNITS, layers=layers, **settings), inputs

    return case


def _reconstruct(place: int = 0, **changes: Any) -> Case:
    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        params = reconstruct.Params(**GROUP, **FEW, cache_bytes=1 << 28, **changes)
        inputs = reconstruct.Inputs(model=tasks.model, calibration=tasks.calibration, state=tasks.states[place])
        if params.inputs is UnitInputs.QUANTIZED:
            inputs = replace(inputs, earlier=tasks.states[:place], temporal=tasks.block)
        return params, inputs

    return case


def _step_effects() -> Case:
    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        layers = {
            name: VariedLayer(layer.activation.symmetric, MINMAX, layer.split)
            for unit in tasks.units(None)
            for name, layer in unit.layers.items()
            if layer.activation is not None
        }
        seeds = Seeds(first=20, count=2)
        params = step_effects.Params(sampler=SAMPLER, seeds=seeds, batch_size=2, choices=(4, 8), layers=layers, seed=0)
        return params, step_effects.Inputs(model=tasks.model, calibration=tasks.calibration)

    return case


def _step_bits(**changes: Any) -> Case:
    return lambda tasks: (step_bits.Params(**changes), step_bits.Inputs(effects=(tasks.effects,)))


def _channel_errors() -> Case:
    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        units = tasks.units()
        names = tuple(name for unit in units for name in unit.layers)
        params = channel_errors.Params(units=units, layers=names, samples=2, positions=4, **GROUP)
        return params, channel_errors.Inputs(model=tasks.model, calibration=tasks.calibration)

    return case


def _allocate(**changes: Any) -> Case:
    return lambda tasks: (allocate.Params(**changes), allocate.Inputs(errors=(tasks.errors,)))


def _distill(**changes: Any) -> Case:
    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        params = distill.Params(seed=0, batch_size=2, **FEW, **changes)
        inputs = distill.Inputs(model=tasks.model, trajectories=(tasks.reference,), states=tasks.states)
        if params.effect:
            inputs = replace(inputs, gains=tasks.gains)
        return params, inputs

    return case


def _differences(**changes: Any) -> Case:
    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        formats = UnitState.from_bytes(tasks.store.get_bytes(tasks.states[-1])).formats
        layers = tuple(name for name, spec in formats.layers.items() if spec.activation is not None)
        params = differences.Params(layers=layers, seed=0, least_gain_db=0.0, samples=2, **changes)
        inputs = differences.Inputs(model=tasks.model, calibration=tasks.calibration, states=tasks.states)
        if params.by_effect:
            inputs = replace(inputs, gains=tasks.gains)
        return params, inputs

    return case


def _trials(**changes: Any) -> Case:
    settings: dict[str, Any] = {"batch_size": 1, "weights": False} | changes
    params = trials.Params(sampler=SAMPLER, seeds=Seeds(first=20, count=1), **settings)
    return lambda tasks: (params, trials.Inputs(tasks.model, tasks.states[-1:]))


def _exceptions(choices: tuple[Bits, ...] = ()) -> Case:
    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        formats = UnitState.from_bytes(tasks.store.get_bytes(tasks.states[-1])).formats
        macs = dict.fromkeys((*formats.layers, *formats.attentions), 10)
        inputs = exceptions.Inputs(tasks.model, tasks.states[-1:], (tasks.damages,))
        if not choices:
            return exceptions.Params(multiplications=0.5, macs=macs, all_macs=10 * len(macs)), inputs
        ranges = {name: RangeSpec(RangeMethod.MSE) for name, spec in formats.layers.items() if spec.activation}
        params = exceptions.Params(choices=choices, macs=macs, ranges=ranges, seed=1, forward_batch_size=2)
        return params, replace(inputs, calibration=tasks.calibration, gains=tasks.gains)

    return case


def _pack(**changes: Any) -> Case:
    return lambda tasks: (
        pack.Params(sampler=SAMPLER, **changes),
        pack.Inputs(model=tasks.model, states=(tasks.block, *tasks.states)),
    )


def _noise() -> Case:
    params = noise.Params(sampler=SAMPLER, batch_size=2)
    return lambda tasks: (params, noise.Inputs(packed=tasks.packed, reference=tasks.reference))


def _correct(**changes: Any) -> Case:
    params = correct.Params(channel_dim=1, **changes)
    return lambda tasks: (
        params,
        correct.Inputs(packed=tasks.packed, noise=(tasks.noise,), held_out=(tasks.noise,)),
    )


def _encode() -> Case:
    params = encode.Params(sampler=SD3, part=PromptPart.CALIBRATION, seeds=Seeds(first=0, count=2))
    return lambda tasks: (params, encode.Inputs(tasks.pipeline, tasks.prompts))


def _calibrate_pipeline() -> Case:
    params = calibrate.Params(
        sampler=SD3, seeds=Seeds(first=0, count=1), batch_size=1, steps=None, part=PromptPart.CALIBRATION
    )
    return lambda tasks: (params, calibrate.Inputs(tasks.pipeline, tasks.prompts, tasks.embeddings))


def _evaluate() -> Case:
    params = evaluate.Params(sampler=SAMPLER, seeds=Seeds(first=0, count=2), batch_size=2, samples=SampleSpace.PIXELS)
    return lambda tasks: (params, evaluate.Inputs(packed=tasks.packed, reference=tasks.reference))


def _score() -> Case:
    params = score.Params(
        sampler=SAMPLER,
        seeds=Seeds(first=0, count=2),
        sqnr_seeds=2,
        samples=SampleSpace.PIXELS,
        extractor=Extractor.EFFICIENTNET_LITE0,
        grid=1,
    )
    return lambda tasks: (
        params,
        score.Inputs(tasks.packed, references=(tasks.reference,), evaluations=(tasks.evaluation,), model=tasks.model),
    )


def _release() -> Case:
    params = release.Params(
        model=release.Origin(name="digits", class_name="UNet2DModel", source=None),
        recipe=release.ResolvedRecipe(name="recipe", digest="0" * 64, config={"seed": 0}),
    )
    return lambda tasks: (params, release.Inputs(tasks.packed, tasks.score, tasks.calibration, tasks.model))


def _export() -> Case:
    return lambda tasks: (export.Params(), export.Inputs(artifact=tasks.artifact))


def _bench(compiled: bool) -> Case:
    params = bench.Params(
        sampler=SAMPLER, batches=(1,), seconds=0.01, backend=KernelBackend.REFERENCE, compile=compiled
    )
    return lambda tasks: (params, bench.Inputs(artifact=tasks.artifact, model=tasks.model))


def _layers() -> Case:
    return lambda tasks: (
        layer_table.Params(backend=KernelBackend.REFERENCE),
        layer_table.Inputs(artifact=tasks.artifact),
    )


def _layer_times() -> Case:
    params = layer_times.Params(
        sampler=SAMPLER, weight_bits=(4,), activation_bits=(8,), seconds=0.01, backend=KernelBackend.REFERENCE
    )
    return lambda tasks: (params, layer_times.Inputs(artifact=tasks.artifact, model=tasks.model))


def _propose(**changes: Any) -> Case:
    weights = {str(bits): {"damage": 4.0**-bits, "bytes": 1000 * bits} for bits in (2, 4, 8)}
    entry = {
        "weights": weights,
        "activations": {},
        "parameters": 8000,
        "macs": 8000,
        "keep": {"damage": 0, "bytes": 32000},
    }
    table = {"layers": {"conv_in": entry, "conv_out": entry}, "base_bytes": 10, "unit": {}}
    table["unit"] = dict.fromkeys(("conv_in", "conv_out"), "conv_in")

    def case(tasks: Tasks) -> tuple[TaskParams, TaskInputs[str]]:
        given = {"budgets": (SearchBudget(bytes=9000),), "objective": Objective.PSNR_DB, "candidates": 4} | changes
        tables = (tasks.store.put_bytes(json.dumps(table).encode()),)
        return propose.Params(variants=("base",), **given), propose.Inputs(tables)

    return case


def _measured(width: int) -> propose.MeasuredPoint:
    layers = dict.fromkeys(("conv_in", "conv_out"), LayerChoice(weight_bits=width))
    return propose.MeasuredPoint(allocation=Allocation(layers=layers), psnr_db=6.0 * width, bytes=2000 * width + 10)


def _card() -> Case:
    figures = {"step_ms": {"1": 2.0}, "images_per_second": 1.0, "peak_memory_bytes": 1, "bytes": 1}
    sides = dict.fromkeys(("release_figures", "original_figures", "bf16_figures", "bf16_compiled_figures"), figures)
    ways = {"way": "eager", "compiled_way": "whole"}
    params = card.Params(bench=sides | ways | {"device": "a CPU", "threads": 1, "backend": "cpu", "layers": {"cpu": 1}})
    return lambda tasks: (params, card.Inputs(artifact=tasks.artifact))


def _rehearse() -> Case:
    params = rehearse.Params(sampler=Sampler(), scheduler_config={"_class_name": "DDIMScheduler"})
    return lambda _: (params, rehearse.Inputs())


def _noop(**changes: Any) -> Case:
    return lambda tasks: (noop.Params(**changes), noop.Inputs())


LEARNED: dict[str, Any] = FEW | {"method": Scaling.LEARNED}
#: By kind, tasks under every choice that decides which other parameters matter.
CASES: dict[str, dict[str, Case]] = {
    "inspect": {"": _inspect()},
    "encode": {"": _encode()},
    "calibrate": {"all steps": _calibrate(), "one step": _calibrate(1), "a pipeline": _calibrate_pipeline()},
    "reference": {"samples": _reference(0), "trajectories": _reference(1)},
    "temporal": {
        "nearest": _temporal(),
        "closed_form": _temporal(method=TemporalRounding.CLOSED_FORM),
        "reconstruct": _temporal(method=TemporalRounding.RECONSTRUCT, **FEW),
        "cache": _temporal(cache=True),
        "closed_form, cache": _temporal(method=TemporalRounding.CLOSED_FORM, cache=True),
        "reconstruct, cache": _temporal(method=TemporalRounding.RECONSTRUCT, cache=True, **FEW),
    },
    "scale": {
        "adaptive": _scale(**LEARNED),
        "early": _scale(**LEARNED, weighting=Weighting.EARLY),
        "uniform": _scale(**LEARNED, weighting=Weighting.UNIFORM),
        "nearest": _scale(**LEARNED, rounding=RoundingMethod.NEAREST),
        "held out": _scale(**LEARNED, held_out=0.5),
        "learned, skip": _scale(**LEARNED, shift=Shift.SKIP),
        "learned, variance": _scale(**LEARNED, shift=Shift.VARIANCE, least_spread=0.01),
        "smooth": _scale(method=Scaling.SMOOTH),
        "smooth, skip": _scale(method=Scaling.SMOOTH, shift=Shift.SKIP),
        "smooth, variance": _scale(method=Scaling.SMOOTH, shift=Shift.VARIANCE, least_spread=0.01),
        "skip": _scale(method=Scaling.NONE, shift=Shift.SKIP),
        "variance": _scale(method=Scaling.NONE, shift=Shift.VARIANCE, least_spread=0.01),
    },
    "low_rank": {
        "auto": _low_rank(smoothing="search", convolutions=True, max_rank=4),
        "given": _low_rank(rank=2, smoothing=0.5, convolutions=True, rounding=RoundingMethod.NEAREST),
    },
    "text_encoder": {"nearest": _text_encoder(), "closed_form": _text_encoder(RoundingMethod.CLOSED_FORM)},
    "components": {"": _components()},
    "round": {
        "nearest": _round(),
        "closed_form": _round(method=RoundingMethod.CLOSED_FORM),
        "what was chosen": _round_what_was_chosen,
    },
    "answer": {"": _answer(), "biases take the mean": _answer(correct_bias=True)},
    "menu": {
        "nearest": _menu(),
        "closed_form": _menu(method=RoundingMethod.CLOSED_FORM),
        "activations": _menu(activation_bits=(4,)),
    },
    "mix": {"": _mix(), "promoted": _mix(promoted=0.5, promoted_bits=4)},
    "choose": {
        "as many bytes": _choose(),
        "mean bits, one layer fixed": _choose(weight_bits_mean=3.9, fixed=("up_blocks.1.resnets.0.conv1",)),
        "bytes": _choose(bytes=25_000),
    },
    "step_gains": {"": _step_gains()},
    "sensitivity": {
        "one point": _sensitivity(),
        "promoted, ranges": _sensitivity(promoted=(0.5,), step_ranges=2, rows=4, path=0),
        "fixed, with the rest": _sensitivity(fixed={"up_blocks.1.resnets.0.conv1": 4}, counts_rest=True),
    },
    "reconstruct": {
        "rounding": _reconstruct(),
        "scales": _reconstruct(learn_activation_scales=True),
        "attention": _reconstruct(1),
        "from round": _reconstruct(start=StartCodes.ROUND),
        "quantized inputs": _reconstruct(1, inputs=UnitInputs.QUANTIZED),
        "no regulariser": _reconstruct(rounding_weight=0.0),
    },
    "step_effects": {"": _step_effects()},
    "step_bits": {
        "joint": _step_bits(),
        "joint, last": _step_bits(least_last=8),
        "effect": _step_bits(method=StepBitsMethod.EFFECT),
        "effect, last": _step_bits(method=StepBitsMethod.EFFECT, least_last=8),
        "snr": _step_bits(method=StepBitsMethod.SNR),
        "snr, threshold": _step_bits(method=StepBitsMethod.SNR, threshold=2.0),
        "early_low": _step_bits(method=StepBitsMethod.EARLY_LOW),
        "late_low": _step_bits(method=StepBitsMethod.LATE_LOW),
    },
    "channel_errors": {"": _channel_errors()},
    "allocate": {
        "kurtosis": _allocate(),
        "global": _allocate(method=AllocationMethod.GLOBAL),
        "kurtosis, extra": _allocate(extra=0.1),
    },
    "differences": {
        "one width": _differences(),
        "by range": _differences(range_bits=(6, 3)),
        "by effect": _differences(by_effect=True),
    },
    "distill": {
        "relations": _distill(),
        "predictions": _distill(relations=False),
        "by effect": _distill(effect=0.5),
        "frozen codes": _distill(codes=WeightCodes.FROZEN),
    },
    "trials": {"": _trials(), "weights too": _trials(weights=True)},
    "exceptions": {"": _exceptions(), "bits of inputs": _exceptions((4, 6, 8))},
    "pack": {"": _pack(), "nearest timestep": _pack(unknown_timestep=UnknownTimestep.NEAREST)},
    "noise": {"": _noise()},
    "correct": {
        "all": _correct(),
        "scale": _correct(bias=False, variance=False),
        "bias": _correct(scale=False, variance=False),
        "variance": _correct(scale=False, bias=False),
        "not held out": _correct(held_out=False),
        "none": _correct(scale=False, bias=False, variance=False),
    },
    "evaluate": {"": _evaluate()},
    "score": {"": _score()},
    "release": {"": _release()},
    "fuse": {"": _fuse()},
    "rehearse": {"": _rehearse()},
    "export": {"": _export()},
    "bench": {"": _bench(False)},
    "layers": {"": _layers()},
    "layer_times": {"": _layer_times()},
    "propose": {
        "": _propose(),
        "uniform, by unit": _propose(uniform=True, per_unit=True, keep=True),
        "measured": _propose(measured=(_measured(2), _measured(4)), seed=1),
        "latencies": _propose(
            budgets=(SearchBudget(latency_ms=3.0),),
            latency={name: {"2/8": 1.0, "4/8": 1.5, "8/8": 2.0} for name in ("conv_in", "conv_out")},
            latency_rest_ms=0.5,
        ),
    },
    "card": {"": _card()},
    "noop": {"": _noop(), "payload": _noop(payload=[1], seconds=0.01)},
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tasks]:
    """Tasks on the digits model, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Tasks(tmp_path_factory.mktemp("tasks"))
    torch.set_num_threads(before)


def test_every_kind_is_here() -> None:
    assert CASES.keys() == KINDS.keys()


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param(kind, case, id=f"{kind} {name}".strip())
        for kind, cases in CASES.items()
        for name, case in cases.items()
    ],
)
def test_parameters_that_name_a_task_are_read(tasks: Tasks, kind: str, case: Case) -> None:
    tasks.run(KINDS[kind], *case(tasks))


def test_a_parameter_that_nothing_reads_is_noticed(tasks: Tasks) -> None:
    class Params(noop.Params):
        new: int = 1

    kind = replace(noop.KIND, params=Params)
    with pytest.raises(AssertionError, match=r"noop: unread \['new'\]"):
        tasks.run(kind, Params(), noop.Inputs())


def test_writing_parameters_is_no_reading() -> None:
    recorded, reads = record_reads(noop.Params(payload=1))
    assert json.dumps(recorded.to_json()) == '{"payload": 1}'
    assert reads == set()
