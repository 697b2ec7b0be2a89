"""A guest that throws five dice: python examples/throw.py SOCKET NAME"""

import sys

import trio

from proxy import attach


async def throw(socket: str, name: str) -> None:
    async with attach(socket) as bridge:
        dice = await bridge.open(name)
        _, throws = await dice.call(0, bytes(5))
        print(*throws)


if __name__ == "__main__":
    trio.run(throw, sys.argv[1], sys.argv[2])
