"""One task in this process or in one of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quant_spec import kinds
from workers.errors import (
    DigestMismatchError,
    DiskFullError,
    ExecutorError,
    Fault,
    ModelError,
    NotFoundError,
    StoreUnreachableError,
    TaskError,
    TaskFailedError,
    describe,
    fault_of,
)
from workers.execution.execute import TaskCall, execute_call
from workers.execution.local import answer_call, run_in_subprocess
from workers.storage.locks import own_folder
from workers.storage.store import NodeStore


@pytest.fixture
def call(folder_store: NodeStore, tmp_path: Path) -> TaskCall:
    """A call of the kind that does nothing."""
    return TaskCall("noop", {"payload": 1}, {}, folder_store.url, str(tmp_path / "cache"))


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


def test_execute_removes_its_scratch_folder(call: TaskCall) -> None:
    execute_call(call)
    with pytest.raises(ValueError, match="could not convert"):
        execute_call(replace(call, params={"seconds": "long"}))
    assert list(Path(call.cache_dir, "scratch").iterdir()) == []


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


def test_every_kind_has_its_name_and_an_entry() -> None:
    assert all(kind.name == name and ":" in kind.entry and kind.version >= 1 for name, kind in kinds.KINDS.items())


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (ValueError("x"), Fault.TASK),
        (MemoryError(), Fault.TASK),
        (DiskFullError("x"), Fault.TASK),
        (DigestMismatchError("x"), Fault.TASK),
        (NotFoundError("x"), Fault.TASK),
        (ExecutorError("x"), Fault.TASK),
        (StoreUnreachableError("x"), Fault.INFRASTRUCTURE),
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
    with pytest.raises(TaskFailedError, match="ValueError: could not convert"):
        run_in_subprocess(replace(call, params={"seconds": "long"}))
    with pytest.raises(TaskError, match="version 7") as refused:
        run_in_subprocess(replace(call, version=7))
    assert refused.value.exit_code == 2
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
    assert json.loads(done.stdout)["fault"] == "infrastructure"


def test_orchestrators_side_imports_no_torch() -> None:
    modules = ["cache", "execute", "executor", "kinds", "local", "manifest", "modelfolder", "names"]
    modules += ["store", "store_folder", "store_s3"]
    code = "import sys; " + "; ".join(f"import workers.{name}" for name in modules)
    code += "; sys.exit(sorted({'torch', 'diffusers', 'ray', 'quant_core'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
