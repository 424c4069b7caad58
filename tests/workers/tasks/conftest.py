"""A store, the shipped models in it, and task bodies run as a worker runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kernels.affine import quantize_affine
from quant_core.artifact.folder import write_artifact
from quant_core.diffusion.denoiser import load_denoiser
from quant_core.diffusion.sampler import make_scheduler
from quant_core.inspect.inspection import inspect_model
from quant_core.nn.layers import QUANTIZABLE, weight_matrix
from quant_core.nn.model import build_quantized
from quant_core.nn.ranges import qparams_from_range
from quant_spec.formats import LayerSpec, ModelFormat, WeightSpec
from quant_spec.kinds import KINDS
from quant_spec.quantization_config import quantization_config
from quant_spec.sampler import Sampler
from workers.execution.context import TaskOutput
from workers.execution.execute import TaskCall, execute_call
from workers.storage.manifest import put_tree
from workers.storage.model_folder import import_model
from workers.storage.store import NodeStore, open_cached

MODELS = Path(__file__).parents[3] / "examples" / "models"
SAMPLER = Sampler(scheduler="DDIMScheduler", num_inference_steps=3)

RunTask = Callable[..., TaskOutput]


@pytest.fixture(scope="session")
def task_store(tmp_path_factory: pytest.TempPathFactory) -> NodeStore:
    """A folder store that the tests of task bodies share: content-addressed, so they cannot disturb one another."""
    return open_cached(str(tmp_path_factory.mktemp("store")), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def run_task(task_store: NodeStore, tmp_path_factory: pytest.TempPathFactory) -> RunTask:
    """Run a task by its kind, in this process, on one thread; parameters that are not given have their defaults."""

    def run(kind: str, params: dict[str, Any], inputs: dict[str, list[str]]) -> TaskOutput:
        told = KINDS[kind].params.model_validate_json(json.dumps(params)).to_json()
        return execute_call(TaskCall(kind, told, inputs, task_store.url, str(tmp_path_factory.mktemp("cache"))))

    return run


@pytest.fixture(scope="session")
def digits(task_store: NodeStore) -> str:
    """The digest of the shipped digits model."""
    return import_model(task_store, MODELS / "digits").digest


@pytest.fixture(scope="session")
def packed_digits(task_store: NodeStore, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the digits model with weights rounded to 4 bits and packed."""
    return pack(MODELS / "digits", task_store, tmp_path_factory.mktemp("pack") / "packed")


def pack(model: Path, store: NodeStore, folder: Path) -> str:
    """Round a model's weights to 4 bits, pack it in a new folder, and return the digest of that."""
    denoiser = load_denoiser(model)
    weights = {n: m.weight.detach().clone() for n, m in denoiser.model.named_modules() if isinstance(m, QUANTIZABLE)}
    formats = ModelFormat({name: LayerSpec(WeightSpec(4)) for name in weights}, {})
    for name, layer in build_quantized(denoiser.model, formats).layers.items():
        matrix = weight_matrix(weights[name])
        grid = qparams_from_range(matrix.amin(1, keepdim=True), matrix.amax(1, keepdim=True), 4, symmetric=False)
        layer.set_codes(quantize_affine(matrix, grid.scale, grid.zero_point, 0, 15), grid.scale, grid.zero_point)
    scheduler = make_scheduler(SAMPLER, denoiser.scheduler_config)
    config = json.loads(scheduler.to_json_string())
    write_artifact(denoiser.model, dict(denoiser.config), quantization_config(formats), config, folder)
    return put_tree(store, folder)


@pytest.fixture(scope="session")
def reference_digits(run_task: RunTask, digits: str) -> list[str]:
    """Two shards of reference samples of the digits model: seeds 0 to 2, with trajectories of 2, and seed 3."""
    shards = [((0, 3), 2), ((3, 1), 0)]
    return [
        run_task("reference", {**protocol(*seeds), "sqnr_seeds": sqnr}, {"model": [digits]}).outputs["reference"]
        for seeds, sqnr in shards
    ]


def protocol(first: int, count: int, batch_size: int = 2) -> dict[str, Any]:
    """Return the parameters that tasks over seeds share."""
    return {"sampler": SAMPLER.to_json(), "seeds": {"first": first, "count": count}, "batch_size": batch_size}


@pytest.fixture(scope="session")
def seeds() -> Callable[..., dict[str, Any]]:
    """Return `protocol`."""
    return protocol


@pytest.fixture(scope="session")
def evaluated_digits(run_task: RunTask, packed_digits: str, reference_digits: list[str]) -> list[TaskOutput]:
    """The evaluations of the packed digits model on the two reference shards."""
    parameters = [protocol(0, 3) | {"samples": "pixels"}, protocol(3, 1) | {"samples": "pixels"}]
    return [
        run_task("evaluate", params, {"packed": [packed_digits], "reference": [digest]})
        for params, digest in zip(parameters, reference_digits, strict=True)
    ]


@pytest.fixture(scope="session")
def calibration_digits(run_task: RunTask, digits: str) -> list[str]:
    """Two calibration shards of the digits model: seeds 100 to 103 and 104 to 105, all 3 steps."""
    shards = [protocol(100, 4), protocol(104, 2)]
    return [
        run_task("calibrate", shard | {"steps": None}, {"model": [digits]}).outputs["calibration"] for shard in shards
    ]


@pytest.fixture(scope="session")
def digits_units() -> list[dict[str, Any]]:
    """Every unit of the digits model as the planner describes it to tasks: 4-bit weights, 8-bit activations."""
    inspection = inspect_model(load_denoiser(MODELS / "digits"))
    activation = {"bits": 8, "symmetric": False, "mode": "per_step"}
    ranges = {"weight_range": {"method": "mse"}, "activation_range": {"method": "minmax"}}
    weight = {"bits": 4, "symmetric": False, "granularity": "per_channel", "group_size": None}

    def layer(name: str) -> dict[str, Any]:
        return {"weight": weight, "activation": activation, "split": inspection["layers"][name]["split"], **ranges}

    matmuls = {"activation": activation, "activation_range": {"method": "minmax"}, "softmax_bits": 8}
    return [
        {
            "unit": unit["name"],
            "layers": {name: layer(name) for name in unit["layers"]},
            "attentions": dict.fromkeys(unit["attention"], matmuls),
        }
        for unit in inspection["units"]
    ]


COMMON = {"seed": 0, "forward_batch_size": 4}


@pytest.fixture(scope="session")
def rounded_digits(
    run_task: RunTask, digits: str, calibration_digits: list[str], digits_units: list[dict[str, Any]]
) -> dict[str, str]:
    """The states of all units of the digits model, rounded in one task: unit name to digest."""
    params = {"units": digits_units, "method": "closed_form", "positions": 8}
    made = run_task("round", params | COMMON, {"model": [digits], "calibration": calibration_digits})
    return {name.removeprefix("state:"): digest for name, digest in made.outputs.items()}


@pytest.fixture(scope="session")
def common() -> dict[str, Any]:
    """Return the parameters that passes share."""
    return dict(COMMON)
