"""Which QEMU is taken, and which is refused."""

import os
from pathlib import Path

import pytest

from vbus.errors import InvalidError
from vbus.vm import qemu

FIT = """#!/bin/sh
[ "$1" = --version ] && echo "QEMU emulator version 10.1.2 (Debian)"
[ "$1" = -device ] && echo 'name "vfio-user-pci", bus PCI'
exit 0
"""


@pytest.fixture(autouse=True)
def nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "path").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    monkeypatch.delenv("VBUS_QEMU", raising=False)


def put(path: Path, text: str = FIT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_the_chosen_one_goes_before_the_cache_before_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path = put(tmp_path / "path/qemu-system-x86_64")
    assert qemu.find() == qemu.Qemu(on_path, "10.1.2")
    cached = put(tmp_path / "cache/vbus/qemu-trixie-backports/qemu")
    assert qemu.find() == qemu.Qemu(cached, "10.1.2")
    chosen = put(tmp_path / "mine")
    monkeypatch.setenv("VBUS_QEMU", str(chosen))
    assert qemu.find() == qemu.Qemu(chosen, "10.1.2")


def test_one_without_the_client_is_passed_over(tmp_path: Path) -> None:
    old = FIT.replace("vfio-user-pci", "vfio-pci")
    put(tmp_path / "path/qemu-system-x86_64", old)
    assert qemu.find() is None


def test_a_chosen_one_that_is_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VBUS_QEMU", str(tmp_path / "nothing"))
    with pytest.raises(InvalidError, match="nothing is no QEMU with vfio-user-pci"):
        qemu.find()


def test_a_failed_fetch_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEBIAN_MIRROR", f"file:{tmp_path}/nowhere")
    with pytest.raises(qemu.UnavailableError, match="cannot be had"):
        qemu.fetch()
    assert os.listdir(tmp_path / "cache/vbus") == [".qemu-trixie-backports.lock"]
