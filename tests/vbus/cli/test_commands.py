"""The commands of `vbus`, against a real daemon: JSON, exit statuses, live changes."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from proxy.guest import attach
from tests.system.served import WITHIN_S, Served
from vbus.errors import VbusError

CONFIG = """
[[bus]]
name = "bus0"
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "lan0-g1"
class = "venet"
bus = "bus0"
switch = "lan0"
[[guest]]
name = "g1"
bus = "bus0"
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path, CONFIG) as served:
        yield served


def refused(daemon: Served, status: int, *words: str) -> str:
    """Run a command that fails so; give its one line."""
    done = daemon.vbus(*words)
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("vbus: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def without_daemon(tmp_path: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "vbus", "-R", tmp_path, *words],
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
    )


def test_json_has_stable_keys(daemon: Served) -> None:
    """R11: programs read what people read."""
    [bus] = daemon.ask("bus", "show")
    assert bus == {
        "name": "bus0",
        "devices": [{"id": 0, "name": "lan0-g1", "type": "virtual-ethernet"}],
        "guests": ["g1"],
    }
    keys = {"name", "class", "type", "links", "attributes", "connections", "expose"}
    assert [set(one) for one in daemon.ask("device", "show")] == [keys, keys]
    [port] = daemon.ask("device", "show", "lan0-g1")
    assert port["links"] == [{"bus": "bus0", "id": 0}]
    assert port["attributes"]["switch"] == "lan0"
    [guest] = daemon.ask("guest", "show")
    assert guest["socket"] == str(daemon.socket("g1"))
    assert {"name", "bus", "msix", "attached", "pci", "connections"} < set(guest)
    assert set(daemon.ask("tree")) == {"buses", "devices", "guests"}
    classes = {one["name"]: one for one in daemon.ask("class", "show")}
    assert {"echo", "switch", "venet"} <= set(classes)
    assert classes["venet"]["attributes"]["switch"]["required"] is True


def test_stats_are_a_tree_that_a_path_cuts(daemon: Served) -> None:
    everything = daemon.ask("stats")
    kinds = {"daemon", "bus", "device", "function", "backend", "guest"}
    assert set(everything) == kinds
    assert set(everything["guest"]["g1"]) == {"bridge", "server", "memory"}
    assert daemon.ask("stats", "guest/g1/bridge")["fast_calls"] == 0
    assert daemon.ask("stats", "/device/lan0/") == everything["device"]["lan0"]
    assert daemon.ask("stats", "devices/lan0") == everything["device"]["lan0"]
    assert daemon.ask("stats", "bus/bus0") == {"devices": 1, "guests": 1, "ids": 1}
    assert daemon.ask("stats", "daemon")["resident_kib"] > 1000
    assert daemon.vbus("stats", "device/lan0/macs").stdout == "device/lan0/macs: 1\n"
    assert "device/x" in refused(daemon, 1, "stats", "device/x")


def test_the_bus_counts_what_each_device_is_asked(daemon: Served) -> None:
    """Calls, refusals and how long they took, whatever the device counts itself."""
    assert daemon.vbus("device", "add", "e", "--class", "echo", "--bus", "bus0")

    async def ask() -> None:
        async with attach(daemon.socket("g1")) as bridge:
            device = await bridge.open("e")
            for _ in range(5):
                await device.call(0, b"hello")
            with pytest.raises(VbusError):
                await device.call(77, b"")

    trio.run(ask)
    counted = daemon.ask("stats", "device/e/bus")
    latency = counted.pop("latency")
    assert counted == {
        "connections": 0,
        "opens": 1,
        "shares": 0,
        "calls": 6,
        "refusals": 1,
        "signals": 0,
        "coalesced": 0,
    }
    assert sum(latency["buckets"]) == latency["count"] == 6
    assert latency["total_us"] > 0


def test_devices_come_and_go_while_it_runs(daemon: Served) -> None:
    add = ("device", "add", "g2", "--class", "venet", "--bus", "bus0")
    added = daemon.ask(*add, "switch=lan0", "mtu=1400")
    assert added["links"] == [{"bus": "bus0", "id": 1}]
    assert added["attributes"]["mtu"] == 1400
    assert daemon.ask("device", "unlink", "bus0", "g2") == {
        "bus": "bus0",
        "device": "g2",
    }
    assert daemon.ask("device", "link", "bus0", "g2")["id"] == 2  # never 1 again
    assert daemon.ask("device", "set", "lan0", "mac_limit=7")["name"] == "lan0"
    [lan] = daemon.ask("device", "show", "lan0")
    assert lan["attributes"]["mac_limit"] == 7
    assert "used by" in refused(daemon, 1, "device", "del", "lan0")
    for name in ("g2", "lan0-g1", "lan0"):
        done = daemon.vbus("device", "del", name)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert daemon.ask("device", "show") == []


def test_buses_and_guests_come_and_go_while_it_runs(daemon: Served) -> None:
    assert daemon.ask("bus", "add", "bus1")["name"] == "bus1"
    done = daemon.vbus("guest", "add", "g2", "--bus", "bus1", "--no-msix")
    assert done.stdout == f"{daemon.socket('g2')}\n"
    assert daemon.socket("g2").is_socket()
    assert daemon.ask("guest", "show", "g2")[0]["msix"] is False
    assert "still has" in refused(daemon, 1, "bus", "del", "bus1")
    assert daemon.ask("guest", "del", "g2") == {"name": "g2"}
    assert not daemon.socket("g2").exists()
    assert daemon.ask("bus", "del", "bus1") == {"name": "bus1"}


