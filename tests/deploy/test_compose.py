"""docker-compose.yml and the processes that stand for it: one description, nothing public, no secret in it."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from deploy.cluster import free_ports, process_variables, started_services, taken_ports
from deploy.compose import FILE, ROOT, defaults, read_services
from deploy.secrets import NAMES, make_secrets

COMPOSE = yaml.safe_load(FILE.read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]
#: What stands for a container, and nothing else, may differ between the two.
OF_CONTAINERS = {
    *("BIND", "DATABASE_HOST", "STORE_HOST", "RAY_HOST", "RAY_NODE_IP", "RAY_NODE", "RAY_DASHBOARD", "RAY_FOLDER"),
    *("SECRETS", "SECRETS_MOUNT", "QUANTMILL_DATA", "DATABASE_DATA", "STORE_DATA"),
    *("CPU_WORKER_CPUS", "GPU_WORKER_CPUS", "GPU_WORKER_GPUS", "CPU_WORKER_MEMORY", "GPU_WORKER_MEMORY"),
}
#: Left to who starts it, for containers and processes alike.
OF_USERS = {"QUANTMILL_TAG", "QUANTMILL_UID", "QUANTMILL_GID", "GPU_WORKER_LABELS", "GPU_WORKER_LOGICAL_GIB"}
PORTS = {"DATABASE_PORT", "STORE_PORT", "RAY_PORT", "RAY_DASHBOARD_PORT", "METRICS_PORT_1", "METRICS_PORT_2"}


def test_processes_differ_from_containers_only_in_what_stands_for_a_container(tmp_path: Path) -> None:
    variables = process_variables(tmp_path, tmp_path / "ray", {})
    assert set(variables) == OF_CONTAINERS
    assert defaults().keys() == OF_CONTAINERS | PORTS | OF_USERS
    containers, processes = read_services({}), started_services(variables)
    assert processes.keys() == containers.keys() - {"cli"}
    for name, process in processes.items():
        container = containers[name]
        assert process.environment.keys() == container.environment.keys()
        assert (process.after, process.restart, process.stop_signal) == (
            container.after,
            container.restart,
            container.stop_signal,
        )
        # Word by word the same, once the values of the variables are taken out.
        values = sorted([*defaults().values(), *variables.values()], key=len, reverse=True)
        for mine, theirs in ((process.command, container.command), (process.check, container.check)):
            assert [_without(word, values) for word in mine] == [_without(word, values) for word in theirs]
    ports = {name: defaults()[name] for name in PORTS}
    for port in ports.values():
        assert any(port in " ".join((*each.command, *each.environment.values())) for each in processes.values())
    assert len(set(ports.values())) == len(ports)


def _without(word: str, values: list[str]) -> str:
    for value in values:
        if len(value) > 1:
            word = word.replace(value, "…")
    return re.sub(r"\d+$", "…", word)


def test_the_topology_is_what_it_says() -> None:
    services = read_services({})
    assert {"database", "store", "schema", "ray-head", "cpu-worker", "gpu-worker"} < services.keys()
    assert [name for name in services if name.startswith("orchestrator")] == ["orchestrator-1", "orchestrator-2"]
    for name, service in services.items():
        body = SERVICES[name]
        # What runs for ever is checked or is a node whose foreground process ends with it.
        assert service.check or not service.restart or name.endswith("worker")
        # What a container publishes is reachable from its host alone.
        assert all(str(port).startswith("127.0.0.1:") for port in body.get("ports", ()))
        assert not {"privileged", "network_mode", "pid", "ipc"} & set(body)
        if body.get("image", "").startswith("quantmill"):
            assert body["cap_drop"] == ["ALL"]
            assert not body["user"].startswith(("0", "root"))
        # Only orchestrators and the command line know the database; nodes that run tasks do not.
        knows = "QUANTMILL_DB" in service.environment
        assert knows == (name.startswith("orchestrator") or name in ("schema", "cli"))
        assert ("database_password" in body.get("secrets", ())) == (knows or name == "database")
    for name in ("ray-head", "cpu-worker", "gpu-worker", "orchestrator-1", "orchestrator-2"):
        environment = services[name].environment
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
    assert SERVICES["gpu-worker"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_no_secret_is_in_the_file_and_each_lies_in_a_file_of_its_owner(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    assert sorted(make_secrets(folder)) == sorted(NAMES) == sorted(COMPOSE["secrets"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    contents = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert [stat.S_IMODE((folder / name).stat().st_mode) for name in NAMES] == [0o600] * len(NAMES)
    assert make_secrets(folder) == []
    # The store's key pair is one, in two forms; half of it lost is all of it made anew.
    key, secret = contents["store_keys"].split(",")
    assert key in contents["store_credentials"]
    assert secret in contents["store_credentials"]
    (folder / "store_keys").unlink()
    assert sorted(make_secrets(folder)) == ["store_credentials", "store_keys"]
    assert (folder / "ray_token").read_text(encoding="utf-8") == contents["ray_token"]
    for service in read_services({}).values():
        for name, value in service.environment.items():
            secret_like = re.search(r"PASSWORD|TOKEN|SECRET|KEY|CREDENTIALS", name) is not None
            assert not secret_like or value.startswith("/run/secrets/"), name
            assert "@" not in value or re.search(r"//[^:/]+@", value), name
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8") + (ROOT / ".dockerignore").read_text(encoding="utf-8")
    assert ignored.count("deploy/secrets/") == 2


def test_secrets_are_made_by_a_command_that_can_be_asked_what_it_does(tmp_path: Path) -> None:
    def call(*words: str) -> str:
        command = [sys.executable, "-m", "deploy.secrets", *words]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert call("--help").startswith("usage: python -m deploy.secrets")
    assert list(tmp_path.iterdir()) == []
    assert call("mine").startswith("mine: made ")
    assert {each.name for each in (tmp_path / "mine").iterdir()} == set(NAMES)


def test_the_image_is_built_in_stages_of_what_the_project_pins_and_runs_as_nobody_special() -> None:
    lines = [line.split() for line in (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8").splitlines() if line]
    assert sum(words[0] == "FROM" for words in lines) == 2
    assert [words[1] for words in lines if words[0] == "USER"][-1] not in ("root", "0")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = [pin for pin in project["dependencies"] if pin.startswith("torch==")]
    text = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
    assert f'"{torch}"' in text
    assert "cluster" in project["optional-dependencies"]
    (ray,) = [pin for pin in project["dependencies"] if pin.startswith("ray==")]
    assert project["optional-dependencies"]["cluster"] == [ray.replace("ray", "ray[default]")]
    # Every file that the compose file or the image names is there.
    named = re.findall(r"(?<!/)deploy/[\w.-]+|-m deploy\.\w+", FILE.read_text(encoding="utf-8") + text)
    for name in {each for each in named if each not in ("deploy/secrets",)}:
        path = ROOT / (f"{name.removeprefix('-m ').replace('.', '/')}.py" if name.startswith("-m ") else name)
        assert path.exists(), name


def test_prometheus_scrapes_the_orchestrators() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    ports = {defaults()["METRICS_PORT_1"], defaults()["METRICS_PORT_2"]}
    (static,) = job["static_configs"]
    assert job["job_name"] == "quantmill"
    assert {target.rpartition(":")[2] for target in static["targets"]} == ports
    assert {target.rpartition(":")[0] for target in static["targets"]} == {"127.0.0.1"}
    assert config["rule_files"] == ["alerts.yml"]


def test_ports_that_are_free_are_told_from_those_that_are_taken() -> None:
    import socket

    ports = free_ports()
    assert ports.keys() == PORTS
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert taken_ports(ports | {"RAY_PORT": port}) == [f"RAY_PORT={port}"]


@pytest.mark.parametrize("text", ["$NAME", "${NAME:?needed}", "${NAME}"])
def test_what_is_not_understood_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "compose.yml"
    file.write_text(f"services: {{one: {{command: ['{text}']}}}}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"compose file: got"):
        read_services({}, file)
    file.write_text("services: {one: {command: ['${NAME:-a$$b}', '$${NAME}']}}".replace("a$$b", "ab"), encoding="utf-8")
    assert read_services({"NAME": "x"}, file)["one"].command == ("x", "${NAME}")
