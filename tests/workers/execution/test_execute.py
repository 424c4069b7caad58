"""One task in this process or in one of its own."""

from __future__ import annotations

import errno
import json
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

import workers
from quant_spec.kinds import KINDS
from quant_spec.sampler import Sampler
from quant_spec.task import Seeds
from quant_spec.tasks import reference
from workers.errors import (
    DigestMismatchError,
    DiskFullError,
    ExecutorError,
    Fault,
    ModelError,
    NotFoundError,
    RefusedError,
    StoreUnavailableError,
    StoreUnreachableError,
    TaskError,
    TaskFailedError,
    describe,
    fault_of,
)
from workers.execution.cluster import own_versions
from workers.execution.devices import device_number
from workers.execution.execute import TaskCall, execute_call
from workers.execution.local import answer_call, run_in_subprocess
from workers.storage.locks import own_folder
from workers.storage.manifest import put_tree
from workers.storage.store import NodeStore

#: More seconds than a clock can count: the body itself fails.
TOO_LONG = {"seconds": 1e300}


@pytest.fixture
def call(folder_store: NodeStore, tmp_path: Path) -> TaskCall:
    """A call of the kind that does nothing."""
    return TaskCall("noop", {"payload": 1}, {}, folder_store.url, str(tmp_path / "cache"))


@pytest.fixture
def digits() -> Path:
    """The folder of the small shipped model."""
    return Path(workers.__file__).parents[1] / "examples" / "models" / "digits"


def test_execute_adds_time_and_memory_to_the_metrics(call: TaskCall, folder_store: NodeStore) -> None:
    output = execute_call(replace(call, params={"payload": 1, "seconds": 0.05}))
    assert folder_store.exists(output.outputs["blob"])
    assert output.metrics["inputs"] == 0
    assert output.metrics["seconds"] >= 0.05
    assert output.metrics["peak_rss_bytes"] > 1 << 20


def test_noop_depends_on_params_and_inputs_alone(call: TaskCall, folder_store: NodeStore) -> None:
    blobs = [folder_store.put_bytes(data) for data in (b"1", b"2")]

    def output(inputs: dict[str, list[str]], **params: object) -> str:
        return execute_call(replace(call, inputs=inputs, params=params)).outputs["blob"]

    same = [output({"x": blobs}, payload=1), output({"x": blobs}, payload=1, seconds=0.01)]
    others = [output({"x": blobs[::-1]}, payload=1), output({"x": blobs}, payload=2), output({}, payload=1)]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 4


def test_execute_removes_its_scratch_folder(call: TaskCall, folder_store: NodeStore, digits: Path) -> None:
    params = reference.Params(
        sampler=Sampler(num_inference_steps=1), seeds=Seeds(first=0, count=1), batch_size=1, sqnr_seeds=0
    )
    inputs = {"model": [put_tree(folder_store, digits)]}
    execute_call(replace(call, kind="reference", params=params.to_json(), inputs=inputs))
    assert Path(call.cache_dir, "scratch").is_dir(), "this task needs one"
    with pytest.raises(OverflowError):
        execute_call(replace(call, params=TOO_LONG))
    assert not any(Path(call.cache_dir).glob("scratch/*"))


def test_scratch_of_a_dead_process_is_removed(tmp_path: Path) -> None:
    import os

    code = "import sys, os; from pathlib import Path; from workers.storage.locks import own_folder\n"
    code += "c = own_folder(Path(sys.argv[1])); print(c.__enter__(), flush=True); sys.stdin.read(); os._exit(1)"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        left = Path(process.stdout.readline().strip())
        os.utime(left, (1e9, 1e9))
        with own_folder(tmp_path) as mine:
            assert left.exists()
            assert mine != left
        process.stdin.close()
        process.wait()
    with own_folder(tmp_path) as mine:
        assert list(tmp_path.iterdir()) == [mine]


def test_a_folder_of_anothers_making_is_left_alone(tmp_path: Path) -> None:
    import os

    theirs = tmp_path / "task-of-theirs"
    (theirs / "work").mkdir(parents=True)
    link = tmp_path / "task-link.own"
    link.symlink_to(theirs)
    os.utime(theirs, (1e9, 1e9))
    with own_folder(tmp_path):
        pass
    assert (theirs / "work").is_dir()
    assert link.is_symlink()


