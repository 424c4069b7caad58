"""Trees: what goes in comes out, and nothing odd ever reaches a file system."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workers.errors import DigestMismatchError, DiskFullError, ManifestError, NotFoundError
from workers.storage.blobs import blob_key, digest_of
from workers.storage.manifest import (
    link_tree,
    manifest_bytes,
    pull_tree,
    put_manifest,
    put_tree,
    read_manifest,
    verify_tree,
)
from workers.storage.names import check_name, check_path, check_paths
from workers.storage.store import NodeStore, Store

FILES = {"config.json": b"{}", "unet/weights.safetensors": b"\x00" * 5000, "README.md": b"# card", "a/b/c": b""}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    """Read a folder back, without its manifest."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop("manifest.json", None)
    return found


def raw(store: Store, files: dict[str, object]) -> str:
    """Store a manifest that nothing has checked."""
    return store.put_bytes(json.dumps({"format": 1, "files": files}).encode())


def damage(store: NodeStore, data: bytes) -> None:
    """Change a stored blob."""
    path = Path(store.url) / blob_key(digest_of(data))
    path.chmod(0o644)
    path.write_bytes(b"?" * len(data))


def test_tree_comes_back_with_its_manifest(store: Store, tmp_path: Path) -> None:
    digest = put_tree(store, write(tmp_path / "in", FILES))
    manifest = pull_tree(store, digest, tmp_path / "out")
    assert read(tmp_path / "out") == FILES
    data = (tmp_path / "out" / "manifest.json").read_bytes()
    assert digest_of(data) == digest
    assert json.loads(data) == manifest == read_manifest(store, digest)
    assert set(manifest["files"]) == set(FILES)
    assert sum(entry["bytes"] for entry in manifest["files"].values()) == sum(map(len, FILES.values()))
    assert verify_tree(store, digest) == {}


def test_manifest_is_canonical(folder_store: NodeStore) -> None:
    one, two = (folder_store.put_bytes(data) for data in (b"1", b"22"))
    digest = put_manifest(folder_store, {"b": (two, 2), "a": (one, 1)})
    wanted = f'{{"files":{{"a":{{"bytes":1,"sha256":"{one}"}},"b":{{"bytes":2,"sha256":"{two}"}}}},"format":1}}'
    assert folder_store.get_bytes(digest) == wanted.encode()
    assert put_manifest(folder_store, {"a": (one, 1), "b": (two, 2)}) == digest


def test_pulled_tree_has_the_same_digest_when_it_is_put_again(folder_store: NodeStore, tmp_path: Path) -> None:
    digest = put_tree(folder_store, write(tmp_path / "in", FILES))
    pull_tree(folder_store, digest, tmp_path / "out")
    assert put_tree(folder_store, tmp_path / "out") == digest


def test_pull_into_an_empty_folder(folder_store: NodeStore, tmp_path: Path) -> None:
    digest = put_tree(folder_store, write(tmp_path / "in", FILES))
    (tmp_path / "out").mkdir()
    pull_tree(folder_store, digest, tmp_path / "out")
    assert read(tmp_path / "out") == FILES


def test_link_tree_shows_the_files_without_copying(folder_store: NodeStore, tmp_path: Path) -> None:
    digest = put_tree(folder_store, write(tmp_path / "in", FILES))
    link_tree(folder_store, digest, tmp_path / "out")
    assert read(tmp_path / "out") == FILES
    assert (tmp_path / "out" / "config.json").is_symlink()


def test_pull_refuses_a_target_that_is_taken(folder_store: NodeStore, tmp_path: Path) -> None:
    digest = put_tree(folder_store, write(tmp_path / "in", FILES))
    write(tmp_path / "out", {"mine": b"precious"})
    os.symlink(tmp_path / "elsewhere", tmp_path / "link")
    for target in (tmp_path / "out", tmp_path / "out" / "mine", tmp_path / "link", tmp_path / "no" / "parent"):
        with pytest.raises(ManifestError, match="wanted") as caught:
            pull_tree(folder_store, digest, target)
        assert caught.value.exit_code == 2
    assert read(tmp_path / "out") == {"mine": b"precious"}
    assert not (tmp_path / "elsewhere").exists()


def test_pull_of_a_damaged_blob_leaves_nothing(folder_store: NodeStore, tmp_path: Path) -> None:
    digest = put_tree(folder_store, write(tmp_path / "in", FILES))
    damage(folder_store, FILES["unet/weights.safetensors"])
    (tmp_path / "target").mkdir()
    with pytest.raises(DigestMismatchError, match="wanted") as caught:
        pull_tree(folder_store, digest, tmp_path / "target" / "out")
    assert caught.value.exit_code == 2
    assert list((tmp_path / "target").iterdir()) == []


def test_pull_with_a_blob_missing_leaves_nothing(folder_store: NodeStore, tmp_path: Path) -> None:
    digest = put_tree(folder_store, write(tmp_path / "in", FILES))
    folder_store.delete(digest_of(b"# card"))
    (tmp_path / "target").mkdir()
    with pytest.raises(NotFoundError):
        pull_tree(folder_store, digest, tmp_path / "target" / "out")
    assert list((tmp_path / "target").iterdir()) == []


def test_verify_names_every_problem(folder_store: NodeStore, tmp_path: Path) -> None:
    digest = put_tree(folder_store, write(tmp_path / "in", FILES))
    damage(folder_store, FILES["unet/weights.safetensors"])
    folder_store.delete(digest_of(b"# card"))
    problems = list(verify_tree(folder_store, digest).values())
    assert [problem.split(":")[0] for problem in problems] == ["README.md", "unet/weights.safetensors"]
    assert "got no blob" in problems[0]


