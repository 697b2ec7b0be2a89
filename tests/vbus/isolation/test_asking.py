"""Asking for isolation: what is said, and what happens where a kernel lacks it."""

import logging
import os
import platform
import threading
from pathlib import Path

import pytest

from tests.vbus.isolation.children import in_child, outcome
from vbus.errors import InvalidError, NotFoundError
from vbus.isolation import (
    Isolation,
    IsolationError,
    bpf,
    isolate,
    kernel,
    landlock,
    policy,
    seccomp,
)

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64's numbers"),
    pytest.mark.skipif(
        not landlock.abi() or not seccomp.available(),
        reason="this kernel has no Landlock, or no seccomp filters",
    ),
]


def test_it_says_what_holds() -> None:
    def work() -> list[object]:
        found = isolate(required=True)
        assert found == Isolation(True, landlock.abi(), True)
        status = Path(f"/proc/{os.getpid()}/status")
        assert outcome(status.read_text) == "EACCES"
        return [kernel.prctl(kernel.PR_GET_NO_NEW_PRIVS)]

    assert in_child(work) == [1]


def test_after_threads_it_is_refused() -> None:
    """A thread that was there before would stay free."""

    def work() -> None:
        end = threading.Event()
        thread = threading.Thread(target=end.wait)
        thread.start()
        try:
            with pytest.raises(InvalidError, match="before threads; there are 2"):
                isolate()
        finally:
            end.set()
            thread.join()

    in_child(work)


def test_a_path_that_is_missing_is_refused_and_nothing_given_up(
    tmp_path: Path,
) -> None:
    def work() -> list[object]:
        with pytest.raises(NotFoundError, match=r"isolation: no .*/missing"):
            isolate(read=[tmp_path / "missing"])
        return [kernel.prctl(kernel.PR_GET_NO_NEW_PRIVS), len(os.listdir(tmp_path))]

    assert in_child(work) == [0, 0]


def without(*calls: int) -> None:
    """Make this process live on a kernel that lacks those calls."""
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    rules = [bpf.Rule(number, 38) for number in calls]  # ENOSYS
    seccomp.install(bpf.assemble(policy.MACHINES["x86_64"].arch, rules))


LANDLOCK, PRCTL = 444, 157


def test_required_but_absent_is_refused_and_nothing_given_up(tmp_path: Path) -> None:
    """The message says what is missing and what would help."""

    def work() -> str:
        without(LANDLOCK)
        with pytest.raises(IsolationError) as caught:
            isolate(required=True)
        assert os.listdir(tmp_path) == []
        return str(caught.value)

    said = in_child(work)
    assert said == (
        "isolation is required, but Landlock is not there"
        " (a kernel of 5.13 or newer, lsm=landlock)"
    )


def test_wanted_but_absent_in_part_is_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The rest holds nevertheless."""

    def work() -> list[object]:
        without(LANDLOCK)
        with caplog.at_level(logging.INFO):
            found = isolate()
        assert (found.landlock, found.seccomp) == (0, True)
        return [[one.message for one in caplog.records], outcome(os.fork)]

    [lines, forked] = in_child(work)  # type: ignore[misc]
    assert lines == [
        "isolated only in part: Landlock is not there"
        " (a kernel of 5.13 or newer, lsm=landlock)"
    ]
    assert forked == "EPERM"


def test_an_unknown_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "s390x")

    def work() -> str:
        with pytest.raises(IsolationError) as caught:
            isolate(required=True)
        return str(caught.value)

    assert "written for x86_64 and aarch64 only" in str(in_child(work))


def test_a_kernel_without_filters_is_seen() -> None:
    """prctl refuses as such a kernel does."""

    def work() -> bool:
        rules = [bpf.Rule(PRCTL, 22, only_if=bpf.OneOf(0, (22,)))]  # EINVAL
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        seccomp.install(bpf.assemble(policy.MACHINES["x86_64"].arch, rules))
        return seccomp.available()

    assert in_child(work) is False
    assert seccomp.available()
