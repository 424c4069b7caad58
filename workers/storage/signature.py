"""Signatures of releases: who made them, where a digest says only that they are whole.

The format is that of OpenSSF Model Signing with a key [https://github.com/sigstore/model-transparency]: a Sigstore
bundle whose DSSE envelope holds an in-toto statement of every file's digest, signed with ECDSA. Its own tool verifies a
pulled folder (`model_signing verify key DIR --signature DIR/model.sig --public_key PUB`), and what it signed is
verified here. It is not used itself: it needs a client of Sigstore's services and half a dozen packages for the network
beside a key, and the whole release on disk; the manifest has every digest already.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_spec.documents import read_json, read_plain_file
from quant_spec.errors import InvalidInputError
from workers.errors import WorkerError
from workers.storage.manifest import MANIFEST_NAME
from workers.storage.manifest import SIGNATURE_NAME as SIGNATURE_NAME
from workers.storage.private import is_private

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey

_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_LONGEST_KEY = 64 << 10
_CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}


class SignatureError(WorkerError, InvalidInputError):
    """A key that cannot be used, or a signature that is missing, of another key, or of other bytes."""

    exit_code = 2


@dataclass(frozen=True, slots=True, repr=False)
class SigningKey:
    """A private key, of which nothing is ever shown but `id`, the SHA-256 of its public half."""

    _key: EllipticCurvePrivateKey

    @property
    def id(self) -> str:
        """Which key this is: the digest that a signature names it by."""
        return _key_id(self._key.public_key())

    def sign(self, name: str, files: Mapping[str, str]) -> str:
        """Return the bundle of a release, as JSON.

        Parameters
        ----------
        name
            Of the release, such as `emoji@3`.
        files
            Path to SHA-256 of all of its files, `manifest.json` among them.
        """
        payload = json.dumps(_statement(name, files), sort_keys=True).encode()
        signature = self._key.sign(_pre_authenticated(payload), _algorithm(self._key.public_key()))
        envelope = {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        }
        material = {"publicKey": {"hint": self.id}, "tlogEntries": []}
        return json.dumps({"mediaType": _BUNDLE, "verificationMaterial": material, "dsseEnvelope": envelope})


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """A public key."""

    _key: EllipticCurvePublicKey

    @property
    def id(self) -> str:
        """Which key this is; as `SigningKey.id`."""
        return _key_id(self._key)

    def verify(self, bundle: bytes | str) -> dict[str, str]:
        """Return path to SHA-256 of the files that a bundle signs.

        Raises
        ------
        SignatureError
            If it is no bundle, another key signed it, or it was changed.
        """
        from cryptography.exceptions import InvalidSignature

        try:
            content = read_json(bundle, "signature", error=SignatureError)
            hint = content["verificationMaterial"]["publicKey"].get("hint")
            envelope = content["dsseEnvelope"]
            payload = base64.b64decode(envelope["payload"], validate=True)
            signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
            types = (content["mediaType"], envelope["payloadType"])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, SignatureError):
                raise
            raise SignatureError(f"signature: got a file that is none ({error!r}), wanted a Sigstore bundle") from error
        if types != (_BUNDLE, _PAYLOAD):
            raise SignatureError(f"signature: got {' with '.join(map(str, types))}, wanted {_BUNDLE} with {_PAYLOAD}")
        if hint and hint != self.id:
            raise SignatureError(f"signature: got one by key {str(hint)[:12]}, wanted one by {self.id[:12]}")
        try:
            self._key.verify(signature, _pre_authenticated(payload), _algorithm(self._key))
        except InvalidSignature:
            raise SignatureError(
                f"signature: got one that does not fit its content and key {self.id[:12]}, wanted one that does"
            ) from None
        return _signed_files(read_json(payload, "signature", error=SignatureError))


def load_signing_key(path: Path, password: str | None = None) -> SigningKey:
    """Read a private key: PEM, on P-256, P-384 or P-521, readable for its owner alone.

    Raises
    ------
    SignatureError
        If it is anything else, or its password is another.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(path)
    if not is_private(path):
        raise SignatureError(f"key: got {path}, which others may read, wanted it for you alone: chmod 600 {path}")
    try:
        key = load_pem_private_key(data, password.encode() if password else None)
    except (TypeError, ValueError) as error:
        reason = "a password that it has or has not" if isinstance(error, TypeError) else "no key, or another password"
        raise SignatureError(
            f"key: got {path} with {reason}, wanted a private key in PEM, and its password in QUANTMILL_SIGN_PASSWORD"
        ) from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise SignatureError(f"key: got {path} of another kind, wanted one on an elliptic curve: {_HOW}")
    _algorithm(key.public_key())
    return SigningKey(key)


