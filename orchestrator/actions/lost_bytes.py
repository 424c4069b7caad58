"""What happens when a blob of a release is found to be lost by who reads the release."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.db.rows import ReleaseRow
from orchestrator.service import Service
from workers.errors import BlobLostError
from workers.storage.manifest import holds, verify_tree


@contextmanager
def sending_to_repair(service: Service, release: ReleaseRow) -> Iterator[None]:
    """Queue what makes the lost blobs of a release again, all of them, and add that to the error of the first."""
    try:
        yield
    except BlobLostError as error:
        if error.digest != release.digest and not holds(service.store, release.digest, error.digest):
            raise
        # Imported here: whoever reads what is whole need not wait for the planner's records.
        from orchestrator.actions.repair import remake

        job = remake(service, release.job, {error.digest, *verify_tree(service.store, release.digest)})
        what = "no task of this database gives it any more: submit its recipe again"
        if job is not None:
            what = f"job {job} makes it again: quantmill serve --drain, then the same again"
        again = type(error)(f"{error}; {what}", error.digest)
        again.exit_code = error.exit_code
        raise again from error
