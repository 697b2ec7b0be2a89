"""Address spaces that change between batches, under the sanitizers."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests/shm/changing_space.c"
SANITIZERS = ("thread", "address,undefined")


def run(
    where: Path, sanitizer: str, include: Path, rounds: int, seed: int = 1
) -> "subprocess.CompletedProcess[str]":
    program = where / "changing_space"
    options = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        [
            *("gcc", *options, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"),
            *(f"-I{include}", str(SOURCE), "-pthread", "-o", str(program)),
        ],
        check=True,
        timeout=120,
    )
    plain = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*plain, str(program), str(rounds), str(seed)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_maps_change_between_batches(tmp_path: Path, sanitizer: str, seed: int) -> None:
    """R50: no byte outside, no canary read or written, no view of what is gone."""
    done = run(tmp_path, sanitizer, ROOT / "shm/include", 4000, seed)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "ok\n")


FAULTS = {
    "bounds": (
        "*length = region->size - offset < size ? region->size - offset : size;",
        "*length = size;",
    ),
    "read-only": (
        "if (!region || !region->host || (write && !region->writable)) {",
        "if (!region || !region->host || (write && !region->size)) {",
    ),
    "views": ("if (!view->parts[i]->alive)", "if (!view->parts[i])"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_each_check_is_needed(tmp_path: Path, fault: tuple[str, str]) -> None:
    """Without it the program above complains, so it can fail."""
    include = tmp_path / "include"
    shutil.copytree(ROOT / "shm/include", include)
    header = include / "shm/space.h"
    text = header.read_text()
    assert text.count(fault[0]) == 1
    header.write_text(text.replace(*fault))
    assert run(tmp_path, "address,undefined", include, 4000).returncode != 0
