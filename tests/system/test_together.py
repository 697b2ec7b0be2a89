"""Backends, functions and what operators see of both, in one daemon."""

import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.served import Served

CONFIG = """
[[backend]]
name = "far"
classes = ["echo"]
[[bus]]
name = "bus0"
[[device]]
name = "rng0"
class = "virtio-rng"
expose = "pci"
layout = "transitional"
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path, CONFIG) as served:
        yield served


def apply(daemon: Served, text: str) -> tuple[int, list[str]]:
    file = daemon.runtime / "desired.toml"
    file.write_text(text)
    done = daemon.vbus("apply", str(file))
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_what_is_saved_makes_the_same_again(daemon: Served) -> None:
    """How devices are shown and where they live is part of it."""
    saved = daemon.vbus("save").stdout
    assert tomllib.loads(saved) == tomllib.loads(CONFIG)
    echo = daemon.ask("device", "show", "echo0")
    assert apply(daemon, saved)[0] == 0
    assert daemon.ask("device", "show", "echo0") == echo
    text = saved.replace("transitional", "modern")
    assert apply(daemon, text)[0] == 0
    (rng,) = daemon.ask("device", "show", "rng0")
    assert (rng["expose"], rng["layout"]) == ("pci", "modern")


def test_a_backend_is_not_changed_while_the_daemon_runs(daemon: Served) -> None:
    status, said = apply(daemon, CONFIG.replace('"far"', '"far"\nrestart_limit = 3'))
    assert status == 1
    assert "restart it" in " ".join(said)


def test_a_function_lives_in_the_daemon_only(daemon: Served) -> None:
    words = ("device", "add", "e1", "--class", "echo", "--expose", "pci")
    done = daemon.vbus(*words)
    assert done.returncode == 1
    assert "lives in backend far" in done.stderr
    added = CONFIG + '[[device]]\nname = "e1"\nclass = "echo"\nexpose = "pci"\n'
    status, said = apply(daemon, added)
    assert status == 1
    assert "lives in backend far" in " ".join(said)


def test_restarted_functions_stay_functions(daemon: Served) -> None:
    assert daemon.vbus("device", "restart", "rng0").returncode == 0
    (rng,) = daemon.ask("device", "show", "rng0")
    assert (rng["expose"], rng["layout"]) == ("pci", "transitional")


def test_both_are_counted(daemon: Served) -> None:
    assert set(daemon.ask("stats", "function/rng0")) == {"function", "server", "memory"}
    assert daemon.ask("stats", "functions/rng0/server")["errors"] == 0
    assert "bus" in daemon.ask("stats", "device/echo0")
    assert daemon.ask("stats", "backend/far")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(daemon.runtime / "metrics.sock"))
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        text = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    assert 'vbus_backend_up{backend="far"} 1.0' in text
    assert 'vbus_function_attached{device="rng0",layout="transitional"} 0.0' in text


def test_attributes_of_far_devices_are_set_all_or_none(tmp_path: Path) -> None:
    config = """
[[backend]]
name = "far"
classes = ["switch"]
[[device]]
name = "lan0"
class = "switch"
mac_limit = 9
"""
    with Served(tmp_path, config) as daemon:
        done = daemon.vbus("device", "set", "lan0", "mac_limit=16", "mac_age_s=-1")
        assert done.returncode == 1
        (lan,) = daemon.ask("device", "show", "lan0")
        assert lan["attributes"]["mac_limit"] == 9
        assert tomllib.loads(daemon.vbus("save").stdout) == tomllib.loads(config)
