"""The driver of a network card that is a PCI function, as a process.

`python -m tests.system.function_guest SOCKET INTERFACE=ADDRESS/PREFIX` says "running".
"""

import sys

import trio

from proxy.drivers.virtio_net import NetDriver
from proxy.memory import DmaMemory
from proxy.vfio_user import connect
from proxy.virtio.device import VirtioDevice
from proxy.virtio.pci import ModernTransport, opened


async def main(socket: str, interface: str) -> None:
    name, _, address = interface.partition("=")
    with DmaMemory(16 << 20) as memory:
        async with (
            connect(socket, memory) as client,
            opened(await ModernTransport.find(client, name)) as transport,
        ):
            device = VirtioDevice(transport, await transport.identify())
            driver = NetDriver(device, {"address": address})
            await driver.run(lambda word: print("running:", word, flush=True))


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
