"""The C core with both ends as threads, under ThreadSanitizer and the others."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests/ioq/sanitized_stress.c"
INCLUDES = ("shm/include", "ioq/include")
SANITIZERS = ("thread", "address,undefined")
FAILED = 1, 66  # an end that complains, ThreadSanitizer


def build(where: Path, sanitizer: str, includes: list[Path]) -> Path:
    program = where / "stress"
    # gcc warns that it does not model fences; what they order is checked by
    # tests/shm/test_signal_model.py. Hand-over of data needs none.
    options = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-tsan"]
    subprocess.run(
        [
            *("gcc", *options, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"),
            *(f"-I{each}" for each in includes),
            *(str(SOURCE), "-pthread", "-o", str(program)),
        ],
        check=True,
        timeout=120,
    )
    return program


def run(program: Path, messages: int, seed: int) -> "subprocess.CompletedProcess[str]":
    # Without randomised addresses: some kernels place more than old sanitizers know.
    plain = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*plain, str(program), str(messages), str(seed)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_both_ends_as_threads(tmp_path: Path, sanitizer: str) -> None:
    """R12: a million messages there and back, no race, no error, no lost wake-up."""
    program = build(tmp_path, sanitizer, [ROOT / each for each in INCLUDES])
    for seed in range(2):
        done = run(program, 500_000, seed)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "ok\n")


def spoil(where: Path, header: str, old: str, new: str) -> list[Path]:
    """Copies of the headers, one of them changed."""
    copies = []
    for each in INCLUDES:
        copies.append(where / each)
        shutil.copytree(ROOT / each, copies[-1])
        if (changed := copies[-1] / header).exists():
            text = changed.read_text()
            assert text.count(old) == 1
            changed.write_text(text.replace(old, new))
    return copies


RELEASE = """(uint8_t)(1 - ring->me),
                              memory_order_release"""
ACQUIRE = "atomic_load_explicit(&desc->sown, memory_order_acquire)"


@pytest.mark.parametrize("old", [RELEASE, ACQUIRE], ids=["release", "acquire"])
def test_the_order_of_a_hand_over_is_needed(tmp_path: Path, old: str) -> None:
    """Without it ThreadSanitizer sees the race, so the test above can fail."""
    new = old.replace("release", "relaxed").replace("acquire", "relaxed")
    program = build(tmp_path, "thread", spoil(tmp_path, "ioq/ring.h", old, new))
    done = run(program, 20_000, 1)
    assert done.returncode in FAILED
    assert "data race" in done.stderr
