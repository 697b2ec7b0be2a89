"""What came with the process: names, counts and whom it is for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vbus.isolation.children import in_child
from vbus.errors import ConfigError
from vbus.service.inherited import Inherited, take

PID = str(os.getpid())


def started_with(count: int, **environment: str) -> list[list[object]]:
    """What a process finds that has `count` pipes at 3, 4, ..."""

    def work() -> object:
        for fd in range(3, 3 + count):
            os.dup2(os.pipe()[0], fd)
        told = {"LISTEN_PID": str(os.getpid()), **environment}
        found = take(told)
        assert not told, "the variables are for us alone"
        return [[name, fd, os.get_inheritable(fd)] for name, fd in found]

    found = in_child(work)
    assert isinstance(found, list)
    return found


def test_descriptors_have_their_names_and_stay_in_this_process() -> None:
    names = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "vbusd.socket:vbus/control.sock"}
    assert started_with(2, **names) == [
        ["vbusd.socket", 3, False],
        ["vbus/control.sock", 4, False],
    ]


def test_without_names_they_are_unknown() -> None:
    assert started_with(1, LISTEN_FDS="1") == [["unknown", 3, False]]


def test_what_is_for_another_process_is_left_alone() -> None:
    assert take({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) == []
    assert take({"HOME": "/"}) == []


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LISTEN_PID": PID, "LISTEN_FDS": "many"}, "LISTEN_FDS='many'"),
        ({"LISTEN_PID": "me", "LISTEN_FDS": "1"}, "LISTEN_PID='me'"),
        ({"LISTEN_PID": PID}, "LISTEN_FDS=''"),
        (
            {"LISTEN_PID": PID, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "one"},
            "LISTEN_FDNAMES='one' for 2",
        ),
        ({"LISTEN_PID": PID, "LISTEN_FDS": "5000"}, r"\d+: Bad file descriptor"),
    ],
)
def test_variables_that_mean_nothing_are_refused(
    environment: dict[str, str], message: str
) -> None:
    def work() -> str:
        told = dict(environment)
        if told["LISTEN_PID"] == PID:
            told["LISTEN_PID"] = str(os.getpid())
        with pytest.raises(ConfigError, match=message) as caught:
            take(told)
        return str(caught.value)

    assert in_child(work)


ACTIVATE = "/usr/bin/systemd-socket-activate"


@pytest.mark.skipif(not os.access(ACTIVATE, os.X_OK), reason="no systemd here")
def test_systemds_own_tool_is_understood(tmp_path: Path) -> None:
    """Golden: descriptors as systemd really passes them."""
    program = (
        "import os, vbus.service.inherited as i; f = i.take(os.environ);"
        " open('found', 'w').write(repr([tuple(one) for one in f]))"
    )
    command = [ACTIVATE, "-l", tmp_path / "a", "-l", tmp_path / "b"]
    command += ["--fdname=first:second", sys.executable, "-c", program]
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(command, cwd=tmp_path, env=here) as process:
        try:
            # It starts the program once somebody connects.
            knock = "import socket, sys, time\nwhile True:\n try: "
            knock += "socket.socket(1).connect(sys.argv[1]); break\n"
            knock += " except OSError: time.sleep(0.02)\n"
            knocker = [sys.executable, "-c", knock, tmp_path / "a"]
            subprocess.run(knocker, timeout=10, check=True)
            assert process.wait(10) == 0
        finally:
            process.kill()
    expected = [Inherited("first", 3), Inherited("second", 4)]
    assert (tmp_path / "found").read_text() == repr([tuple(one) for one in expected])
