"""A host in a process of its own, for tests that kill it or need two processes.

`python -m tests.proxy.serve SOCKET [SPIN_US]` serves echo0 and two venet ports on a
switch, says "ready" and runs until it is killed.
"""

import sys
from pathlib import Path

import trio

from backends.venet import Switch, Venet
from tests.proxy.host import hosted


async def main(path: Path, spin_us: float) -> None:
    classes = {"switch": Switch, "venet": Venet}
    async with hosted(path.parent, classes) as host:
        host.add("echo0")
        host.add("lan0", "switch")
        host.add("p1", "venet", switch="lan0")
        host.add("p2", "venet", switch="lan0")
        await host.add_guest(path.stem, spin_us=spin_us)
        print("ready", flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), float(sys.argv[2] if sys.argv[2:] else 0))
