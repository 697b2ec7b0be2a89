"""The guest's end of the test harness: runs programs and Python for the host.

One JSON object a line, both ways, over a virtio-serial port. It is process 1 of the
guest, so it also reaps orphans. Standard library only. Its other end, and what each
message means: vbus/vm/channel.py. Not a security boundary: it does as it is told.
"""

import base64
import contextlib
import functools
import json
import linecache
import os
import selectors
import signal
import subprocess
import sys
import traceback
from typing import Any

_CHUNK = 1 << 16
_PRELOADED = ["inspect", "mmap", "ctypes", "trio", "msgpack", "msgspec"]


class Port:
    """The lines of the port."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._rest = b""

    def read(self) -> list[dict[str, Any]]:
        """Give the messages that have come; what is no message is left out."""
        try:
            data = os.read(self.fd, _CHUNK)
        except BlockingIOError:
            return []
        *lines, self._rest = (self._rest + data).split(b"\n")
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # the rest of a line meant for the boot before this one
        return found

    def send(self, **message: object) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            try:
                data = data[os.write(self.fd, data) :]
            except BlockingIOError:
                waiting = selectors.PollSelector()
                waiting.register(self.fd, selectors.EVENT_WRITE)
                waiting.select()


class Job:
    """One process started for the host, and its pipes that are still open."""

    def __init__(self, number: int, pid: int, pipes: dict[str, int]) -> None:
        self.number = number
        self.pid = pid
        self.pipes = pipes
        self.status: int | None = None


class Agent:
    """Takes requests, watches jobs."""

    def __init__(self, path: str) -> None:
        self.port = Port(path)
        self.boot = os.urandom(8).hex()
        self.jobs: dict[int, Job] = {}
        self.wake, wake_in = os.pipe()
        os.set_blocking(wake_in, False)
        os.set_blocking(self.wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_in, warn_on_full_buffer=False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.port.fd, selectors.EVENT_READ, self.take)
        self.selector.register(self.wake, selectors.EVENT_READ, self.reap)

    def run(self) -> None:
        with open("/proc/uptime") as uptime:
            up_s = float(uptime.read().split()[0])
        os.write(self.port.fd, b"\n")  # ends what a former boot left unfinished
        self.port.send(op="up", boot=self.boot, uptime_s=up_s)
        preload = list(_PRELOADED)
        while True:
            # Whatever later snippets import is imported here once, while idle.
            ready = self.selector.select(0.02 if preload else None)
            if not ready:
                import_quietly(preload.pop(0))
            for key, _ in ready:
                key.data()

    def take(self) -> None:
        for message in self.port.read():
            if message.get("boot") != self.boot:
                continue  # meant for the boot before this one
            try:
                getattr(self, "do_" + message["op"])(message)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                self.port.send(op="failed", id=message["id"], error=text)

    def do_start(self, message: dict[str, Any]) -> None:
        (out, out_in), (err, err_in) = os.pipe(), os.pipe()
        try:
            process = subprocess.Popen(
                message["argv"],
                env={**os.environ, **message["env"]},
                stdin=subprocess.DEVNULL,
                stdout=out_in,
                stderr=err_in,
                start_new_session=True,
            )
        except OSError:
            os.close(out)
            os.close(err)
            raise
        finally:
            os.close(out_in)
            os.close(err_in)
        process.returncode = 0  # reap() waits for it, not subprocess
        self.watch(message["id"], process.pid, {"out": out, "err": err})

    def do_python(self, message: dict[str, Any]) -> None:
        result, result_in = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(self.port.fd)
            answer = evaluate(message["source"], message["name"], message["args"])
            with open(result_in, "wb") as out:
                out.write(answer)
            os._exit(0)
        os.close(result_in)
        self.watch(message["id"], pid, {"result": result})

    def do_signal(self, message: dict[str, Any]) -> None:
        job = self.jobs.get(message["id"])
        if job is not None and job.status is None:
            os.kill(job.pid, message["signal"])

    def do_end(self, message: dict[str, Any]) -> None:
        """Kill a job and all that it started; nobody waits for it any more."""
        job = self.jobs.get(message["id"])
        if job is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)

    def do_put(self, message: dict[str, Any]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | (0 if message["offset"] else os.O_TRUNC)
        fd = os.open(message["path"], flags, message["mode"])
        with open(fd, "wb") as out:
            out.seek(message["offset"])
            out.write(base64.b64decode(message["data"]))
        self.port.send(op="done", id=message["id"])

    def watch(self, number: int, pid: int, pipes: dict[str, int]) -> None:
        job = self.jobs[number] = Job(number, pid, pipes)
        self.port.send(op="started", id=number, pid=pid)
        for name, fd in pipes.items():
            callback = functools.partial(self.forward, job, name, fd)
            self.selector.register(fd, selectors.EVENT_READ, callback)

    def forward(self, job: Job, name: str, fd: int) -> None:
        data = os.read(fd, _CHUNK)
        if data:
            text = base64.b64encode(data).decode()
            self.port.send(op=name, id=job.number, data=text)
            return
        self.selector.unregister(fd)
        os.close(fd)
        del job.pipes[name]
        self.finish(job)

    def reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake, _CHUNK)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for job in [one for one in self.jobs.values() if one.pid == pid]:
                job.status = os.waitstatus_to_exitcode(status)
                self.finish(job)

    def finish(self, job: Job) -> None:
        if job.status is not None and not job.pipes:
            del self.jobs[job.number]
            self.port.send(op="ended", id=job.number, status=job.status)


def evaluate(source: str, name: str, args: list[Any]) -> bytes:
    """Run a function of `source`, and give its value or its traceback as JSON."""
    file = f"<from the host: {name}>"
    lines = source.splitlines(keepends=True)
    linecache.cache[file] = (len(source), None, lines, file)
    space: dict[str, Any] = {"__name__": "__guest__"}
    try:
        exec(compile(source, file, "exec"), space)
        value = space[name](*args)
        if hasattr(value, "__await__"):
            import trio

            async def wait() -> object:
                return await value

            value = trio.run(wait)
        return json.dumps({"value": value}).encode()
    except BaseException as error:
        about = f"{type(error).__name__}: {error}"
        trace = traceback.format_exc()
        return json.dumps({"error": about, "traceback": trace}).encode()


def import_quietly(name: str) -> None:
    with contextlib.suppress(ImportError):  # who needs it will say that it is not there
        __import__(name)


if __name__ == "__main__":
    Agent(sys.argv[1]).run()
