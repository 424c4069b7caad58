"""Signatures in the format of OpenSSF Model Signing: what its tool signed is verified, and what was changed is not."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from workers.storage.blobs import digest_of_file
from workers.storage.signature import (
    SIGNATURE_NAME,
    SignatureError,
    compare_files,
    load_signing_key,
    load_verifying_key,
)

HERE = Path(__file__).parent
#: A folder that `model_signing sign key` (model-signing 1.1.1) signed, and the public key.
SIGNED, PUBLIC = HERE / "signed", HERE / "signed-public.pem"
FILES = {
    path.relative_to(SIGNED).as_posix(): digest_of_file(path)
    for path in SIGNED.rglob("*")
    if path.is_file() and path.name != SIGNATURE_NAME
}


def write_keys(folder: Path, curve: ec.EllipticCurve | None = None, password: bytes | None = None) -> tuple[Path, Path]:
    """Write a new pair of keys; return the files of the private and the public one."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    private, public = folder / "key.pem", folder / "key.pub"
    encryption = NoEncryption() if password is None else BestAvailableEncryption(password)
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    private.chmod(0o600)
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def statement_of(bundle: bytes | str) -> dict:
    return json.loads(base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"]))


def test_what_the_reference_tool_signed_is_verified() -> None:
    assert load_verifying_key(PUBLIC).verify((SIGNED / SIGNATURE_NAME).read_bytes()) == FILES


def test_ours_differs_from_the_reference_tools_in_name_and_ignored_paths_alone(tmp_path: Path) -> None:
    private, _ = write_keys(tmp_path)
    theirs = statement_of((SIGNED / SIGNATURE_NAME).read_bytes())
    bundle = load_signing_key(private).sign("signed", FILES)
    ours = statement_of(bundle)
    ours["predicate"]["serialization"].pop("ignore_paths")
    assert SIGNATURE_NAME in theirs["predicate"]["serialization"].pop("ignore_paths")
    theirs["subject"][0]["name"] = "signed"
    assert ours == theirs
    outer = json.loads((SIGNED / SIGNATURE_NAME).read_bytes())
    assert json.loads(bundle).keys() == outer.keys()
    assert json.loads(bundle)["dsseEnvelope"].keys() == outer["dsseEnvelope"].keys()
    assert json.loads(bundle)["mediaType"] == outer["mediaType"]


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_what_a_key_signed_its_other_half_verifies(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    private, public = write_keys(tmp_path, curve)
    bundle = load_signing_key(private).sign("a@1", FILES)
    key = load_verifying_key(public)
    assert key.verify(bundle) == FILES
    assert key.id == load_signing_key(private).id
    with pytest.raises(SignatureError, match=f"wanted one by {load_verifying_key(PUBLIC).id[:12]}"):
        load_verifying_key(PUBLIC).verify(bundle)


def test_a_changed_bundle_is_refused(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    content = json.loads(load_signing_key(private).sign("a@1", FILES))
    key = load_verifying_key(public)
    envelope = content["dsseEnvelope"]
    other = base64.b64encode(base64.b64decode(envelope["payload"]).replace(b"a@1", b"a@2")).decode()
    damaged: tuple[object, ...] = (
        content | {"dsseEnvelope": envelope | {"payload": other}},
        content | {"dsseEnvelope": envelope | {"payloadType": "text/plain"}},
        content | {"dsseEnvelope": envelope | {"signatures": [{"sig": base64.b64encode(b"x" * 70).decode()}]}},
        content | {"dsseEnvelope": envelope | {"signatures": []}},
        content | {"mediaType": "text/plain"},
        {"mediaType": content["mediaType"]},
        [],
        "text",
    )
    for changed in damaged:
        with pytest.raises(SignatureError, match=r"^signature: got "):
            key.verify(json.dumps(changed))
    for text in (b"\xff", b"{", b"[" * 100_000):
        with pytest.raises(SignatureError, match=r"^signature: got "):
            key.verify(text)


def test_keys_that_are_none_are_refused(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, password=b"hush")
    with pytest.raises(SignatureError, match="QUANTMILL_SIGN_PASSWORD"):
        load_signing_key(private)
    with pytest.raises(SignatureError, match="another password") as refused:
        load_signing_key(private, "quiet")
    assert "quiet" not in str(refused.value)
    assert load_signing_key(private, "hush").id == load_verifying_key(public).id
    assert "hush" not in repr(load_signing_key(private, "hush"))
    for mode in (0o644, 0o640, 0o602):
        private.chmod(mode)
        with pytest.raises(SignatureError, match="chmod 600"):
            load_signing_key(private, "hush")
    write_keys(tmp_path, ec.SECP256K1())
    with pytest.raises(SignatureError, match="got curve secp256k1"):
        load_signing_key(private)
    number = rsa.generate_private_key(65537, 2048)
    private.write_bytes(number.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(SignatureError, match="elliptic curve"):
        load_signing_key(private)
    for path in (tmp_path / "no", tmp_path, Path("/dev/zero")):
        with pytest.raises(SignatureError, match=r"^key"):
            load_verifying_key(path)
        with pytest.raises(SignatureError, match=r"^key"):
            load_signing_key(path)


def test_differences_are_named() -> None:
    assert compare_files({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == []
    assert compare_files({"a": "1", "b": "2"}, {"a": "3", "c": "4"}) == [
        "a: got 3, wanted 1",
        "b: got no such file, wanted 2",
        "c: got 4, wanted none, as it was not signed",
    ]
