"""One large object of S3 into a file: several parts at a time, hashed in order as they come, memory bounded.

boto3's transfer manager hands each piece of 256 KiB from thread to thread and knows no digest of the whole, so that the
file would have to be read again; here a part is one request, one buffer, one write and one step of the hash.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

from botocore.exceptions import IncompleteReadError
from s3transfer.utils import S3_RETRYABLE_DOWNLOAD_ERRORS

#: Bytes of a part, and how many of them are fetched or wait to be hashed at once: 96 MiB in all.
PART_BYTES = 8 << 20
_PARTS = 12
_CONNECTIONS = 8
# A body that breaks off is asked for again so many times; the client's own retries end with the headers.
_ATTEMPTS = 5


def download(client: Any, bucket: str, key: str, size: int, file: BinaryIO) -> str:
    """Write an object to a file; return the SHA-256 of what was written, in hexadecimal.

    Parameters
    ----------
    client
        boto3's S3 client.
    bucket, key, size
        The object and its bytes.
    file
        Open for writing, at its start and empty, or allocated to `size`.

    Raises
    ------
    ClientError, BotoCoreError
        boto3's, if the object cannot be read; a part that breaks off is tried five times.
    OSError
        If the file cannot be written.
    """
    digest = hashlib.sha256()
    starts = iter(range(0, size, PART_BYTES))
    coming: deque[Future[bytes]] = deque()
    pool = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="s3-download")

    def fetch(start: int) -> bytes:
        data = _read(client, bucket, key, start, min(PART_BYTES, size - start))
        _write(file.fileno(), data, start)
        return data

    try:
        for start in starts:
            coming.append(pool.submit(fetch, start))
            if len(coming) == _PARTS:
                digest.update(coming.popleft().result())
        while coming:
            digest.update(coming.popleft().result())
    finally:
        # After an error the parts that have not begun are not wanted any more.
        pool.shutdown(cancel_futures=True)
    return digest.hexdigest()


def _read(client: Any, bucket: str, key: str, start: int, count: int) -> bytes:
    """Return `count` bytes of an object from `start` on."""
    for attempt in range(1, _ATTEMPTS + 1):
        answer = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{start + count - 1}")
        try:
            with answer["Body"] as body:
                data: bytes = body.read()
            if len(data) != count:
                raise IncompleteReadError(actual_bytes=len(data), expected_bytes=count)
        except (*S3_RETRYABLE_DOWNLOAD_ERRORS, IncompleteReadError):
            if attempt == _ATTEMPTS:
                raise
        else:
            return data
    raise AssertionError("the last attempt returns or raises")


def _write(handle: int, data: bytes, start: int) -> None:
    """Write all of some bytes at a place of a file."""
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, start)
        view, start = view[count:], start + count