def load_verifying_key(path: Path) -> VerifyingKey:
    """Read a public key in PEM; raises as `load_signing_key`."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read(path))
    except ValueError:
        raise SignatureError(f"key: got {path}, which is none, wanted a public key in PEM") from None
    if not isinstance(key, EllipticCurvePublicKey):
        raise SignatureError(f"key: got {path} of another kind, wanted one on an elliptic curve: {_HOW}")
    _algorithm(key)
    return VerifyingKey(key)


_HOW = "openssl ecparam -name prime256v1 -genkey -noout"


def compare_files(signed: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return what differs between the files that were signed and those that are there, one line each."""
    problems = []
    for path in sorted(signed.keys() | found.keys()):
        if signed.get(path) != found.get(path):
            got = found.get(path, "no such file")
            problems.append(f"{path}: got {got}, wanted {signed.get(path, 'none, as it was not signed')}")
    return problems


def signed_files_of(manifest: Mapping[str, Any], digest: str) -> dict[str, str]:
    """Return path to SHA-256 of a release's files, that of its manifest (its own digest) among them."""
    return {MANIFEST_NAME: digest, **{path: entry["sha256"] for path, entry in manifest["files"].items()}}


def _read(path: Path) -> bytes:
    try:
        return read_plain_file(path, _LONGEST_KEY, error=SignatureError, what=f"key {path}")
    except FileNotFoundError:
        raise SignatureError(f"key: got {path} (No such file or directory), wanted a key in PEM") from None


def _statement(name: str, files: Mapping[str, str]) -> dict[str, Any]:
    """Return the in-toto statement about files, in the order of their paths."""
    resources = [{"name": path, "algorithm": "sha256", "digest": files[path]} for path in sorted(files)]
    whole = hashlib.sha256(b"".join(bytes.fromhex(each["digest"]) for each in resources)).hexdigest()
    serialization = {
        "method": "files",
        "hash_type": "sha256",
        "allow_symlinks": False,
        "ignore_paths": [SIGNATURE_NAME],
    }
    return {
        "_type": _STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": whole}}],
        "predicateType": _PREDICATE,
        "predicate": {"serialization": serialization, "resources": resources},
    }


def _signed_files(statement: Any) -> dict[str, str]:
    """Return the files of a statement whose signature is right."""
    try:
        kinds = (statement["_type"], statement["predicateType"])
        resources = statement["predicate"]["resources"]
        files = {each["name"]: each["digest"] for each in resources if each["algorithm"] == "sha256"}
        complete = len(files) == len(resources)
    except (KeyError, TypeError) as error:
        raise SignatureError(f"signature: got a statement without {error}, wanted the files that it is of") from error
    if kinds != (_STATEMENT, _PREDICATE) or not complete:
        raise SignatureError(f"signature: got {kinds[1]}, wanted {_PREDICATE} with the sha256 of each file")
    return files


def _pre_authenticated(payload: bytes) -> bytes:
    """Return what is signed: DSSE's encoding of type and payload."""
    return f"DSSEv1 {len(_PAYLOAD)} {_PAYLOAD} {len(payload)} ".encode() + payload


def _key_id(key: EllipticCurvePublicKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _algorithm(key: EllipticCurvePublicKey) -> ECDSA:
    """Return ECDSA with the hash that belongs to a key's curve."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    if key.curve.name not in _CURVES:
        raise SignatureError(f"key: got curve {key.curve.name}, wanted one of {', '.join(_CURVES)}")
    return ECDSA(getattr(hashes, _CURVES[key.curve.name])())