def test_execute_sets_the_threads_of_torch(call: TaskCall) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        execute_call(replace(call, threads=2))
        assert torch.get_num_threads() == 2
        execute_call(replace(call, threads=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_unknown_kind_and_other_version_are_invalid(call: TaskCall) -> None:
    with pytest.raises(TaskError, match="'nope'"):
        execute_call(replace(call, kind="nope"))
    with pytest.raises(TaskError, match="version 7"):
        execute_call(replace(call, version=7))
    assert answer_call(replace(call, kind="nope"))["fault"] == Fault.INVALID


UNIT = {"unit": "mid", "attentions": {}, "layers": {}}
ROUND = {"method": "nearest", "seed": 0, "forward_batch_size": 4, "units": [UNIT]}
RANGES = {"weight_range": {"method": "minmax"}, "activation": None, "activation_range": None, "split": None}
WEIGHT = {"bits": 4, "symmetric": False, "granularity": "per_channel", "group_size": None}
LAYER = RANGES | {"weight": WEIGHT}


def _without(params: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in params.items() if key != name}


def _of_layer(layer: dict[str, Any]) -> dict[str, Any]:
    return ROUND | {"units": [UNIT | {"layers": {"conv": layer}}]}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (ROUND | {"forward_batch": 4}, "forward_batch: unknown key; nearest: forward_batch_size"),
        (_without(ROUND, "seed"), "seed: got nothing, wanted a value"),
        (_without(ROUND, "method"), "got no method, wanted forward_batch_size, method, seed, units"),
        (ROUND | {"damping": 0.03}, "got damping, which cannot matter beside the others, wanted forward_batch_size"),
        (ROUND | {"seed": True}, "seed: got true, wanted an integer"),
        (ROUND | {"seed": -1}, "seed: got -1, wanted at least 0"),
        (ROUND | {"method": "best"}, "method: got 'best', wanted one of nearest, closed_form"),
        (ROUND | {"units": [UNIT | {"more": 1}]}, "got units .*, of which not all is known"),
        (ROUND | {"units": [_without(UNIT, "layers")]}, "units.0.layers: got none, wanted one"),
        (ROUND | {"units": ["mid"]}, "units.0.format: got 'mid', wanted that of a PlannedUnit"),
        (_of_layer(LAYER | {"weight": WEIGHT | {"bits": 7}}), "got 7 bits"),
        (_of_layer(LAYER | {"weight": WEIGHT | {"bit": 4}}), "wanted that of a PlannedUnit .*'bit'"),
        (_of_layer(LAYER | {"weigth": WEIGHT}), "of which not all is known"),
        (_of_layer(_without(LAYER, "weight_range")), "units.0.weight_range: got none, wanted one"),
    ],
)
def test_parameters_that_the_kind_does_not_have_are_refused(
    call: TaskCall, params: dict[str, Any], message: str
) -> None:
    inputs = {"model": ["0" * 64], "calibration": ["0" * 64]}
    task = replace(call, kind="round", params=params, inputs=inputs)
    with pytest.raises(TaskError, match=message) as caught:
        execute_call(task)
    assert str(caught.value).startswith("task round: ")
    assert (caught.value.exit_code, answer_call(task)["fault"]) == (2, Fault.INVALID)


def test_parameters_as_their_record_writes_them_are_read(call: TaskCall) -> None:
    inputs = {"model": ["0" * 64], "calibration": ["0" * 64]}
    with pytest.raises(NotFoundError):  # that is, the body began
        execute_call(replace(call, kind="round", params=_of_layer(LAYER), inputs=inputs))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"model": ["0" * 64]}, "input calibration: got none, wanted it"),
        ({"calibration": []}, "input model: got none, wanted it"),
        ({"model": [], "calibration": []}, "input model: got 0 digests, wanted 1"),
        ({"model": ["0" * 64] * 2, "calibration": []}, "input model: got 2 digests, wanted 1"),
        ({"model": ["0" * 64], "calibration": [], "factors": []}, "input factors: got 0 digests, wanted some, or no"),
        ({"model": ["0" * 64], "calibration": [], "shards": []}, "inputs: got shards, wanted model, calibration"),
    ],
)
def test_inputs_that_the_kind_does_not_have_are_refused(
    call: TaskCall, inputs: dict[str, list[str]], message: str
) -> None:
    task = replace(call, kind="round", params=ROUND, inputs=inputs)
    with pytest.raises(TaskError, match=message) as caught:
        execute_call(task)
    assert (caught.value.exit_code, answer_call(task)["fault"]) == (2, Fault.INVALID)


