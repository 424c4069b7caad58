"""Writing the report of a job, or of a search."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from orchestrator.report.collect import collect
from orchestrator.report.render import render_report
from orchestrator.report.search_collect import collect_search
from orchestrator.report.search_render import render_search
from orchestrator.service import Service
from workers.errors import BlobLostError
from workers.storage.blobs import check_place, writing
from workers.storage.private import make_private

Data = TypeVar("Data")


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
    data = _collected(collect, service, prefix)
    return _write(service, data.job, render_report(data), out)


def write_search_report(service: Service, prefix: str, out: Path | None = None) -> Path:
    """Write the report of a search, ended or not, whole or not at all.

    Parameters
    ----------
    service
        Where the search is.
    prefix
        Of its id, or its name.
    out
        File to write; by default `reports/SEARCH.html` in the home.

    Returns
    -------
    Path
        The file, absolute.

    Raises
    ------
    InvalidInputError
        If there is no folder to write to.
    NotFoundError, DigestMismatchError
        If there is no such search, or bytes of its results are lost.
    """
    data = _collected(collect_search, service, prefix)
    return _write(service, data.search, render_search(data), out)


def _collected(gather: Callable[[Service, str], Data], service: Service, prefix: str) -> Data:
    """Gather what a report shows; lost bytes are said with what makes them again."""
    try:
        return gather(service, prefix)
    except BlobLostError as error:
        again = type(error)(f"{error}; made again by: quantmill artifacts verify --all --repair", error.digest)
        again.exit_code = error.exit_code
        raise again from error


def _write(service: Service, name: str, page: str, out: Path | None) -> Path:
    if out is None:
        path = service.settings.home / "reports" / f"{name}.html"
        make_private(path.parent)
    else:
        path = out.absolute()
        check_place(path, "--out")
    with writing(path, mode=0o644) as file:
        file.write(page.encode())
    return path