def test_a_refusal_is_one_line_and_status_1(daemon: Served) -> None:
    assert "exists" in refused(daemon, 1, "bus", "add", "bus0")
    assert "no device 'x'" in refused(daemon, 1, "device", "show", "x")
    add = ("device", "add", "x", "--class", "venet", "switch=lan0")
    assert "no attribute" in refused(daemon, 1, *add, "nonesuch=1")
    assert "mtu" in refused(daemon, 1, *add, "mtu=many")


@pytest.mark.parametrize(
    "words",
    [
        ("nonesuch",),
        ("device", "nonesuch"),
        ("device", "add", "x"),
        ("device", "add", "x", "--class", "echo", "not-a-pair"),
        ("device", "set", "x"),
        ("guest", "add", "g", "--bus", "b", "--uid", "-1"),
        ("--nonesuch",),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    done = without_daemon(tmp_path, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("vbus: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [("tree",), ("events",), ("device", "add", "x")])
def test_without_a_daemon_the_status_is_3(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    option = ("--class", "echo") if "add" in words else ()
    done = without_daemon(tmp_path, *words, *option)
    assert done.returncode == 3
    assert done.stderr.startswith(f"vbus: no daemon at {tmp_path}/control.sock")
    assert done.stderr.count("\n") == 1


def test_a_daemon_that_does_not_answer_is_status_4(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "control.sock"))
        silent.listen()
        done = without_daemon(tmp_path, "--timeout", "0.3", "tree")
    assert done.returncode == 4
    assert done.stderr == "vbus: the daemon does not answer\n"


def test_debug_shows_where_it_failed(tmp_path: Path) -> None:
    done = without_daemon(tmp_path, "--debug", "tree")
    assert done.returncode == 3
    assert "Traceback" in done.stderr
    assert "UnreachableError" in done.stderr


def test_events_are_one_json_object_a_line_until_sigint(daemon: Served) -> None:
    """The first line says from where on nothing is missing."""
    with subprocess.Popen(
        [sys.executable, "-m", "vbus", "events"],
        env=daemon.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watcher:
        assert watcher.stdout is not None
        assert json.loads(watcher.stdout.readline()) == {"event": "start"}
        daemon.vbus("device", "set", "lan0", "mac_limit=7")
        assert json.loads(watcher.stdout.readline()) == {
            "event": "device-changed",
            "device": "lan0",
            "attribute": "mac_limit",
        }
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(WITHIN_S) == 130
        assert watcher.stderr is not None
        assert "Traceback" not in watcher.stderr.read()


def test_events_begin_with_the_tree_if_wanted(daemon: Served) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "vbus", "events", "--tree"],
        env=daemon.environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as watcher:
        assert watcher.stdout is not None
        first = json.loads(watcher.stdout.readline())
        watcher.send_signal(signal.SIGINT)
        watcher.wait(WITHIN_S)
    assert first.pop("event") == "tree"
    assert first == daemon.ask("tree")


def test_tables_are_whole_and_without_colour_for_programs(daemon: Served) -> None:
    """One device, one line, however long; NO_COLOR or no terminal: no escapes."""
    shown = daemon.vbus("device", "show").stdout
    assert "\x1b" not in shown
    [line] = [line for line in shown.splitlines() if "lan0-g1" in line]
    assert "bus0:0" in line
    assert "switch=lan0" in line
    assert "client_mac=" in line
    tree = daemon.vbus("tree").stdout
    assert "guest g1, not attached" in tree


def test_every_command_has_help_and_takes_json(tmp_path: Path) -> None:
    """The tree of commands as people find it; guest.run comes from an entry point."""
    listing = without_daemon(tmp_path, "--help").stdout
    for word in ("bus", "class", "device", "guest", "events", "stats", "tree", "serve"):
        assert f"\n  {word} " in listing
    assert "\n  run " in without_daemon(tmp_path, "guest", "--help").stdout
    shown = without_daemon(tmp_path, "device", "add", "--help")
    assert shown.returncode == 0
    assert "--json" in shown.stdout


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("nonesuch.module:run", "ModuleNotFoundError"),
        ("vbus.cli:nonesuch", "AttributeError"),
        ("vbus.cli:main", "is no command"),
        ("broken:run", "RuntimeError: what a pity"),
    ],
)
def test_a_broken_command_of_another_package_costs_one_line(
    tmp_path: Path, value: str, reason: str
) -> None:
    """The help still lists all others, and whoever asks for it is told."""
    (tmp_path / "broken.py").write_text("raise RuntimeError('what\\na pity')\n")
    info = tmp_path / "stranger-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\n")
    entries = f"[vbus.commands]\nstrange = {value}\n"
    (info / "entry_points.txt").write_text(entries)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for words, status in ((["--help"], 0), (["strange"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "vbus", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
        )
        first, *others = done.stderr.splitlines()
        assert first.startswith("vbus: the command 'strange' of stranger is broken: ")
        assert reason in first
        assert len(others) == (status != 0)
        assert done.returncode == status
        assert ("\n  serve " in done.stdout) == (status == 0)