def test_an_output_that_the_kind_does_not_have_is_refused(call: TaskCall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "noop", replace(KINDS["noop"], outputs=("other",)))
    with pytest.raises(TaskError, match="task noop: got output blob, wanted other"):
        execute_call(call)


def test_every_kind_has_its_name_and_an_entry() -> None:
    assert all(kind.name == name and ":" in kind.entry and kind.version >= 1 for name, kind in KINDS.items())


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (ValueError("x"), Fault.TASK),
        (MemoryError(), Fault.MEMORY),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), Fault.MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), Fault.MEMORY),
        (RuntimeError("shapes differ"), Fault.TASK),
        (RefusedError("x"), Fault.REFUSED),
        (DiskFullError("x"), Fault.OUTAGE),
        (DigestMismatchError("x", "0" * 64), Fault.LOST),
        (NotFoundError("x", "0" * 64), Fault.LOST),
        (ExecutorError("x"), Fault.TASK),
        (StoreUnreachableError("x"), Fault.OUTAGE),
        (StoreUnavailableError("x"), Fault.OUTAGE),
        (OSError(errno.ENOSPC, "No space left on device"), Fault.OUTAGE),
        (OSError(errno.ENOENT, "No such file or directory"), Fault.TASK),
        (ModelError("x"), Fault.INVALID),
        (TaskError("x"), Fault.INVALID),
    ],
)
def test_faults_by_class(error: Exception, fault: Fault) -> None:
    assert fault_of(error) == fault


def test_describe_is_one_line() -> None:
    assert describe(ValueError("two\n  lines\n")) == "ValueError: two lines"
    assert describe(MemoryError()) == "MemoryError"
    assert describe(ModelError("model: got x")) == "model: got x"


def test_subprocess_gives_the_same_output(call: TaskCall) -> None:
    assert run_in_subprocess(call).outputs == execute_call(call).outputs


def test_subprocess_raises_the_errors_of_the_task(call: TaskCall, tmp_path: Path) -> None:
    with pytest.raises(TaskFailedError, match="OverflowError: "):
        run_in_subprocess(replace(call, params=TOO_LONG))
    for params in ({"payload": 1, "second": 1.0}, {"seconds": "long"}):
        with pytest.raises(TaskError, match=r"task noop: seconds?: ") as refused:
            run_in_subprocess(replace(call, params=params))
        assert refused.value.exit_code == 2
    with pytest.raises(TaskError, match="version 7") as other:
        run_in_subprocess(replace(call, version=7))
    assert other.value.exit_code == 2
    with pytest.raises(TaskFailedError, match="not a folder") as caught:
        run_in_subprocess(replace(call, store_url=str(tmp_path / "gone")))
    assert caught.value.exit_code == 2


def test_module_answers_with_one_line_whatever_is_printed(call: TaskCall, tmp_path: Path) -> None:
    request = json.dumps(call.to_json())
    code = "import os, sys, runpy; sys.argv = ['local', 'noop']; import workers.tasks.noop as noop; run = noop.run\n"
    code += "def loud(*a):\n    print('chatter', flush=True); os.system('echo more chatter'); return run(*a)\n"
    code += "noop.run = loud; runpy.run_module('workers.execution.local', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], input=request, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert json.loads(done.stdout)["outputs"] == execute_call(call).outputs
    assert done.stdout.count("\n") == 1
    assert "more chatter" in done.stderr


