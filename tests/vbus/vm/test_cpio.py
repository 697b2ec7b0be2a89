"""The cpio writer, read back by another implementation and by a reader of our own."""

import io
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vbus.vm import cpio


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "bin").mkdir(parents=True)
    (root / "bin/prog").write_bytes(b"#!/bin/sh\n")
    (root / "bin/prog").chmod(0o755)
    (root / "odd é").write_bytes(bytes(range(7)))
    (root / "empty").touch()
    (root / "link").symlink_to("bin/prog")
    (root / "dangling").symlink_to("/nowhere")
    (root / "looped").symlink_to(".")
    return root


def packed(root: Path) -> bytes:
    out = io.BytesIO()
    cpio.pack(root, out)
    return out.getvalue()


def names(archive: bytes) -> list[str]:
    """Walk the headers by the format's rules."""
    found, at = [], 0
    while at < len(archive):
        head = archive[at : at + 110]
        assert head[:6] == b"070701"
        size, name_size = int(head[54:62], 16), int(head[94:102], 16)
        raw = archive[at + 110 : at + 110 + name_size]
        assert raw.endswith(b"\0")
        found.append(os.fsdecode(raw[:-1]))
        at += 110 + name_size
        at += -at % 4
        at += size
        at += -at % 4
    assert at == len(archive)
    return found


def test_folders_come_before_what_is_in_them(tree: Path) -> None:
    assert names(packed(tree)) == [
        *("bin", "bin/prog", "dangling", "empty", "link", "looped", "odd é"),
        "TRAILER!!!",
    ]


def test_archives_one_after_the_other_stay_aligned(tree: Path) -> None:
    once = packed(tree)
    assert names(once + once) == names(once) * 2


def test_the_same_tree_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(tree, again, symlinks=True)
    os.utime(again / "empty", (1, 1))
    assert packed(tree) == packed(again)


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs the program cpio")
def test_cpio_gives_the_tree_back(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(
        ["cpio", "-i", "-d", "--quiet"], input=packed(tree), cwd=out, check=True
    )
    assert (out / "bin/prog").read_bytes() == b"#!/bin/sh\n"
    assert (out / "bin/prog").stat().st_mode & 0o777 == 0o755
    assert (out / "odd é").read_bytes() == bytes(range(7))
    assert (out / "empty").read_bytes() == b""
    assert (out / "dangling").readlink() == Path("/nowhere")


def test_a_socket_is_refused(tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    with pytest.raises(ValueError, match="pipe: neither"):
        packed(tree)