def test_verify_finds_a_wrong_size_and_a_missing_manifest(folder_store: NodeStore) -> None:
    digest = folder_store.put_bytes(b"four")
    wrong = put_manifest(folder_store, {"a": (digest, 5)})
    assert verify_tree(folder_store, wrong) == {wrong: "a: got 4 bytes, wanted 5"}
    assert len(verify_tree(folder_store, "0" * 64)) == 1
    odd = folder_store.put_bytes(b"[]")
    assert "no manifest" in verify_tree(folder_store, odd)[odd]


@pytest.mark.parametrize("data", [b"\xff", b"[]", b"{}", b'{"format":2,"files":{}}', b'{"format":1,"files":[]}', b"3"])
def test_what_is_no_manifest_is_refused(folder_store: NodeStore, data: bytes) -> None:
    with pytest.raises(ManifestError, match="manifest"):
        read_manifest(folder_store, folder_store.put_bytes(data))


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"sha256": "0" * 64},
        {"sha256": "../../x", "bytes": 1},
        {"sha256": "0" * 64, "bytes": -1},
        {"sha256": "0" * 64, "bytes": True},
        {"sha256": "0" * 64, "bytes": 1, "mode": 511},
    ],
)
def test_bad_entries_are_refused(folder_store: NodeStore, entry: object) -> None:
    with pytest.raises(ManifestError, match="entry"):
        read_manifest(folder_store, raw(folder_store, {"a": entry}))


ODD_PATHS = [
    "", "/", "/etc/passwd", "..", "../x", "a/../b", "a//b", "./a", "a/.", "a/", "~/x", "C:\\x", "c:/x", "a\\b", "a\0b",
    "a\nb", "a\n", "%2e%2e/x", "..%2fx", "x" * 129, "/".join("abcdefghi"), "caf\u00e9", "\u202ea", ".hidden", "-rf",
    "a.", "manifest.json", "MANIFEST.JSON",
]  # fmt: skip


@pytest.mark.parametrize("path", ODD_PATHS)
def test_odd_paths_are_refused_before_anything_is_written(folder_store: NodeStore, tmp_path: Path, path: str) -> None:
    digest = folder_store.put_bytes(b"evil")
    tree = raw(folder_store, {path: {"sha256": digest, "bytes": 4}})
    (tmp_path / "target").mkdir()
    with pytest.raises(ManifestError) as caught:
        pull_tree(folder_store, tree, tmp_path / "target" / "out")
    assert caught.value.exit_code == 2
    assert list((tmp_path / "target").iterdir()) == []
    with pytest.raises(ManifestError):
        put_manifest(folder_store, {path: (digest, 4)})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.one_of(st.text(max_size=20), st.text(alphabet="./\\ab:~%2e\0", max_size=12)))
def test_any_accepted_path_stays_inside_the_target(folder_store: NodeStore, tmp_path: Path, path: str) -> None:
    try:
        checked = check_path(path)
    except ManifestError:
        return
    target = (tmp_path / "target").resolve()
    place = Path(os.path.normpath(target / checked))
    assert place.is_relative_to(target)
    assert place != target
    assert str(checked) == path
    assert not checked.is_absolute()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(paths=st.lists(st.text(alphabet="abA./_", min_size=1, max_size=8), min_size=1, max_size=5))
def test_pull_writes_inside_its_target_or_nothing(
    folder_store: NodeStore, tmp_path_factory: pytest.TempPathFactory, paths: list[str]
) -> None:
    digest = folder_store.put_bytes(b"x")
    tree = raw(folder_store, {path: {"sha256": digest, "bytes": 1} for path in paths})
    root = tmp_path_factory.mktemp("root")
    try:
        manifest = pull_tree(folder_store, tree, root / "out")
    except ManifestError:
        assert list(root.iterdir()) == []
    else:
        assert [path.name for path in root.iterdir()] == ["out"]
        assert set(read(root / "out")) == set(manifest["files"])


@pytest.mark.parametrize("paths", [["a", "A"], ["a/b", "A/B"], ["a", "a/b"], ["A", "a/b"], ["a", "a"]])
def test_paths_that_cannot_lie_side_by_side_are_refused(paths: list[str]) -> None:
    with pytest.raises(ManifestError, match="wanted"):
        check_paths(paths)


def test_links_and_special_files_are_not_put(folder_store: NodeStore, tmp_path: Path) -> None:
    secret = write(tmp_path / "secret", {"key": b"secret"})
    for number, make in enumerate(
        (
            lambda path: path.symlink_to(secret / "key"),
            lambda path: path.symlink_to(secret),
            lambda path: path.symlink_to("nowhere"),
            os.mkfifo,
        )
    ):
        folder = write(tmp_path / f"in{number}", {"fine": b"1"})
        make(folder / "odd")
        with pytest.raises(ManifestError, match="odd"):
            put_tree(folder_store, folder)
    assert not folder_store.exists(digest_of(b"secret"))


def test_full_disk_on_pull_leaves_nothing(folder_store: NodeStore, tmp_path: Path, small_disk: Path) -> None:
    digest = put_tree(folder_store, write(tmp_path / "in", {"large": b"x" * (1 << 20), "small": b"x"}))
    with pytest.raises(DiskFullError) as caught:
        pull_tree(folder_store, digest, small_disk / "out")
    assert caught.value.exit_code == 2
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "emoji32-w4a8", "0", "a.b_c-d", "x" * 128])
def test_names_of_the_pattern_are_accepted(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "_a", "a/b", "a b", "a\n", "x" * 129, "é", "a@1"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ManifestError, match="name") as caught:
        check_name(name)
    assert caught.value.exit_code == 2


def test_manifest_bytes_are_utf8_without_spaces() -> None:
    assert manifest_bytes({"format": 1, "files": {}}) == b'{"files":{},"format":1}'
