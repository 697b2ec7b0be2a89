"""Run `vbus ARGUMENTS` and write down which code of `proxy` ran: no package needed.

    python traced.py REPORT ARGUMENTS...

The report is JSON: of each file the functions entered, the lines run, and all lines
that could. Runs in any guest, so it knows the standard library only.
"""

import inspect
import json
import runpy
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

_PART = "/proxy/"
_COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>")
functions: defaultdict[str, set[str]] = defaultdict(set)
lines: defaultdict[str, set[int]] = defaultdict(set)


def note(code: CodeType) -> None:
    """Note a function: no body of a class or module, no part of another function."""
    is_function = code.co_flags & inspect.CO_OPTIMIZED
    if is_function and not code.co_name.endswith(_COMPREHENSIONS):
        functions[code.co_filename].add(code.co_qualname)


def enter(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
    code = frame.f_code
    if _PART not in code.co_filename:
        return None
    note(code)
    found = lines[code.co_filename]

    def step(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        if event == "line":
            found.add(frame.f_lineno)
        return step

    found.add(frame.f_lineno)
    return step


def watch() -> None:
    """Have each line told once; before Python 3.12 every time, which is slow."""
    if sys.version_info < (3, 12):
        threading.settrace(enter)
        sys.settrace(enter)
        return
    monitoring = sys.monitoring
    tool, events = monitoring.COVERAGE_ID, monitoring.events

    def started(code: CodeType, offset: int) -> object:
        if _PART in code.co_filename:
            note(code)
        return monitoring.DISABLE

    def line(code: CodeType, number: int) -> object:
        if _PART in code.co_filename:
            lines[code.co_filename].add(number)
        return monitoring.DISABLE

    monitoring.use_tool_id(tool, "traced")
    monitoring.register_callback(tool, events.PY_START, started)
    monitoring.register_callback(tool, events.LINE, line)
    monitoring.set_events(tool, events.PY_START | events.LINE)


def possible(code: CodeType) -> set[int]:
    """All lines of a module that are code."""
    found = {line for _, _, line in code.co_lines() if line}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= possible(constant)
    return found


def report() -> dict[str, Any]:
    whole = {}
    for name, ran in functions.items():
        code = compile(Path(name).read_bytes(), name, "exec")
        whole[name.rpartition(_PART)[2]] = {
            "functions": sorted(ran),
            "lines": len(lines[name] & possible(code)),
            "all_lines": len(possible(code)),
        }
    return whole


def main() -> None:
    path, *arguments = sys.argv[1:]
    sys.argv = ["vbus", *arguments]
    watch()
    try:
        runpy.run_module("vbus", run_name="__main__")
    finally:
        sys.settrace(None)
        Path(path).write_text(json.dumps(report()))


if __name__ == "__main__":
    main()
