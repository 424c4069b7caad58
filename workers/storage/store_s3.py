"""The store in an S3-compatible service, through boto3.

What keeps bytes right: SigV4 signs the SHA-256 of every body (each part of a multipart upload has its own), so a server
that checks signatures checks the bytes; a single put also carries `ChecksumSHA256`; and every read is hashed. The CRC
trailers that boto3 adds by default are off: many compatible services refuse them. An ETag is never taken as a digest.

A key is the digest of its bytes, so writing one twice is harmless; `If-None-Match: *` saves the second of two writers
that meet. Services that do not know it ignore it or answer 501; both are fine.
"""

from __future__ import annotations

import base64
import os
import re
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from workers.errors import NotFoundError, StoreError, StoreUnreachableError
from workers.storage.blobs import blob_key, check_bytes, digest_of, digest_of_file, note_key, writing
from workers.storage.download import download
from workers.storage.store import S3
from workers.urls import hide_passwords, shown_url

#: Files from this size on are sent in parts of this size, a few at a time.
PART_BYTES = 16 << 20

# A blob older than this is written again by a put, so that a garbage collection does not take it as old.
_RENEW_SECONDS = 3600.0
_BUCKET = re.compile(r"[A-Za-z0-9._-]+")
_MISSING = {"404", "NoSuchKey", "NotFound"}
_THERE = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}
_DENIED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "NoSuchBucket", "ExpiredToken"}


