"""One demo from its start to its table; run inside of its namespaces by `vbus demo`."""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import trio

from vbus.cli.demo import report
from vbus.cli.demo.scenario import Scenario
from vbus.cli.demo.stage import DemoError, Stage
from vbus.errors import VbusError, innermost


def _scenario(
    arguments: argparse.Namespace, nursery: trio.Nursery, folder: Path
) -> Scenario:
    if arguments.vm:
        from vbus.cli.demo.machine import MachineStage
        from vbus.cli.demo.machines import MACHINES, MachineScenario

        return MachineScenario(MachineStage(nursery, folder, MACHINES))
    stage = Stage(nursery, folder, networks=not arguments.frames)
    return Scenario(stage, arguments.seconds, frames=arguments.frames)


async def _play(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    async with trio.open_nursery() as nursery:
        scenario = _scenario(arguments, nursery, folder)
        try:
            await scenario.run()
        except BaseException:
            log = scenario.stage.log
            arguments.log = log.read_text() if log.exists() else ""
            raise
        nursery.cancel_scope.cancel()
    return scenario.result


def main() -> int:
    """Run, print, and give the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--frames", action="store_true")
    parser.add_argument("--vm", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.log = ""
    status = 0
    with tempfile.TemporaryDirectory(prefix="vbus-demo-") as folder:
        os.environ["VBUS_RUNTIME_DIR"] = folder
        try:
            result = trio.run(_play, arguments, Path(folder))
        except* (DemoError, VbusError, OSError, CalledProcessError) as group:
            status = _explain(group, arguments.log)
        except* KeyboardInterrupt:
            status = 130
    if status == 0:
        report.show(result, as_json=arguments.json)
    return status


def _explain(group: BaseExceptionGroup[Exception], log: str) -> int:
    """Say what failed, after the last lines that the processes said."""
    error = innermost(group)
    for line in log.splitlines()[-10:]:
        print(line, file=sys.stderr)
    said = getattr(error, "stderr", None) or b""
    print(f"vbus: demo: {error} {said.decode()}".rstrip(), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
