"""The script for Ray Train on a local Ray of two CPU workers."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from e2e.test_launch import Desk, model_folder  # noqa: F401

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'ray[train]'"),
]

PORTS = ("--port", "--dashboard-agent-grpc-port", "--dashboard-agent-listen-port", "--runtime-env-agent-port", "--metrics-export-port")
"""Named, since Ray waits 15 seconds for ports that it chooses itself: too short for a busy machine."""


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@pytest.fixture
def ray_address(tmp_path: Path) -> Iterator[str]:
    """A Ray of its own, with two CPUs, ended with the test."""
    ports = _free_ports(len(PORTS))
    named = [word for name, port in zip(PORTS, ports, strict=True) for word in (name, str(port))]
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "2", "--include-dashboard", "false"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "600", "RAY_AUTH_MODE": "disabled"}
    log = tmp_path / "ray.log"
    with log.open("w") as out:
        process = subprocess.Popen([*words, *named], stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path)
    try:
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{ports[0]}"
    finally:
        process.terminate()
        process.wait(60)


def test_two_workers_of_ray_are_one_training(ray_address: str, tmp_path: Path, model_folder: Path) -> None:  # noqa: F811
    folder = tmp_path / "desk"
    folder.mkdir()
    desk = Desk(folder, model_folder)
    code, text = desk.type(sys.executable, "-m", "orpo", "recipes", "ray_train.py", "--to", ".")
    assert code == 0, text
    process = desk.start(sys.executable, "ray_train.py", "2", "run.yaml", RAY_ADDRESS=ray_address, RAY_AUTH_MODE="disabled")
    text, _ = process.communicate()
    assert process.returncode == 0, text
    facts = json.loads((desk.run / "run.json").read_text())
    assert (facts["status"], facts["world_size"]) == ("complete", 2), text
    lines = [json.loads(line) for line in (desk.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "nll_loss" in line] == [1, 2, 3, 4], text
    assert (desk.run / "model" / "model.safetensors").is_file()
