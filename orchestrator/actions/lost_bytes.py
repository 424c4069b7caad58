"""What people are told when a blob of a release is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.db.rows import ReleaseRow
from orchestrator.service import Service
from workers.errors import BlobLostError
from workers.storage.manifest import holds


@contextmanager
def saying_how_to_repair(service: Service, release: ReleaseRow) -> Iterator[None]:
    """Add to the error of a lost blob of a release how it is made again."""
    try:
        yield
    except BlobLostError as error:
        if error.digest != release.digest and not holds(service.store, release.digest, error.digest):
            raise
        again = type(error)(f"{error}; made again by: quantmill artifacts verify {release.ref} --repair", error.digest)
        again.exit_code = error.exit_code
        raise again from error
