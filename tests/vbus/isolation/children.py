"""Doing something in a process that was isolated, and seeing how each step went."""

import errno
import json
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Steps = dict[str, Callable[[], object]]


def outcome(step: Callable[[], object]) -> str:
    """ "ok", or the name of the errno a step failed with."""
    try:
        step()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def in_child(work: Callable[[], object]) -> object:
    """Fork, give what `work` gives there (by JSON), fail with what it raises."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            try:
                answer = {"value": work()}
            except BaseException:
                answer = {"raised": traceback.format_exc()}
            os.write(writer, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with status {status:#x}"
    answer = json.loads(text)
    assert "raised" not in answer, answer["raised"]
    return answer["value"]


@contextmanager
def bystander() -> Iterator[int]:
    """Another process of the same user that just waits; gives its pid."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        yield pid
    finally:
        os.close(reader)
        os.close(writer)
        _, status = os.waitpid(pid, 0)
        assert status == 0, "somebody hurt the bystander"
