from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from workers.errors import NotFoundError, StoreUnreachableError
from workers.storage import resolve
from workers.storage.manifest import put_tree
from workers.storage.store import open_store

PULLER = """
import sys
from pathlib import Path
from workers.errors import NotFoundError
from workers.storage.manifest import pull_tree
from workers.storage.store import open_store

name, target = sys.argv[1:]
releases = {releases!r}
if name not in releases:
    print("progress", "error: release %r: no such release" % name, sep="\\n", file=sys.stderr)
    sys.exit(102 if name != "broken" else 2)
pull_tree(open_store({store!r}), releases[name], Path(target))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTMILL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def digest(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tree in a store, which a command-line stand-in knows as emoji@prod."""
    for name in ("store", "tree"):
        (tmp_path / name).mkdir()
    (tmp_path / "tree" / "config.json").write_text("{}")
    store = str(tmp_path / "store")
    made = put_tree(open_store(store), tmp_path / "tree")
    script = tmp_path / "puller.py"
    script.write_text(PULLER.format(releases={"emoji@prod": made}, store=store))
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setattr(resolve, "_PULL", (sys.executable, str(script)))
    return made


def test_a_name_is_pulled_and_kept_under_its_digest(home: Path, digest: str) -> None:
    folder = resolve.pull("emoji@prod")
    assert folder == home / "releases" / digest
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() == {"config.json"}
    (folder / "mark").touch()
    assert resolve.pull("emoji@prod") == folder
    assert (folder / "mark").exists()
    assert [path.name for path in folder.parent.iterdir()] == [digest]


@pytest.mark.parametrize(("name", "error"), [("nosuch@1", NotFoundError), ("broken", resolve.ResolveError)])
def test_a_failure_says_why_in_one_line_and_leaves_nothing(
    home: Path, digest: str, name: str, error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        resolve.pull(name)
    assert str(caught.value) == f"artifact {name!r}: release {name!r}: no such release"
    assert list((home / "releases").iterdir()) == []


@pytest.mark.parametrize("address", ["s3://bucket", "s3://bucket/sha256/ab/abc", "s3://bucket/x/sha256/zz/" + "g" * 64])
def test_other_s3_addresses_are_refused(home: Path, address: str) -> None:
    with pytest.raises(resolve.ResolveError, match="wanted s3://bucket/prefix/sha256/ab/<64 hexadecimal digits>"):
        resolve.pull(address)
    assert not home.exists()


def test_an_s3_artifact_that_is_kept_is_not_pulled_again_while_it_is_whole(
    home: Path, digest: str, s3_environment: str
) -> None:
    folder = resolve.pull("emoji@prod")
    address = f"s3://no-such-bucket/x/sha256/{digest[:2]}/{digest}"
    assert resolve.pull(address) == folder
    (folder / "config.json").write_text("{ }")
    with pytest.raises(StoreUnreachableError):
        resolve.pull(address)


def test_a_kept_folder_that_is_damaged_is_pulled_again(home: Path, digest: str) -> None:
    folder = resolve.pull("emoji@prod")
    (folder / "config.json").write_text("{ }")
    assert resolve.pull("emoji@prod") == folder
    assert (folder / "config.json").read_text() == "{}"
    assert [path.name for path in folder.parent.iterdir()] == [digest]


def test_it_does_not_import_torch() -> None:
    script = "import sys, workers.storage.resolve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
