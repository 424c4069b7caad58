"""Run one task in a process of its own: `python -m workers.execution.local KIND`, JSON in, one line of JSON out.

Standard input: `{"params":…, "inputs":…, "store_url":…, "cache_dir":…, "device":…, "threads":…}`. Standard output: the
output and metrics, or `{"error":…, "fault":…, "exit_code":…}`, with `"lost"`, a digest, if a blob was; everything
else that is printed goes to standard error.
The orchestrator, which never imports torch, inspects models this way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from quant_spec.errors import QuantServiceError
from workers.errors import BlobLostError, Fault, TaskError, TaskFailedError, dependency_of, describe, fault_of
from workers.execution.context import TaskOutput
from workers.execution.execute import TaskCall, execute_call
from workers.execution.ray_security import worker_environment

#: The folder that Python must search to import this package.
ROOT = Path(__file__).resolve().parents[2]


def answer_call_text(call: TaskCall) -> str:
    """Run a call in this process and return its output, or its error, as one line of JSON: an object."""
    try:
        output = execute_call(call)
        answer = {"outputs": output.outputs, "metrics": output.metrics, "ran": output.ran}
        return json.dumps(answer, allow_nan=False)
    except Exception as error:
        exit_code = error.exit_code if isinstance(error, QuantServiceError) else 1
        said: dict[str, Any] = {"error": describe(error), "fault": fault_of(error).value}
        said |= {"lost": error.digest} if isinstance(error, BlobLostError) else {}
        return json.dumps(said | {"exit_code": exit_code, "dependency": dependency_of(error)})


def answer_call(call: TaskCall) -> dict[str, Any]:
    """Run a call in this process and return what `answer_call_text` says."""
    answer: dict[str, Any] = json.loads(answer_call_text(call))
    return answer


def run_in_subprocess(call: TaskCall) -> TaskOutput:
    """Run a call in a new Python process.

    Raises
    ------
    TaskError
        If the task found its input to be bad; the message is the task's own.
    BlobLostError
        If a blob that it reads is missing or damaged.
    TaskFailedError
        If it failed otherwise, or the process died; `exit_code` is that of the task's own error.
    """
    environment = worker_environment(os.environ) | {"OMP_NUM_THREADS": str(call.threads), "PYTHONPATH": python_path()}
    # Safe: our own module, in the interpreter that is running.
    process = subprocess.run(
        [sys.executable, "-P", "-m", "workers.execution.local", call.kind],
        input=json.dumps(call.to_json()),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    try:
        answer = json.loads(process.stdout)
    except ValueError:
        last = (process.stderr.strip().splitlines() or [""])[-1]
        raise TaskFailedError(
            f"task {call.kind}: got exit status {process.returncode} ({last}), wanted an answer"
        ) from None
    return read_answer(answer)


def read_answer(answer: dict[str, Any]) -> TaskOutput:
    """Return the output that `answer_call` made JSON of, or raise its error, as `run_in_subprocess` does."""
    if "error" in answer:
        if "lost" in answer:
            lost = BlobLostError(answer["error"], answer["lost"])
            lost.exit_code = answer["exit_code"]
            raise lost
        error = (TaskError if answer["fault"] == Fault.INVALID else TaskFailedError)(answer["error"])
        error.exit_code = answer["exit_code"]
        raise error
    return TaskOutput(answer["outputs"], answer["metrics"], answer["ran"])


def python_path() -> str:
    """Return PYTHONPATH for a child process, so that it finds this package wherever it is started."""
    inherited = os.environ.get("PYTHONPATH")
    return f"{ROOT}{os.pathsep}{inherited}" if inherited else str(ROOT)


def main(argv: list[str]) -> int:
    """Run the call on standard input; return 0, or the error's exit code."""
    answers = os.fdopen(os.dup(1), "w")
    # Whatever libraries print, from Python or below it, must not mix with the answer.
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    answer = answer_call(TaskCall(**{**request, "kind": argv[0]}))
    answers.write(json.dumps(answer) + "\n")
    answers.close()
    return int(answer.get("exit_code", 0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
