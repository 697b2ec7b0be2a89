"""The guest's image: its parts, and that vbus works in it (a real boot). R50."""

import gzip
import lzma
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from vbus.errors import InvalidError
from vbus.vm import base, elf, image, tree
from vbus.vm.debian import UnavailableError
from vbus.vm.kernel import extract_vmlinux
from vbus.vm.qemu import Qemu, fetch

ELF_FILE = b"\x7fELF and the rest of a kernel"
BOOT_TIMEOUT_S = 150
INIT = """#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
/bin/busybox --install -s /bin 2>/dev/null
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
try() { if "$@" >/tmp/out 2>&1; then echo "OK $1"; else cat /tmp/out; fi; }
try vbus --help
try python3 -c 'import vbus, proxy, shm, ioq, backends.venet'
python3 -c '
from importlib.metadata import entry_points
for group in ("vbus.device_classes", "vbus.commands", "vbus.drivers"):
    for entry in entry_points(group=group):
        entry.load()
        print("ENTRY", group, entry.name)
'
for tool in lspci iperf3 /usr/sbin/ip ethtool mkfs.ext4 kmod; do
    for option in --version -V; do
        $tool $option >/dev/null 2>&1 && echo "OK $tool"
    done
done
for module in MODULES; do
    modprobe $module && echo "OK $module"
done
echo "AGENT $(cat /usr/lib/vbus-guest/agent.py)"
poweroff -f
"""


def bz_image(payload: bytes) -> bytes:
    """Make a bzImage with one sector of set-up code, the payload 16 bytes later."""
    head = bytearray(1024)
    head[0x1F1] = 1
    struct.pack_into("<II", head, 0x248, 16, len(payload))
    return bytes(head) + bytes(16) + payload + b"what follows"


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_the_kernel_comes_out_of_its_bz_image(pack: object) -> None:
    assert callable(pack)
    packed = pack(ELF_FILE) + struct.pack("<I", len(ELF_FILE))
    assert extract_vmlinux(bz_image(packed), ["zstd"]) == ELF_FILE


@pytest.mark.parametrize(
    "given", [b"", bytes(4096), bz_image(zlib.compress(ELF_FILE)), bz_image(b"MZ" * 9)]
)
def test_what_is_no_packed_kernel_is_refused(given: bytes) -> None:
    with pytest.raises(InvalidError):
        extract_vmlinux(given, ["zstd"])


def test_needed_libraries_are_those_the_loader_is_asked_for() -> None:
    wanted = elf.needed(Path(sys.executable).resolve())
    assert any(name.startswith("libc.so") for name in wanted)
    assert elf.needed(Path(__file__)) == []


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    folder = tmp_path / "guest"
    folder.mkdir()
    (folder / "init").write_text(INIT.replace("MODULES", " ".join(base.MODULES)))
    (folder / "agent.py").write_text("mark of the agent")
    return folder


def test_the_tree_has_packages_cores_and_entry_points_but_no_sources_of_c(
    guest: Path,
) -> None:
    found = {entry.place: entry for entry in tree.entries(guest)}
    site = base.SITE
    assert found["init"].program
    assert f"{site}/shm/_core.abi3.so" in found
    assert f"{site}/backends/venet/__init__.py" in found
    assert not [place for place in found if place.endswith((".c", ".h", ".pyc"))]
    points = next(found[p].content for p in found if p.endswith("entry_points.txt"))
    assert b"[vbus.device_classes]" in points


def test_a_tree_that_changed_has_another_digest(guest: Path) -> None:
    before = tree.digest(tree.entries(guest))
    assert tree.digest(tree.entries(guest)) == before
    (guest / "agent.py").write_text("another")
    assert tree.digest(tree.entries(guest)) != before


def test_an_installation_without_the_guests_files_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"lacks .*init"):
        tree.entries(tmp_path)


def test_requirements_are_those_of_running_not_of_developing() -> None:
    named = " ".join(base.recipe().requirements)
    assert "trio" in named
    assert "pytest" not in named
    assert base.recipe(["b", "a", "a"]).packages == ("a", "b")


def test_without_pip_the_bundled_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = [sys.executable, "-S"]  # without site-packages there is no pip
    monkeypatch.setattr(base, "_own_pip", lambda: [*bare, "-m", "pip"])
    words = base._pip()
    assert words[-1].endswith(".whl/pip")
    done = subprocess.run([*words, "--version"], capture_output=True, check=True)
    assert done.stdout.startswith(b"pip ")


def test_no_packages_of_debian_leaves_nothing_in_the_cache(
    tmp_path: Path, guest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("DEBIAN_MIRROR", f"file:{tmp_path}/nowhere")
    with pytest.raises(UnavailableError, match="cannot be had"):
        image.cached(guest=guest)
    assert [p.name for p in (tmp_path / "vbus").iterdir() if p.is_dir()] == []


def had_or_skip(guest: Path) -> tuple[Qemu, image.GuestImage]:
    try:
        return fetch(), image.cached(guest=guest)
    except UnavailableError as error:
        if os.environ.get("VBUS_VM_REQUIRED"):
            raise
        pytest.skip(str(error))


def boot(qemu: Qemu, made: image.GuestImage) -> str:
    words = "-accel tcg,thread=multi -cpu qemu64,+rdrand -smp 2 -m 768M -M q35"
    words += " -nodefaults -display none -serial stdio -no-reboot"
    done = subprocess.run(
        [
            *(str(qemu.path), *words.split(), "-kernel", str(made.kernel)),
            *("-initrd", str(made.initramfs)),
            *("-append", "console=ttyS0 quiet tsc=reliable"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=BOOT_TIMEOUT_S,
    )
    return done.stdout


@pytest.mark.vm
@pytest.mark.slow
def test_vbus_its_entry_points_tools_and_modules_work_in_a_booted_guest(
    guest: Path,
) -> None:
    """R50: an ordinary Linux guest has what it takes to drive the bridge."""
    qemu, made = had_or_skip(guest)
    said = boot(qemu, made).splitlines()
    expected = {"OK vbus", "OK python3", "AGENT mark of the agent"}
    tools = ("lspci", "iperf3", "/usr/sbin/ip", "ethtool", "mkfs.ext4", "kmod")
    expected |= {f"OK {name}" for name in (*tools, *base.MODULES)}
    expected |= {
        "ENTRY vbus.device_classes venet",
        "ENTRY vbus.commands guest.run",
        "ENTRY vbus.drivers virtual-ethernet",
    }
    assert expected - set(said) == set(), "\n".join(said)


def test_build_puts_both_files_and_nothing_else_into_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = image.GuestImage(tmp_path / "vmlinux", tmp_path / "initramfs.cpio")
    for source in (made.kernel, made.initramfs):
        source.write_text(source.name)
    monkeypatch.setattr(image, "cached", lambda *_, **__: made)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/vmlinux").write_text("an old one, longer than the new")
    copy = image.build(tmp_path / "out")
    assert copy.kernel.read_text() == "vmlinux"
    assert sorted(os.listdir(tmp_path / "out")) == ["initramfs.cpio", "vmlinux"]
