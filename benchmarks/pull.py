"""How fast a release is pulled from S3, beside boto3's own transfer manager on the same objects in the same run.

    python -m benchmarks.pull [--megabytes 1000] [--rounds 5] [--out FILE]

Both are whole processes: `quantmill artifacts pull`, which verifies every byte, and boto3's `download_file` of each
object with its default settings, which verifies nothing. They take turns, so that what else runs on the machine falls
on both. The server is rclone on this machine, so on two cores it shares what both have. Prints one JSON document:
seconds of each round, their medians, the peak of resident memory, all of it for this size and for a tenth of it;
`ratio`, boto3's median by ours with the start of both processes, and `ratio_of_transfer`, the same of what 90 % of the
bytes took, which the start of neither is part of (wanted: 0.8); `flat`, whether memory does not grow with the size.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from benchmarks.cli import give, parser
from orchestrator.db.clock import epoch_seconds
from orchestrator.db.models import Release
from orchestrator.db.queries import add_model, create_job
from orchestrator.db.rows import ModelRow
from orchestrator.db.session import open_database, upgrade
from workers.storage.manifest import put_tree, read_manifest
from workers.storage.store import open_store

WANTED_RATIO = 0.8
_KEY, _SECRET = "testkey", "testsecret"
_DOWNLOAD = """
import json, sys, boto3
from botocore.config import Config
# Services that keep the checksum of a whole object send it with a part of it too.
client = boto3.session.Session().client("s3", config=Config(response_checksum_validation="when_required"))
for key, path in json.load(sys.stdin):
    client.download_file("blobs", key, path)
"""
#: Shares of a release's bytes: one large file of weights, one of a tenth, and what is small.
_SHARES = {"unet/diffusion_pytorch_model.safetensors": 0.88, "vae/diffusion_pytorch_model.safetensors": 0.1}
_SMALL = {f"scheduler/{name}.json": 20_000 for name in ("config", "corrections", "timesteps")}


@contextmanager
def s3_server(folder: Path) -> Iterator[None]:
    """Serve a folder's `blobs` as a bucket, and set the usual variables for it."""
    (folder / "blobs").mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(sys.executable).with_name("rclone"))
    command = [program, "serve", "s3", "--config", "", "--addr", f"127.0.0.1:{port}"]
    server = subprocess.Popen(
        [*command, "--auth-key", f"{_KEY},{_SECRET}", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": _KEY,
        "AWS_SECRET_ACCESS_KEY": _SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield
    finally:
        server.kill()
        server.wait()


def make_release(home: Path, store_url: str, name: str, size: int) -> str:
    """Put a tree of `size` bytes into the store and publish it; return its digest."""
    with tempfile.TemporaryDirectory(prefix="quantmill-bench-") as folder:
        for path, count in ({path: int(share * size) for path, share in _SHARES.items()} | _SMALL).items():
            file = Path(folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as stream:
                for at in range(0, count, 1 << 20):
                    stream.write(secrets.token_bytes(min(1 << 20, count - at)))
        digest = put_tree(open_store(store_url), Path(folder))
    url = f"sqlite:///{home}/quantmill.db"
    upgrade(url)
    database = open_database(url)
    model = ModelRow("bench", hashlib.sha256(b"bench").hexdigest(), "UNet2DModel", "bench", 1, 1, {})
    with database.session() as session:
        job = create_job(
            session, model=add_model(session, model), recipe_name="bench", recipe={}, recipe_digest=model.digest
        )
        values = {"name": name, "version": 1, "digest": digest, "bytes": size, "job_id": job, "metrics": {}}
        session.execute(insert(Release).values(**values, created_at=epoch_seconds()))
    database.close()
    return digest


def timed(command: list[str], document: Any = None) -> dict[str, float]:
    """Run a process to its end; return its seconds by the clock and of CPU, and its peak of memory."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write("" if document is None else json.dumps(document))
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[:5]}: got exit status {process.returncode}, wanted 0")
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}


def round_of(home: Path, store_url: str, name: str, digest: str, folder: Path) -> dict[str, dict[str, float]]:
    """Pull a release by both, each into a new folder that is removed."""
    files = read_manifest(open_store(store_url), digest)["files"]
    place = folder / "plain"
    place.mkdir()
    prefix = store_url.removeprefix("s3://blobs/")
    pairs = [
        (f"{prefix}/sha256/{entry['sha256'][:2]}/{entry['sha256']}", str(place / path.replace("/", "-")))
        for path, entry in files.items()
    ]
    os.sync()
    plain = timed([sys.executable, "-c", _DOWNLOAD], pairs)
    shutil.rmtree(place)
    os.sync()
    options = ["--home", str(home), "--store", store_url]
    ours = timed(
        [sys.executable, "-m", "orchestrator.cli", *options, "artifacts", "pull", f"{name}@1", str(folder / "pulled")]
    )
    shutil.rmtree(folder / "pulled")
    return {"boto3": plain, "quantmill": ours}


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return medians, and every round's seconds."""
    found: dict[str, Any] = {}
    for who in ("boto3", "quantmill"):
        each = [one[who] for one in rounds]
        found[who] = {
            "seconds": round(statistics.median(one["seconds"] for one in each), 3),
            "cpu_seconds": round(statistics.median(one["cpu_seconds"] for one in each), 3),
            "peak_mb": round(max(one["peak_bytes"] for one in each) / 1e6, 1),
            "rounds": [round(one["seconds"], 3) for one in each],
        }
    found["ratio"] = round(found["boto3"]["seconds"] / found["quantmill"]["seconds"], 3)
    return found


def machine() -> Mapping[str, Any]:
    """Return what the figures were measured on."""
    names = [
        line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line
    ]
    return {"cpu": names[0], "cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--megabytes", type=int, default=1000, help="size of the release, in 10^6 bytes")
    arguments.add_argument("--rounds", type=int, default=5, help="how often each pulls it")
    arguments.add_argument("--out", type=Path, help="write the JSON there too")
    options = arguments.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory(prefix="quantmill-bench-") as name:
        folder = Path(name)
        home = folder / "home"
        home.mkdir()
        store_url = "s3://blobs/store"
        with s3_server(folder / "s3"):
            sizes = {"whole": options.megabytes * 10**6, "tenth": options.megabytes * 10**5}
            digests = {each: make_release(home, store_url, each, size) for each, size in sizes.items()}
            work = folder / "work"
            work.mkdir()
            rounds = {
                each: [round_of(home, store_url, each, digest, work) for _ in range(options.rounds)]
                for each, digest in digests.items()
            }
    figures = {each: summary(found) for each, found in rounds.items()}
    took = {who: figures["whole"][who]["seconds"] - figures["tenth"][who]["seconds"] for who in ("boto3", "quantmill")}
    ratio = round(took["boto3"] / took["quantmill"], 3)
    flat = figures["whole"]["quantmill"]["peak_mb"] < 1.25 * figures["tenth"]["quantmill"]["peak_mb"] + 50
    give(
        {
            "megabytes": options.megabytes,
            **about,
            **figures,
            "ratio_of_transfer": ratio,
            "flat": flat,
            "ok": ratio >= WANTED_RATIO,
        },
        options.out,
    )


if __name__ == "__main__":
    main()