class S3Store:
    """Blobs in a bucket, below a prefix; safe to use from several threads."""

    def __init__(self, url: str) -> None:
        """Open `s3://bucket/prefix`; StoreUnreachableError if the bucket does not answer or does not let us in."""
        # As AWS' own tools do: the prefix is part of the objects' keys, character by character, and nothing is quoted.
        bucket, _, prefix = url.removeprefix(S3).partition("/")
        if not _BUCKET.fullmatch(bucket):
            wanted = "s3://bucket/prefix, with credentials in the usual AWS variables or files"
            raise StoreUnreachableError(f"store: got {shown_url(url)!r}, wanted {wanted}")
        self.url = url
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._transfer = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4
        )
        try:
            self._client = _client()
        except (BotoCoreError, ValueError) as error:
            raise StoreUnreachableError(f"{url}: got {_text(error)}, wanted usable AWS settings") from error
        # Its connections end with this object, also when what follows fails.
        weakref.finalize(self, self._client.close)
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            reason = {404: "there is no such bucket", 403: "access is denied"}.get(status, f"status {status}")
            raise StoreUnreachableError(f"{url}: got the answer that {reason}, wanted a bucket to use") from error
        except BotoCoreError as error:
            raise StoreUnreachableError(f"{url}: got {_text(error)}, wanted a bucket to use") from error

    def _key(self, digest: str) -> str:
        return self._prefix + blob_key(digest)

    def put_bytes(self, data: bytes) -> str:
        """Store bytes; see `workers.storage.store.Store`."""
        digest = digest_of(data)
        head = self._head(digest)
        if not _is_young(head, len(data)):
            self._put(digest, data, absent=head is None)
        return digest

    def put_file(self, path: Path) -> str:
        """Store a file, in parts from `PART_BYTES` on; see `workers.storage.store.Store`."""
        digest, size = digest_of_file(path), path.stat().st_size
        head = self._head(digest)
        if _is_young(head, size):
            return digest
        if size < PART_BYTES:
            with path.open("rb") as file:
                self._put(digest, file, absent=head is None)
            return digest
        with self._calling(digest):
            # The transfer manager aborts the upload if a part of it fails.
            self._client.upload_file(
                str(path),
                self._bucket,
                self._key(digest),
                ExtraArgs={"Metadata": {"sha256": digest}},
                Config=self._transfer,
            )
        if self.size(digest) != size:
            raise StoreError(f"{self.url}: got {self.size(digest)} bytes after the upload of {path}, wanted {size}")
        return digest

    def get_bytes(self, digest: str) -> bytes:
        """Read a blob; see `workers.storage.store.Store`."""
        with self._calling(digest):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(digest))
            with answer["Body"] as body:
                data: bytes = body.read()
        check_bytes(digest, digest_of(data), f"{self.url}/{blob_key(digest)}")
        return data

    def get_file(self, digest: str, path: Path) -> None:
        """Read a blob into a file, in parallel parts if it is large; see `workers.storage.store.Store`."""
        size = self.size(digest)
        with writing(path) as file:
            # A full disk shows before the download.
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            with self._calling(digest):
                got = download(self._client, self._bucket, self._key(digest), size, file)
            check_bytes(digest, got, f"{self.url}/{blob_key(digest)}")

    def exists(self, digest: str) -> bool:
        """Say whether there is such a blob."""
        return self._head(digest) is not None

    def size(self, digest: str) -> int:
        """Return a blob's size in bytes."""
        head = self._head(digest)
        if head is None:
            raise NotFoundError(f"{self.url}: got no blob {digest}, wanted it in the store")
        return int(head["ContentLength"])

    def delete(self, digest: str) -> None:
        """Remove a blob, if it is there."""
        with self._calling(digest):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(digest))

    def list(self) -> Iterator[tuple[str, int, float]]:
        """Yield every blob's digest, bytes, and time of its last put."""
        pages = self._client.get_paginator("list_objects_v2")
        with self._calling(""):
            for page in pages.paginate(Bucket=self._bucket, Prefix=f"{self._prefix}sha256/"):
                for entry in page.get("Contents", ()):
                    yield entry["Key"].rsplit("/", 1)[1], entry["Size"], entry["LastModified"].timestamp()

    def put_note(self, what: str, key: str, data: bytes) -> None:
        """Write a note; see `workers.storage.store.Store`."""
        with self._calling(key):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + note_key(what, key), Body=data)

    def get_note(self, what: str, key: str) -> bytes | None:
        """Read a note; see `workers.storage.store.Store`."""
        try:
            with self._calling(key):
                answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + note_key(what, key))
                with answer["Body"] as body:
                    data: bytes = body.read()
        except NotFoundError:
            return None
        return data

    def delete_note(self, what: str, key: str) -> None:
        """Remove a note; see `workers.storage.store.Store`."""
        with self._calling(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + note_key(what, key))

    def sweep(self, older_than_seconds: float) -> int:
        """Abort multipart uploads of writers that died, and remove notes of tasks that never went on."""
        limit = time.time() - older_than_seconds
        old = []
        pages = self._client.get_paginator("list_multipart_uploads")
        with self._calling(""):
            for page in pages.paginate(Bucket=self._bucket, Prefix=f"{self._prefix}sha256/"):
                old += [item for item in page.get("Uploads", ()) if item["Initiated"].timestamp() < limit]
            for item in old:
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=item["Key"], UploadId=item["UploadId"])
            notes = [key for key, at in self._notes() if at < limit]
            for key in notes:
                self._client.delete_object(Bucket=self._bucket, Key=key)
        return len(old) + len(notes)

    def _notes(self) -> Iterator[tuple[str, float]]:
        """Yield the key of every note, and the time of its last put."""
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=f"{self._prefix}notes/"):
            for entry in page.get("Contents", ()):
                yield entry["Key"], entry["LastModified"].timestamp()

    def _put(self, digest: str, body: bytes | IO[bytes], *, absent: bool) -> None:
        """Put a blob in one request; `absent` if it was not there a moment ago."""
        request: dict[str, Any] = {
            "Bucket": self._bucket,
            "Key": self._key(digest),
            "Body": body,
            "ChecksumSHA256": base64.b64encode(bytes.fromhex(digest)).decode(),
            "Metadata": {"sha256": digest},
        }
        with self._calling(digest):
            try:
                self._client.put_object(**request, **({"IfNoneMatch": "*"} if absent else {}))
            except ClientError as error:
                if _code(error) in _THERE:
                    return
                if _code(error) not in {"501", "NotImplemented"}:
                    raise
                if not isinstance(body, bytes):
                    body.seek(0)
                self._client.put_object(**request)

    def _head(self, digest: str) -> dict[str, Any] | None:
        """Return what the service says of a blob, or None if it is not there."""
        try:
            with self._calling(digest):
                head: dict[str, Any] = self._client.head_object(Bucket=self._bucket, Key=self._key(digest))
        except NotFoundError:
            return None
        return head

    @contextmanager
    def _calling(self, digest: str) -> Iterator[None]:
        """Convert boto3's errors to ours."""
        try:
            yield
        except ClientError as error:
            if _code(error) in _MISSING:
                raise NotFoundError(f"{self.url}: got no blob {digest}, wanted it in the store") from error
            if _code(error) in _DENIED:
                raise StoreUnreachableError(f"{self.url}: got {_text(error)}, wanted access to the bucket") from error
            raise StoreError(f"{self.url}: got {_text(error)}, wanted the request to be served") from error
        except (BotoCoreError, Boto3Error) as error:
            # No answer, or one that broke off, after the retries of the client.
            raise StoreUnreachableError(f"{self.url}: got {_text(error)}, wanted an answer") from error


def _client() -> Any:
    """Return an S3 client for the endpoint, region and credentials of the usual AWS variables and files."""
    session = boto3.session.Session()
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path", "payload_signing_enabled": True},
        retries={"mode": "standard", "max_attempts": 5},
        connect_timeout=5,
        read_timeout=60,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # Services of one's own have no regions, but a signature names one.
    return session.client("s3", region_name=session.region_name or "us-east-1", config=config)


def _is_young(head: dict[str, Any] | None, size: int) -> bool:
    """Say whether a blob is there, at its full size, and was put not long ago."""
    if head is None or head["ContentLength"] != size:
        return False
    age: float = time.time() - head["LastModified"].timestamp()
    return age < _RENEW_SECONDS


def _text(error: Exception) -> str:
    """Return what boto3 says, without the password that an endpoint's URL may have."""
    return hide_passwords(str(error))


def _code(error: ClientError) -> str:
    """Return the error code of an answer."""
    return str(error.response.get("Error", {}).get("Code", ""))
