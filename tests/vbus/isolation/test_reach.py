"""What devices say they open, and whether a backend may."""

from pathlib import Path

import pytest

from backends.virtio.classes import VirtioBlkDevice, VirtioConsoleDevice
from vbus.isolation import Reach


@pytest.mark.parametrize("kind", ["read", "write", "listen"])
def test_what_lies_below_is_within_reach_and_nothing_beside(
    kind: str, tmp_path: Path
) -> None:
    (tmp_path / "out").symlink_to("/etc")

    def reach(path: Path) -> Reach:
        return Reach(**{kind: (path,)})  # type: ignore[arg-type]

    held = reach(tmp_path)
    assert held.lacks(reach(tmp_path)) is None
    assert held.lacks(reach(tmp_path / "below" / "it")) is None
    for other in (tmp_path.parent, tmp_path / ".." / "x", tmp_path / "out" / "passwd"):
        assert held.lacks(reach(other)) == other


def test_reading_is_no_writing(tmp_path: Path) -> None:
    reads, writes = Reach(read=(tmp_path,)), Reach(write=(tmp_path,))
    assert reads.lacks(writes) == tmp_path
    assert writes.lacks(reads) is None
    assert reads.and_(writes).lacks(writes) is None


def test_a_disk_reaches_its_image_which_is_there_by_then(tmp_path: Path) -> None:
    image = tmp_path / "image"
    said = {"path": str(image), "size": 4096, "readonly": False}
    assert VirtioBlkDevice.reach(said) == Reach(write=(image,))
    assert image.stat().st_size == 4096
    said["readonly"] = True
    assert VirtioBlkDevice.reach(said) == Reach(read=(image,))


def test_a_console_reaches_its_logs_and_the_folders_of_its_sockets(
    tmp_path: Path,
) -> None:
    log, port = tmp_path / "log", tmp_path / "ports" / "p"
    found = VirtioConsoleDevice.reach({"to": ("pty", f"log:{log}", f"unix:{port}")})
    assert log in found.write
    assert log.exists()
    assert found.listen == (port.parent,)
    assert found.listens
