"""The store in an S3-compatible service, through boto3.

What keeps bytes right: SigV4 signs the SHA-256 of every body (each part of a multipart upload has its own), so a server
that checks signatures checks the bytes; a single put also carries `ChecksumSHA256`; and every read is hashed. The CRC
trailers that boto3 adds by default are off: many compatible services refuse them. An ETag is never taken as a digest.

A key is the digest of its bytes, so writing one twice is harmless; `If-None-Match: *` saves the second of two writers
that meet. Services that do not know it ignore it or answer 501; both are fine. A put of what is there sends nothing if
the service vouches for the bytes: it then answers a HEAD with the SHA-256 that it checked as they came in. One that
keeps no checksums, or none of blobs that came in parts, gets the bytes again.

Ages are by the service's clock, in the `Date` of its answers, as the times of its objects are.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from workers.errors import NotFoundError, StoreError, StoreFullError, StoreUnavailableError, StoreUnreachableError
from workers.storage.blobs import (
    CHUNK,
    LABEL_NAME,
    blob_key,
    check_bytes,
    digest_of,
    digest_of_file,
    is_digest,
    note_key,
    writing,
)
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
# Rights that were there when the store was opened, and what services say when they have too much to do.
_DENIED = {
    "401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "NoSuchBucket", "ExpiredToken",
    "InvalidToken", "RequestTimeTooSkewed", "AccountProblem", "AllAccessDisabled",
}  # fmt: skip
_BUSY = {
    "408", "429", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests",
    "RequestLimitExceeded", "BandwidthLimitExceeded",
}  # fmt: skip
_FULL = {"507", "QuotaExceeded", "InsufficientStorage", "XMinioStorageFull"}
_NOT_IMPLEMENTED = {"501", "NotImplemented"}
_NO_UPLOAD = {"NoSuchUpload"}
# How long a service may take to accept a connection and to answer, in seconds, and how often it is asked: for bytes,
# when it is opened, and to see whether it is there at all.
_LIMITS = {"connect_timeout": 5, "read_timeout": 60, "retries": {"mode": "standard", "total_max_attempts": 4}}
_OPEN_LIMITS = {"connect_timeout": 5, "read_timeout": 10, "retries": {"mode": "standard", "total_max_attempts": 2}}
_QUICK_LIMITS = {"connect_timeout": 3, "read_timeout": 5, "retries": {"mode": "standard", "total_max_attempts": 1}}


class S3Store:
    """Blobs in a bucket, below a prefix; safe to use from several threads."""

    def __init__(self, url: str, *, quick: bool = False) -> None:
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
            self._client = _client(_QUICK_LIMITS if quick else _LIMITS)
            # Whoever opens a store is told soon that it hangs; whoever has one may have to wait for a long answer.
            opening = self._client if quick else _client(_OPEN_LIMITS)
        except (BotoCoreError, ValueError) as error:
            raise StoreUnreachableError(f"{url}: got {_text(error)}, wanted usable AWS settings") from error
        # Its connections end with this object, also when what follows fails.
        weakref.finalize(self, self._client.close)
        try:
            opening.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            reason = {404: "there is no such bucket", 403: "access is denied"}.get(status, f"status {status}")
            raise StoreUnreachableError(f"{url}: got the answer that {reason}, wanted a bucket to use") from error
        except BotoCoreError as error:
            raise StoreUnreachableError(f"{url}: got {_text(error)}, wanted a bucket to use") from error
        finally:
            if opening is not self._client:
                opening.close()

    def _key(self, digest: str) -> str:
        return self._prefix + blob_key(digest)

    def put_bytes(self, data: bytes) -> str:
        """Store bytes; see `workers.storage.store.Store`."""
        digest = digest_of(data)
        head = self._head(digest)
        if not _is_good(head, digest, len(data)):
            self._put(digest, data, absent=head is None)
        return digest

    def put_file(self, path: Path) -> str:
        """Store a file, in parts from `PART_BYTES` on; see `workers.storage.store.Store`."""
        digest, size = digest_of_file(path), path.stat().st_size
        head = self._head(digest)
        if _is_good(head, digest, size):
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

    def verify(self, digest: str) -> int:
        """Read a whole blob; see `workers.storage.store.Store`."""
        size, sha256 = 0, hashlib.sha256()
        with self._calling(digest):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(digest))
            with closing(answer["Body"]) as body:
                for chunk in body.iter_chunks(CHUNK):
                    size += len(chunk)
                    sha256.update(chunk)
        check_bytes(digest, sha256.hexdigest(), f"{self.url}/{blob_key(digest)}")
        return size

    def exists(self, digest: str) -> bool:
        """Say whether there is such a blob."""
        return self._head(digest) is not None

    def size(self, digest: str) -> int:
        """Return a blob's size in bytes."""
        head = self._head(digest)
        if head is None:
            raise NotFoundError(f"{self.url}: got no blob {digest}, wanted it in the store", digest)
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
                    name = entry["Key"].rsplit("/", 1)[1]
                    if is_digest(name) and entry["Key"] == self._key(name):
                        yield name, entry["Size"], entry["LastModified"].timestamp()

    def put_note(self, what: str, key: str, data: bytes) -> None:
        """Write a note; see `workers.storage.store.Store`."""
        self._write(note_key(what, key), data)

    def get_note(self, what: str, key: str) -> bytes | None:
        """Read a note; see `workers.storage.store.Store`."""
        return self._read(note_key(what, key))

    def _write(self, name: str, data: bytes) -> None:
        """Write what is no blob."""
        with self._calling(name):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=data)

    def _read(self, name: str) -> bytes | None:
        """Read what is no blob; None if it is not there."""
        try:
            with self._calling(name):
                answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)
                with answer["Body"] as body:
                    data: bytes = body.read()
        except NotFoundError:
            return None
        return data

    def delete_note(self, what: str, key: str) -> None:
        """Remove a note; see `workers.storage.store.Store`."""
        with self._calling(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + note_key(what, key))

    def read_label(self) -> bytes | None:
        """Read the label; see `workers.storage.store.Store`."""
        return self._read(LABEL_NAME)

    def write_label(self, data: bytes) -> None:
        """Write the label; see `workers.storage.store.Store`."""
        self._write(LABEL_NAME, data)

    def now(self) -> float:
        """Return the time that the service has."""
        with self._calling(""):
            return _date(self._client.head_bucket(Bucket=self._bucket))

    def sweep(self, older_than_seconds: float) -> int:
        """Abort multipart uploads of writers that died, and remove notes of tasks that never went on."""
        limit = self.now() - older_than_seconds
        with self._calling(""):
            aborted = sum(self._abort(item) for item in self._uploads() if item["Initiated"].timestamp() < limit)
            notes = [key for key, at in self._notes() if at < limit]
            for key in notes:
                self._client.delete_object(Bucket=self._bucket, Key=key)
        return aborted + len(notes)

    def _uploads(self) -> Sequence[Mapping[str, Any]]:
        """Return the multipart uploads that have not ended; none where the service has no list of them."""
        pages = self._client.get_paginator("list_multipart_uploads")
        try:
            found = [*pages.paginate(Bucket=self._bucket, Prefix=f"{self._prefix}sha256/")]
        except ClientError as error:
            # rclone says so of a bucket that has had none since it was started.
            if _code(error) in _NO_UPLOAD | _NOT_IMPLEMENTED:
                return []
            raise
        return [item for page in found for item in page.get("Uploads", ())]

    def _abort(self, upload: Mapping[str, Any]) -> bool:
        """Abort a multipart upload; False if it has ended meanwhile."""
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        except ClientError as error:
            if _code(error) in _NO_UPLOAD:
                return False
            raise
        return True

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
            "ChecksumSHA256": _checksum(digest),
            "Metadata": {"sha256": digest},
        }
        with self._calling(digest):
            try:
                self._client.put_object(**request, **({"IfNoneMatch": "*"} if absent else {}))
            except ClientError as error:
                if _code(error) in _THERE:
                    return
                if _code(error) not in _NOT_IMPLEMENTED:
                    raise
                if not isinstance(body, bytes):
                    body.seek(0)
                self._client.put_object(**request)

    def _head(self, digest: str) -> dict[str, Any] | None:
        """Return what the service says of a blob, or None if it is not there."""
        try:
            with self._calling(digest):
                head: dict[str, Any] = self._client.head_object(
                    Bucket=self._bucket, Key=self._key(digest), ChecksumMode="ENABLED"
                )
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
                raise NotFoundError(f"{self.url}: got no blob {digest}, wanted it in the store", digest) from error
            raise self._refusal(error) from error
        except (BotoCoreError, Boto3Error) as error:
            # No answer, or one that broke off, after the retries of the client.
            raise StoreUnavailableError(f"{self.url}: got {_text(error)}, wanted an answer") from error

    def _refusal(self, error: ClientError) -> StoreError:
        """Return our error for a request that the service answered with an error."""
        code, status = _code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _FULL or status == 507:
            return StoreFullError(f"{self.url}: got {_text(error)}, wanted more room there")
        if code in _DENIED or status in (401, 403):
            return StoreUnavailableError(f"{self.url}: got {_text(error)}, wanted access to the bucket")
        if code in _BUSY or status == 429 or (status >= 500 and code not in _NOT_IMPLEMENTED):
            return StoreUnavailableError(f"{self.url}: got {_text(error)}, wanted a service that has time for us")
        return StoreError(f"{self.url}: got {_text(error)}, wanted the request to be served")


