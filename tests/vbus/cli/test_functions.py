"""`vbus device ...` for devices that are PCI functions of their own."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.served import Served

CONFIG = """
[[bus]]
name = "bus0"
[[device]]
name = "rng0"
class = "virtio-rng"
expose = "pci"
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("daemon"), CONFIG) as served:
        yield served


def socket_of(daemon: Served, name: str) -> Path:
    return daemon.runtime / "functions" / f"{name}.sock"


def test_qemu_args_name_the_socket_and_shared_memory(daemon: Served) -> None:
    words = shlex.split(daemon.vbus("device", "qemu-args", "rng0").stdout)
    assert "memory-backend-memfd,id=mem,size=768M,share=on" in words
    assert "intel-iommu,intremap=on,caching-mode=on" not in words
    shown = json.loads(words[-1])
    assert shown["socket"]["path"] == str(socket_of(daemon, "rng0"))
    assert shown["id"] == "vbus-rng0"


def test_qemu_args_to_add_have_the_device_alone(daemon: Served) -> None:
    words = shlex.split(daemon.vbus("device", "qemu-args", "rng0", "--add").stdout)
    assert words[0] == "-device"
    assert len(words) == 2
    done = daemon.vbus("device", "qemu-args", "rng0", "--iommu", "intel")
    assert "intel-iommu" in done.stdout


def test_a_device_on_a_bus_has_no_qemu_args(daemon: Served) -> None:
    done = daemon.vbus("device", "qemu-args", "echo0")
    assert done.returncode == 1
    assert done.stderr == (
        "vbus: echo0 is not exposed by pci: its guests have qemu-args\n"
    )


def test_a_device_is_exposed_shown_and_removed_by_commands(daemon: Served) -> None:
    """R11, R14."""
    added = daemon.ask(
        "device", "add", "disk0", "--class", "virtio-blk", "--expose", "pci",
        "--layout", "transitional", f"path={daemon.runtime}/disk", "size=1M",
    )  # fmt: skip
    assert (added["expose"], added["layout"]) == ("pci", "transitional")
    assert Path(added["socket"]).is_socket()
    shown = daemon.vbus("device", "show", "disk0").stdout
    for words in ("transitional", "disk0.sock", "config_reads"):
        assert words in shown
    assert daemon.ask("stats", "functions/disk0/function")["mode"] == "unknown"
    assert daemon.vbus("device", "del", "disk0").returncode == 0
    assert not socket_of(daemon, "disk0").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--class", "virtio-rng", "--expose", "pci", "--layout", "x"),
            "no layout 'x'",
        ),
        (("--class", "virtio-rng", "--expose", "pci", "--bus", "bus0"), "on no bus"),
        (("--class", "echo", "--expose", "pci"), "can be shown on a bus only"),
        (("--class", "virtio-rng", "--layout", "modern"), 'expose = "pci" only'),
    ],
)
def test_what_does_not_go_together_is_refused(
    daemon: Served, words: tuple[str, ...], said: str
) -> None:
    done = daemon.vbus("device", "add", "new0", *words)
    assert done.returncode == 1
    assert said in done.stderr
    assert "new0" not in daemon.vbus("device", "show").stdout
