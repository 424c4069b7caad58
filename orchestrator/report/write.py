"""Writing the report of a job."""

from __future__ import annotations

from pathlib import Path

from orchestrator.report.collect import collect
from orchestrator.report.render import render_report
from orchestrator.service import Service
from quant_spec.errors import InvalidInputError
from workers.errors import BlobLostError
from workers.storage.blobs import writing


def write_report(service: Service, prefix: str, out: Path | None = None) -> Path:
    """Write the report of a finished job, whole or not at all.

    Parameters
    ----------
    service
        Where the job ran.
    prefix
        Of the job's id.
    out
        File to write; by default `reports/JOB.html` in the home.

    Returns
    -------
    Path
        The file, absolute.

    Raises
    ------
    InvalidInputError
        If the job has not succeeded, or there is no folder to write to.
    NotFoundError, DigestMismatchError
        If bytes of its results are lost.
    """
    try:
        data = collect(service, prefix)
    except BlobLostError as error:
        again = type(error)(f"{error}; made again by: quantmill artifacts verify --all --repair", error.digest)
        again.exit_code = error.exit_code
        raise again from error
    if out is None:
        path = service.settings.home / "reports" / f"{data.job}.html"
        path.parent.mkdir(exist_ok=True)
    else:
        path = out.absolute()
        if not path.parent.is_dir():
            raise InvalidInputError(f"--out: got {out}, but there is no folder {path.parent}; wanted a place to write")
    with writing(path, mode=0o644) as file:
        file.write(render_report(data).encode())
    return path