def test_module_exits_with_the_code_of_the_error(call: TaskCall, tmp_path: Path) -> None:
    request = {"params": {}, "inputs": {}, "store_url": str(tmp_path / "gone"), "cache_dir": call.cache_dir}
    done = subprocess.run(
        [sys.executable, "-m", "workers.execution.local", "noop"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    answer = json.loads(done.stdout)
    assert (answer["fault"], answer["dependency"]) == ("outage", "store")


def test_orchestrators_side_imports_no_torch() -> None:
    rooms = [Path(workers.__file__).parent / name for name in ("execution", "storage")]
    on_ray = ("remote", "nodes")
    files = [(room, path.stem) for room in rooms for path in room.glob("[a-z]*.py")]
    modules = [f"{room.name}.{name}" for room, name in files if name not in on_ray]
    assert {"execution.execute", "storage.store"} <= set(modules)
    code = "import sys; " + "; ".join(f"import workers.{name}" for name in [*modules, "tasks.noop"])
    code += "; sys.exit(sorted({'torch', 'diffusers', 'ray', 'quant_core'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_says_where_it_ran(call: TaskCall) -> None:
    output = execute_call(replace(call, host="node-7"))
    ran = output.ran
    assert (ran["node"], ran["device"], ran["peak_gpu_bytes"]) == ("node-7", "cpu", 0)
    assert ran["versions"] == own_versions()
    assert ran["peak_rss_bytes"] == output.metrics["peak_rss_bytes"]


def test_peak_of_memory_is_that_of_the_task_alone(call: TaskCall) -> None:
    large = bytearray(256 << 20)
    large[:: 1 << 12] = b"x" * len(large[:: 1 << 12])
    del large
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert execute_call(call).ran["peak_rss_bytes"] < before - (100 << 20)


def test_worker_with_other_versions_refuses(call: TaskCall) -> None:
    wanted = dict(own_versions()) | {"torch": "1.0"}
    answer = answer_call(replace(call, host="node-7", versions=wanted))
    own = own_versions()["torch"]
    assert answer["error"] == f"node-7: got torch {own}, wanted torch 1.0, as the orchestrator has"
    assert answer["fault"] == Fault.REFUSED
    assert "outputs" in answer_call(replace(call, versions=dict(own_versions())))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_worker_that_sees_no_gpu_refuses_a_task_that_was_given_one(call: TaskCall) -> None:
    answer = answer_call(replace(call, host="node-7", device="cuda", gpus=0.25))
    assert answer["fault"] == Fault.REFUSED
    assert re.fullmatch(
        r"node-7: got 0 CUDA devices from torch \S+ \(CUDA \S+\), wanted device 0, which Ray gave", answer["error"]
    )


def test_smaller_batches_give_the_same_reference_but_for_rounding(
    call: TaskCall, folder_store: NodeStore, digits: Path
) -> None:
    params = reference.Params(
        sampler=Sampler(num_inference_steps=2), seeds=Seeds(first=0, count=4), batch_size=4, sqnr_seeds=2
    )
    inputs = {"model": [put_tree(folder_store, digits)]}
    whole = replace(call, kind="reference", params=params.to_json(), inputs=inputs)
    found = []
    for divisor in (1, 2, 100):
        output = execute_call(replace(whole, batch_divisor=divisor))
        found.append(load(folder_store.get_bytes(output.outputs[reference.REFERENCE])))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-4)


def test_deterministic_task_has_torchs_deterministic_algorithms_and_gives_them_back(
    call: TaskCall, folder_store: NodeStore, digits: Path
) -> None:
    seen: list[bool] = []

    def look(*_: object) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic)

    params = reference.Params(
        sampler=Sampler(num_inference_steps=1), seeds=Seeds(first=0, count=1), batch_size=1, sqnr_seeds=0
    )
    inputs = {"model": [put_tree(folder_store, digits)]}
    plain = replace(call, kind="reference", params=params.to_json(), inputs=inputs)
    handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        outputs = [execute_call(replace(plain, deterministic=wanted)).outputs for wanted in (True, False)]
    finally:
        handle.remove()
    half = len(seen) // 2
    assert all(seen[:half])
    assert not any(seen[half:])
    assert not torch.are_deterministic_algorithms_enabled()
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("given", "visible", "number"),
    [([3], None, 3), (["3"], "2,3", 1), ([0], "0", 0), (["1"], "0", 0), ([], None, 0)],
)
def test_torch_counts_the_gpus_that_are_visible(given: list[int | str], visible: str | None, number: int) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert device_number(given, environ) == number
