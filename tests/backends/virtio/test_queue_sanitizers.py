"""The C headers of both ends under sanitizers: as threads, and against bad rings."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.backends.virtio.driver_ring import EVENT_IDX, INDIRECT, PACKED

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
DEVICE, DRIVER = "backends/virtio/include", "proxy/virtio/include"
INCLUDES = ("shm/include", DEVICE, DRIVER)
RINGS = {
    "split": 0,
    "split-event": EVENT_IDX | INDIRECT,
    "packed": PACKED,
    "packed-event": PACKED | EVENT_IDX | INDIRECT,
}
FAILED = 1, 66  # an end that complains, ThreadSanitizer
NO_FUZZER = 77


def build(
    where: Path, source: str, sanitizer: str | None, includes: list[Path], *more: str
) -> Path:
    program = where / f"{source}-{sanitizer}"
    options = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", *more]
    if sanitizer is not None:
        # gcc warns that it does not model fences; hand-over of data needs none.
        options += ["-Wno-tsan", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    subprocess.run(
        [
            *("gcc", *options, *(f"-I{each}" for each in includes)),
            *(str(HERE / f"{source}.c"), "-pthread", "-o", str(program)),
        ],
        check=True,
        timeout=120,
    )
    return program


def run(program: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    # Without randomised addresses: some kernels place more than old sanitizers know.
    plain = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*plain, str(program), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module", params=["thread", "address,undefined"])
def both_ends(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    where = tmp_path_factory.mktemp("both")
    includes = [ROOT / each for each in INCLUDES]
    return build(where, "sanitized_queue", request.param, includes)


@pytest.mark.parametrize("size", [2, 64])
@pytest.mark.parametrize("ring", RINGS)
def test_both_ends_as_threads(both_ends: Path, ring: str, size: int) -> None:
    """R12: no race, no error, no chain and no notification lost."""
    done = run(both_ends, RINGS[ring], size, 50_000, size)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "ok\n")


@pytest.mark.parametrize("words", [(30_000, 1), (1_000, 2, "race")], ids=["", "race"])
def test_programs_of_a_hostile_driver(
    tmp_path: Path, words: tuple[int | str, ...]
) -> None:
    """R12: not a byte outside the chain, whatever the driver does, and when."""
    includes = [ROOT / each for each in INCLUDES]
    program = build(tmp_path, "sanitized_hostile", "address,undefined", includes)
    done = run(program, *words)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "ok\n")


def test_a_fuzzer_that_sees_coverage_finds_nothing(tmp_path: Path) -> None:
    """R12: VBUS_FUZZ_S seconds; scripts/fuzz-virtqueue runs ten minutes."""
    seconds = os.environ.get("VBUS_FUZZ_S", "2")
    done = subprocess.run(
        [ROOT / "scripts" / "fuzz-virtqueue", seconds, tmp_path],
        capture_output=True,
        text=True,
        timeout=120 + int(seconds),
    )
    if done.returncode == NO_FUZZER:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert "number_of_executed_units" in done.stderr
    assert (tmp_path / "corpus" / "program499").stat().st_size == 400


def spoil(where: Path, folder: str, header: str, old: str, new: str) -> list[Path]:
    """Copies of the headers, one of them changed."""
    copies = []
    for each in INCLUDES:
        copies.append(where / each)
        shutil.copytree(ROOT / each, copies[-1])
    changed = where / folder / "virtio" / header
    text = changed.read_text()
    assert text.count(old) == 1
    changed.write_text(text.replace(old, new))
    return copies


ORDERS = {
    "split used index": (
        "split",
        DEVICE,
        "split.h",
        "vq_store_release(vq_used(q)->idx",
        "vq_store(vq_used(q)->idx",
    ),
    "split avail index": (
        "split",
        DEVICE,
        "split.h",
        "q->seen = vq_load_acquire(",
        "q->seen = vq_load(",
    ),
    "packed used flags": (
        "packed",
        DEVICE,
        "packed.h",
        "vq_store_release(desc->flags",
        "vq_store(desc->flags",
    ),
    "packed avail flags": (
        "packed",
        DEVICE,
        "packed.h",
        "uint16_t flags = vq_load_acquire(",
        "uint16_t flags = vq_load(",
    ),
    "driver: split avail index": (
        "split",
        DRIVER,
        "driver.h",
        "vq_store_release(vd_avail(d)->idx",
        "vq_store(vd_avail(d)->idx",
    ),
    "driver: packed avail flags": (
        "packed",
        DRIVER,
        "driver.h",
        "vq_store_release(first->flags",
        "vq_store(first->flags",
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_of_a_hand_over_is_needed(tmp_path: Path, name: str) -> None:
    """Without it ThreadSanitizer sees the race, so the first test can fail."""
    ring, *change = ORDERS[name]
    folder, header, old, new = change
    includes = spoil(tmp_path, folder, header, old, new)
    program = build(tmp_path, "sanitized_queue", "thread", includes)
    done = run(program, RINGS[ring], 64, 20_000, 1)
    assert done.returncode in FAILED
    assert "data race" in done.stderr


@pytest.mark.parametrize("ring", ["split-event", "packed-event"])
def test_a_look_after_the_wish_is_needed(tmp_path: Path, ring: str) -> None:
    """Without it a notification is lost, and the watchdog sees it."""
    header = ring.removesuffix("-event") + ".h"
    old = {
        "split.h": "return vq_load_acquire(vq_avail(q)->idx) != q->at.next_avail;",
        "packed.h": """return vq_packed_is_ready(
        vq_load_acquire(vq_packed_desc(q, q->at.next_avail)->flags), q);""",
    }[header]
    includes = spoil(tmp_path, DEVICE, header, old, "return (void)q, false;")
    impatient = "-DPATIENCE_MS=100"  # a peer that is only late proves the same
    program = build(tmp_path, "sanitized_queue", None, includes, impatient)
    done = run(program, RINGS[ring], 64, 1_000_000, 1)
    assert (done.returncode, done.stderr) == (1, "lost kick\n")
