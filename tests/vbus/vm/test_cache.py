"""The cache of virtual machines: whole folders or none, one maker at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vbus.vm import cache

MAKER = """
import sys, pathlib
from vbus.vm import cache
def make(fresh):
    print("making", flush=True)
    sys.stdin.readline()
    (fresh / "made").write_text("whole")
cache.folder("thing", make, lambda words: print(words, flush=True))
print("done", flush=True)
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vbus"


def fill(fresh: Path) -> None:
    (fresh / "made").write_text("whole")


def maker() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=30)


def test_a_folder_is_made_once(place: Path) -> None:
    made = cache.folder("thing", fill)
    assert made == place / "thing"
    assert cache.folder("thing", lambda fresh: pytest.fail("made again")) == made
    assert (made / "made").read_text() == "whole"


def test_nothing_stays_of_a_maker_that_fails(place: Path) -> None:
    def fail(fresh: Path) -> None:
        (fresh / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.folder("thing", fail)
    assert [path.name for path in place.iterdir()] == [".thing.lock"]


def test_what_a_killed_maker_left_is_swept_by_the_next(place: Path) -> None:
    killed = maker()
    assert line(killed) == "making"
    killed.kill()
    killed.communicate()
    assert list(place.glob(".thing.new-*"))
    assert not (place / "thing").exists()
    cache.folder("thing", fill)
    assert not list(place.glob(".thing.new-*"))


def test_a_second_maker_waits_for_the_first_and_uses_its_folder(place: Path) -> None:
    first = maker()
    assert line(first) == "making"
    second = maker()
    assert "waiting" in line(second)
    go_on(first)
    assert line(second) == "done"
    go_on(second)


def test_prune_keeps_what_was_used_last(place: Path) -> None:
    for age, name in enumerate(["b", "a", "c"]):
        made = cache.folder(f"thing-{name}", fill)
        os.utime(made, (1000 - age, 1000 - age))
    cache.folder("other", fill)
    cache.folder("thing-c", fill)
    cache.prune("thing-", 2)
    kept = {path.name for path in place.iterdir() if path.is_dir()}
    assert kept == {"thing-c", "thing-b", "other"}


def test_prune_spares_what_another_run_may_be_using(place: Path) -> None:
    for name in "abc":
        cache.folder(f"thing-{name}", fill)
    cache.prune("thing-", 1)
    assert len([path for path in place.iterdir() if path.is_dir()]) == 3


def test_prune_sweeps_what_was_abandoned_long_ago(place: Path) -> None:
    old, new = place / ".thing-x.new-1", place / ".thing-x.new-2"
    old.mkdir(parents=True)
    new.mkdir()
    os.utime(old, (0, 0))
    cache.prune("thing-", 2)
    assert [path.name for path in place.iterdir()] == [new.name]


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "some/where")
    assert cache.root() == Path.home() / ".cache/vbus"
