"""Models as diffusers and the Hub save them: variants, shards, links; one model however it was saved."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from huggingface_hub import constants
from huggingface_hub.utils._paths import filter_repo_objects

from quant_core.diffusion.denoiser import load_denoiser
from workers.storage.manifest import pull_tree, read_manifest
from workers.storage.model_folder import hub_patterns, import_model
from workers.storage.store import open_store

Cli = Callable[..., Any]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tiny() -> UNet2DModel:
    """A random network of a few thousand float16 parameters."""
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip
    return model.half().eval()


def save(folder: Path, **how: Any) -> Path:
    """Save the network and a scheduler as a pipeline would; return the folder."""
    tiny().save_pretrained(folder / "unet", **how)
    DDIMScheduler().save_pretrained(folder / "scheduler")
    return folder


def rename_as_earlier_versions(folder: Path) -> Path:
    """Put the variant after the shards' numbers, as diffusers did before 0.30."""
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    content = json.loads(index.read_text())
    names = {name: name.replace(".fp16", "").replace(".safetensors", ".fp16.safetensors") for name in
             content["weight_map"].values()}  # fmt: skip
    for name, new in names.items():
        (folder / "unet" / name).rename(folder / "unet" / new)
    content["weight_map"] = {key: names[name] for key, name in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    return folder


SHARDS: dict[str, Any] = {"max_shard_size": "100KB"}
FP16: dict[str, Any] = {"variant": "fp16"}


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """An empty store."""
    (tmp_path / "store").mkdir()
    return open_store(str(tmp_path / "store"))


def test_a_variant_is_the_model_that_it_would_be_under_its_usual_names(store: Any, tmp_path: Path) -> None:
    plain = import_model(store, save(tmp_path / "plain")).digest
    assert import_model(store, save(tmp_path / "variant", **FP16)).digest == plain
    shards = import_model(store, save(tmp_path / "shards", **SHARDS)).digest
    assert shards != plain
    variant = save(tmp_path / "sharded", **FP16, **SHARDS)
    names = sorted(path.name for path in (variant / "unet").iterdir())
    assert "diffusion_pytorch_model.safetensors.index.fp16.json" in names
    assert any(".fp16-00001-of-" in name for name in names)
    assert import_model(store, variant).digest == shards
    assert import_model(store, rename_as_earlier_versions(variant)).digest == shards


def test_a_sharded_variant_loads_from_the_store_as_it_was_saved(store: Any, tmp_path: Path) -> None:
    record = import_model(store, save(tmp_path / "sharded", **FP16, **SHARDS))
    assert sum(path.endswith(".safetensors") for path in read_manifest(store, record.digest)["files"]) > 1
    pull_tree(store, record.digest, tmp_path / "pulled")
    loaded = load_denoiser(tmp_path / "pulled").model.state_dict()
    wanted = tiny().float().state_dict()
    assert set(loaded) == set(wanted)
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    assert record.parameters == sum(value.numel() for value in wanted.values())


def test_what_is_no_variant_goes_first_and_several_variants_are_refused(cli: Cli, tmp_path: Path, home: Path) -> None:
    folder = save(tmp_path / "model", **FP16, **SHARDS)
    tiny().save_pretrained(folder / "unet", variant="ema")
    refused = cli("models", "add", folder)
    assert (refused.code, refused.out) == (2, "")
    assert "several weight files" in refused.err
    assert "index.fp16.json" in refused.err
    assert "model.ema.safetensors" in refused.err
    tiny().save_pretrained(folder / "unet")
    assert cli("models", "add", folder).code == 0


def test_shards_that_are_not_there_are_named(cli: Cli, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", **FP16, **SHARDS)
    gone = sorted((folder / "unet").glob("*-00002-of-*"))[0]
    gone.unlink()
    refused = cli("models", "add", folder)
    assert refused.code == 2
    assert f"{gone.name!r}, which is not in the folder" in refused.err
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").unlink()
    refused = cli("models", "add", folder)
    assert refused.code == 2
    assert "wanted one file or an index" in refused.err


def test_the_hub_s_cache_is_a_folder_of_links(cli: Cli, home: Path, tmp_path: Path) -> None:
    plain, repository = save(tmp_path / "plain"), tmp_path / "models--me--tiny"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    for path in [path for path in plain.rglob("*") if path.is_file()]:
        place = snapshot / path.relative_to(plain)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(repository / "blobs" / f"{path.parent.name}-{path.name}")
        place.symlink_to(f"../../../blobs/{path.parent.name}-{path.name}")
    (tmp_path / "latest").symlink_to(snapshot)
    digest = cli("models", "add", snapshot, "--json").json["digest"]
    assert cli("models", "add", tmp_path / "latest", "--json").json["digest"] == digest


FILES = [
    "model_index.json",
    "README.md",
    "vae/diffusion_pytorch_model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
]


def test_weights_and_indexes_of_every_kind_are_asked_for() -> None:
    wanted = [name for name in FILES if name.startswith("unet/") and "config" not in name and ".bin" not in name]
    assert list(filter_repo_objects(FILES, allow_patterns=hub_patterns("unet"))) == wanted
    own = [name.removeprefix("unet/") for name in wanted]
    assert list(filter_repo_objects([*own, "config.json", "model.bin"], allow_patterns=hub_patterns(""))) == own


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's protocol that downloads a repository; `server.folder` holds the files of its one commit."""

    server: Any

    def do_HEAD(self) -> None:
        """Answer what is asked about a file."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer with the repository's listing, or a file."""
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/me/tiny/revision/"):
            self._answer(json.dumps({"id": "me/tiny", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"/api/models/me/tiny/tree/{COMMIT}"):
            files = sorted(each for each in self.server.folder.rglob("*") if each.is_file())
            self._answer(json.dumps([self._entry(each) for each in files]).encode())
        elif path.startswith(f"/me/tiny/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/me/tiny/resolve/{COMMIT}/")
            if self.command == "GET":
                self.server.fetched.append(name)
            self._answer((self.server.folder / name).read_bytes())
        else:
            self.send_error(404)

    def _entry(self, path: Path) -> dict[str, Any]:
        name = str(path.relative_to(self.server.folder))
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}

    def _answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    """A Hub on this machine that has the repository me/tiny, whose files lie in `folder`."""
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.fetched = tmp_path / "repository", []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_sharded_variant_comes_from_the_hub(
    hub: Any, cli: Cli, tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(hub.folder, **FP16, **SHARDS)
    (hub.folder / "vae").mkdir()
    (hub.folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"not asked for")
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    # The Hub's client read its environment when it was imported.
    own = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}"}
    for name, value in {**own, "HF_HUB_CACHE": str(tmp_path / "hf"), "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)
    answer = cli("models", "add", "hf:me/tiny", "--json")
    assert answer.code == 0, answer.err
    view = answer.json
    assert (view["name"], view["source"]) == ("tiny", "hf:me/tiny")
    assert view["digest"] == import_model(store, hub.folder).digest
    assert set(hub.fetched) == {
        str(path.relative_to(hub.folder)) for path in hub.folder.rglob("*") if path.is_file() and "vae" not in str(path)
    }
