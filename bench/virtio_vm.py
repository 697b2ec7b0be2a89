"""Linux on virtio functions of ours, beside QEMU's own and vhost-user, in one machine.

Needs a QEMU and a guest image, which are fetched. Where there is no hardware help the
machine is emulated and competes with the daemon for the cores.
"""

import json
import subprocess

from bench.harness import Metric, Round, Suite, Target
from bench.lab import enter
from bench.processes import Skipped

_TIMEOUT_S = 170
_JOBS = {
    f"{way}{depth}": f"{way}, depth {depth}"
    for way in ("randread", "randwrite")
    for depth in (1, 32)
}

_DISKS = {
    "vbus": "virtio-blk, a function of ours",
    "qemu": "QEMU's virtio-blk-pci",
    "vhost": "vhost-user-blk of qemu-storage-daemon",
}
_CARDS = {"vbus": "virtio-net, a function of ours", "qemu": "QEMU's virtio-net-pci"}
_WAYS = {"out": "guest to host", "in": "host to guest"}


def _measure(what: str) -> Round:
    done = subprocess.run(
        enter("vm_worker", what),
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        timeout=_TIMEOUT_S,
    )
    if done.returncode:
        raise Skipped("the machine did not run")
    result: Round = json.loads(done.stdout)
    return result


def _disk() -> Round:
    return _measure("disk")


def _net() -> Round:
    return _measure("net")


SUITES = (
    Suite(
        "vm-disk",
        {
            f"{maker}_{job}": Metric(f"4 KiB {said}: {label}", "requests/s")
            for job, said in _JOBS.items()
            for maker, label in _DISKS.items()
        },
        (
            *(
                Target(
                    f"4 KiB {way}, depth 1 / QEMU", f"vbus_{way}1", 0.5, f"qemu_{way}1"
                )
                for way in ("randread", "randwrite")
            ),
            *(
                Target(
                    f"4 KiB {said} / vhost-user-blk", f"vbus_{job}", 1, f"vhost_{job}"
                )
                for job, said in _JOBS.items()
            ),
        ),
        _disk,
    ),
    Suite(
        "vm-net",
        {
            f"{maker}_{way}": Metric(f"TCP {said}: {label}", "Gbit/s")
            for way, said in _WAYS.items()
            for maker, label in _CARDS.items()
        },
        (
            *(
                Target(f"TCP {said} / QEMU", f"vbus_{way}", 0.5, f"qemu_{way}")
                for way, said in _WAYS.items()
            ),
        ),
        _net,
    ),
)