def _client(limits: dict[str, Any]) -> Any:
    """Return an S3 client for the endpoint, region and credentials of the usual AWS variables and files."""
    session = boto3.session.Session()
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path", "payload_signing_enabled": True},
        tcp_keepalive=True,
        **limits,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # Services of one's own have no regions, but a signature names one.
    return session.client("s3", region_name=session.region_name or "us-east-1", config=config)


def _is_good(head: Mapping[str, Any] | None, digest: str, size: int) -> bool:
    """Say whether a blob is there as it must be, by the service's own checksum, and was put not long ago."""
    if head is None or head["ContentLength"] != size or head.get("ChecksumSHA256") != _checksum(digest):
        return False
    age: float = _date(head) - head["LastModified"].timestamp()
    return age < _RENEW_SECONDS


def _checksum(digest: str) -> str:
    """Return a digest as S3 writes it."""
    return base64.b64encode(bytes.fromhex(digest)).decode()


def _date(answer: Mapping[str, Any]) -> float:
    """Return when the service gave an answer, by its own clock, in seconds since 1970."""
    text = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
    try:
        return parsedate_to_datetime(text).timestamp()
    except ValueError as error:
        raise StoreError(f"store: got an answer with the date {text!r}, wanted the service's time") from error


def _text(error: Exception) -> str:
    """Return what boto3 says, without the password that an endpoint's URL may have."""
    return hide_passwords(str(error))


def _code(error: ClientError) -> str:
    """Return the error code of an answer."""
    return str(error.response.get("Error", {}).get("Code", ""))
