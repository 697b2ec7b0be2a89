"""A stand-in for systemd as far as the daemon sees it: its sockets and descriptors.

It speaks the real protocol over real sockets to a real process, in a folder of its
own: notifications, the descriptor store, socket activation, the watchdog's variables.
"""

import array
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

WITHIN_S = 20
# What systemd does between fork and exec: descriptors from 3 on, and for whom they are.
_LAUNCH = """
import os, sys
fds = [int(one) for one in sys.argv[1].split(",") if one]
for at, fd in enumerate(fds, 3):
    os.dup2(fd, at)
if fds:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)))
os.execv(sys.executable, [sys.executable, "-m", "vbus", *sys.argv[2:]])
"""
_MOST_FDS = 64


class Manager:
    """Runs `vbus serve` as a service; a context manager."""

    def __init__(self, folder: Path, config: str, **environment: str) -> None:
        self.runtime = folder / "run"
        self.log = folder / "log"
        self.messages: list[str] = []
        self.store: list[tuple[str, int]] = []
        self.sockets: list[tuple[str, socket.socket]] = []
        self._config = folder / "vbus.toml"
        self._config.write_text(config)
        self._environment = environment
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(folder / "notify"))
        self.process: subprocess.Popen[bytes] | None = None

    def listen(self, path: Path, name: str) -> None:
        """Be the socket unit of `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        made = socket.socket(socket.AF_UNIX)
        made.bind(str(path))
        made.listen()
        self.sockets.append((name, made))

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the service with all we have for it."""
        passed = [(name, one.fileno()) for name, one in self.sockets] + self.store
        environment = {
            **os.environ,
            **self._environment,
            "VBUS_RUNTIME_DIR": str(self.runtime),
            "NOTIFY_SOCKET": str(self._notify.getsockname()),
            "LISTEN_FDNAMES": ":".join(name for name, _ in passed),
        }
        # 100 and up, so that none is in the way of those from 3 on.
        fds = [_high(fd) for _, fd in passed]
        with self.log.open("ab") as log:
            if "JOURNAL_STREAM" in environment:
                status = os.fstat(log.fileno())
                stream = f"{status.st_dev}:{status.st_ino}"
                environment["JOURNAL_STREAM"] = stream
            words = [sys.executable, "-c", _LAUNCH, ",".join(map(str, fds))]
            words += ["serve", "--config", str(self._config)]
            self.process = subprocess.Popen(
                words, env=environment, stderr=log, pass_fds=fds
            )
        for fd in fds:
            os.close(fd)
        return self.process

    def wait_for(self, text: str) -> None:
        """Take messages until one has `text`; it is the last then."""
        end = time.monotonic() + WITHIN_S
        while True:
            assert self.process is not None
            assert time.monotonic() < end, (text, self.messages, self.log.read_text())
            if self.take() and text in self.messages[-1]:
                return
            alive = self.process.poll() is None
            assert alive or text in "".join(self.messages), self.log.read_text()

    def wait_for_state(self, text: str) -> None:
        """Take messages until the stored state mentions `text`."""
        end = time.monotonic() + WITHIN_S
        while not any(text.encode() in state for state in self.states):
            assert time.monotonic() < end, (text, self.messages)
            self.take()

    @property
    def states(self) -> list[bytes]:
        """What is stored of the daemon's state."""
        return [os.pread(fd, 1 << 20, 0) for name, fd in self.store if "state" in name]

    def take(self, within_s: float = 0.1) -> bool:
        """Take one message, if there is one within a moment."""
        size = socket.CMSG_SPACE(_MOST_FDS * 4)
        self._notify.settimeout(within_s)
        try:
            data, ancillary, _, _ = self._notify.recvmsg(4096, size)
        except (TimeoutError, BlockingIOError):
            return False
        fds = array.array("i")
        for _, _, rights in ancillary:
            fds.frombytes(rights)
        text = data.decode()
        self.messages.append(text)
        fields = dict(line.split("=", 1) for line in text.splitlines())
        name = fields.get("FDNAME", "stored")
        if "FDSTORE" in fields:
            self.store += [(name, fd) for fd in fds]
        elif "FDSTOREREMOVE" in fields:
            self.forget(name)
        return True

    def forget(self, name: str) -> None:
        """Close what is stored by that name."""
        for entry in [one for one in self.store if one[0] == name]:
            self.store.remove(entry)
            os.close(entry[1])

    def memfd(self, data: bytes) -> int:
        """Make a memory file that nobody can change."""
        fd = os.memfd_create("made", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(fd, data)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        return fd

    @property
    def stored_sockets(self) -> list[str]:
        """Names of what is stored, without that of the state."""
        return sorted(name for name, _ in self.store if "state" not in name)

    def run(self) -> None:
        """Start, and wait until it is ready."""
        self.start()
        self.wait_for("READY=1")

    def end(self, number: signal.Signals) -> int:
        """Signal the process and give its exit status.

        What it said last is taken before anybody hears of its end, as systemd does.
        """
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(WITHIN_S)
        while self.take(0):
            pass
        return status

    def vbus(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run a client command."""
        return subprocess.run(
            [sys.executable, "-m", "vbus", *words],
            env={**os.environ, "VBUS_RUNTIME_DIR": str(self.runtime)},
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
        )

    def guest(self, name: str = "g1") -> Path:
        return self.runtime / "guests" / f"{name}.sock"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for _, fd in self.store:
            os.close(fd)
        for _, sock in self.sockets:
            sock.close()
        self._notify.close()


def _high(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD, 100)
