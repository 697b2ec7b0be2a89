"""What is pure or short of the demo: its traffic, its configuration, its table."""

import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vbus.cli.demo import demo, report, traffic
from vbus.cli.demo.machines import ADDRESSES
from vbus.cli.demo.scenario import config

RESULT: dict[str, Any] = {
    "accelerator": "TCG",
    "guests": {
        "vm1": {"boot_s": 3.42, "running_s": 9.5, "function": "x: by vfio"},
        "p3": {"boot_s": None, "running_s": 0.4, "function": ""},
    },
    "ping_rtt_us": {"vm1-p3": 812.4},
    "tcp_gbit_s": {"vm1-p3": 1.25},
    "checksums": {"vm1-p3": {"bytes": 64 << 20, "crc32": "51ed2b70"}},
    "killed": {
        "held_before": {"mapped_bytes": 768 << 20, "regions": 6},
        "freed_ms": 65.2,
    },
    "hot_plug_ms": {"add_to_running": 57, "remove_to_gone": 56},
    "reattach_ms": 6633,
    "frames": 10,
    "events": 5,
    "interrupts": 2,
    "frames_per_interrupt": 5.0,
    "calls": 60,
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def received(port: int) -> "subprocess.Popen[str]":
    """A receiver that listens."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(traffic.__file__)), "receive", str(port)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_both_ends_tell_the_same_checksum(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    with received(port) as sink:
        traffic.main(["send", "127.0.0.1", str(port), "3"])
        size, took, crc = sink.communicate()[0].split()
    assert capsys.readouterr().out.split() == ["sending", size, crc]
    assert int(size) == 3 << 20
    assert float(took) > 0


def test_the_receiver_tells_the_checksum_of_what_came() -> None:
    """The check value of CRC-32: that of the digits 1 to 9."""
    port = free_port()
    with received(port) as sink:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(b"123456789")
        size, _, crc = sink.communicate()[0].split()
    assert (size, crc) == ("9", "cbf43926")


def test_each_guest_has_a_bus_and_a_port() -> None:
    found = tomllib.loads(config(ADDRESSES, uplink=True))
    assert [one["name"] for one in found["guest"]] == ["vm1", "vm2", "p3"]
    assert [one["bus"] for one in found["guest"]] == ["vm1", "vm2", "p3"]
    ports = [one for one in found["device"] if one["class"] == "venet"]
    assert [one["bus"] for one in ports] == ["vm1", "vm2", "p3"]


def test_the_table_tells_of_each_machine_and_pair() -> None:
    rows = list(report._rows(RESULT))
    assert rows[:3] == [
        ("boot", "vm1", "3.4 s"),
        ("guest run", "vm1", "running after 9.5 s: machine under TCG, x: by vfio"),
        ("guest run", "p3", "running after 0.4 s: process"),
    ]
    assert ("TCP", "vm1-p3", "1.25 Gbit/s") in rows
    whole = "64 MiB, CRC-32 51ed2b70 at both ends"
    assert ("TCP arrived whole", "vm1-p3", whole) in rows
    freed = "768 MiB in 6 regions freed after 65 ms"
    assert ("kill -9 of its QEMU", "vm2", freed) in rows


def test_without_machines_the_table_is_about_the_two_processes() -> None:
    plain = {
        key: value
        for key, value in RESULT.items()
        if key not in ("accelerator", "guests", "checksums", "killed")
    }
    rows = list(report._rows(plain))
    assert [row[1] for row in rows if row[0] in ("hot add", "hot drop")] == ["g1", "g1"]
    assert ("kill -9, new guest", "g2", "answers after 6633 ms") in rows
    assert not any(row[0] in ("boot", "guest run") for row in rows)


def test_machines_and_generated_frames_exclude_each_other() -> None:
    done = CliRunner().invoke(demo, ["--vm", "--frames"])
    assert done.exit_code == 2
    assert "--vm moves real traffic" in done.output
