"""Tasks that are not queued but run at once, in a process of their own: the orchestrator must not see torch."""

from __future__ import annotations

from orchestrator.settings import Settings
from quant_spec.task import TaskInputs, TaskKind, TaskParams
from workers.execution.context import TaskOutput
from workers.execution.execute import TaskCall
from workers.execution.local import run_in_subprocess


def run_task(
    settings: Settings,
    kind: TaskKind,
    params: TaskParams,
    inputs: TaskInputs[str],
    *,
    store_url: str | None = None,
    device: str = "cpu",
    threads: int = 1,
) -> TaskOutput:
    """Run a task to its end.

    Parameters
    ----------
    settings
        Their store is used unless another is given.
    kind
        From one of the files of `quant_spec.tasks`.
    params, inputs
        Of that kind; every input is a digest.
    store_url
        Where inputs are and outputs go.
    device, threads
        What to compute on; a torch device's name.

    Raises
    ------
    TaskError
        If the task found its input to be bad.
    TaskFailedError
        If it failed otherwise.
    """
    return run_in_subprocess(
        TaskCall(
            kind=kind.name,
            params=params.to_json(),
            inputs={name: list(digests) for name, digests in inputs.to_json().items()},
            store_url=store_url or settings.store_url,
            cache_dir=str(settings.cache_dir),
            cache_bytes=settings.cache_bytes,
            device=device,
            threads=threads,
        )
    )
