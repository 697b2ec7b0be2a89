"""An exhaustive explorer of the signal protocol under weak memory.

Two threads run tiny programs over shared bytes. Each thread has a store buffer; a load
sees its own newest store, then memory. Under TSO (x86) stores reach memory in order;
under PSO plain stores may overtake each other, and a release store waits for all
before it. A doorbell is seen at once and drains nothing: the least that any way of
crossing the boundary gives. All interleavings are visited.

Not covered: loads that overtake loads, and what a compiler may do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

MESSAGES = 3


@dataclass(frozen=True)
class Op:
    """One instruction: what, on which name, with which value; `to` is a jump target."""

    what: str
    name: str = ""
    value: int = 0
    to: str = ""


def store(name: str, value: int) -> Op:
    """A release store."""
    return Op("store", name, value)


def plain_store(name: str, value: int) -> Op:
    """A store that may be overtaken, as writing a ring is."""
    return Op("plain", name, value)


def fence(name: str) -> Op:
    """A full fence: nothing goes on before the store buffer is empty."""
    return Op("fence", name)


def jump_if(name: str, value: int, to: str) -> Op:
    """Load, and jump if the value is that."""
    return Op("jump", name, value, to)


def label(name: str) -> Op:
    """A jump target."""
    return Op("label", name)


GOTO, LOOK, LOOK_NEW, BELL, SLEEP = "goto", "look", "look_new", "bell", "sleep"


def inject(number: int) -> list[Op]:
    """ABI 5.2, as `vb_sig_inject`."""
    return [
        store("dirty", 1),
        fence("inject: dirty before enabled and pending"),
        jump_if("enabled", 0, f"injected{number}"),
        jump_if("pending", 1, f"injected{number}"),
        store("pending", 1),
        fence("inject: pending before the doorbell"),
        Op(BELL),
        label(f"injected{number}"),
    ]


def signaller() -> list[Op]:
    """Write the ring and signal, several times."""
    program: list[Op] = []
    for number in range(1, MESSAGES + 1):
        program += [plain_store("ring", number), *inject(number)]
    return program


def handler() -> list[Op]:
    """ABI 5.2 enable, then 5.3 at each doorbell: `vb_sig_wakeup_begin` and `_end`."""
    return [
        store("enabled", 1),
        fence("enable: enabled before dirty"),
        label("check"),
        jump_if("dirty", 1, "handle"),
        jump_if("pending", 1, "handle"),
        Op(SLEEP),
        Op(GOTO, to="check"),
        label("handle"),
        store("dirty", 0),
        fence("wakeup begin: dirty before the ring"),
        Op(LOOK),
        jump_if("dirty", 1, "handle"),
        store("pending", 0),
        fence("wakeup end: pending before dirty"),
        Op(GOTO, to="check"),
    ]


def poller() -> list[Op]:
    """Drain with the signal disabled, `vb_sig_arm`, look once more, sleep."""
    return [
        label("awake"),
        store("enabled", 0),
        fence("disable"),
        Op(LOOK),
        store("pending", 0),
        store("dirty", 0),
        store("enabled", 1),
        fence("arm: enabled before the ring"),
        Op(LOOK_NEW, to="awake"),
        Op(SLEEP),
        Op(GOTO, to="awake"),
    ]


def without(program: list[Op], name: str) -> list[Op]:
    """The program with one fence taken out."""
    return [op for op in program if (op.what, op.name) != ("fence", name)]


class _Thread(NamedTuple):
    at: int
    seen: int
    buffer: tuple[tuple[str, int, bool], ...]


class _State(NamedTuple):
    threads: tuple[_Thread, _Thread]
    memory: tuple[tuple[str, int], ...]
    bell: bool


def lost_wakeup(waker: list[Op], peer: list[Op], *, pso: bool) -> bool:
    """Whether any interleaving ends asleep for ever with a message unseen."""
    programs = (waker, peer)
    names = ("ring", "enabled", "pending", "dirty")
    idle = _Thread(0, 0, ())
    first = _State((idle, idle), tuple((name, 0) for name in names), False)
    seen, todo = {first}, [first]
    while todo:
        state = todo.pop()
        following = list(_successors(state, programs, pso))
        if not following and state.threads[0].seen != MESSAGES:
            return True
        for each in following:
            if each not in seen:
                seen.add(each)
                todo.append(each)
    return False


def _successors(
    state: _State, programs: tuple[list[Op], list[Op]], pso: bool
) -> Iterator[_State]:
    for who in (0, 1):
        yield from _drains(state, who, pso)
        thread = state.threads[who]
        if thread.at < len(programs[who]):
            yield from _step(state, who, programs[who])


def _drains(state: _State, who: int, pso: bool) -> Iterator[_State]:
    thread = state.threads[who]
    for i, (name, value, release) in enumerate(thread.buffer):
        earlier = thread.buffer[:i]
        overtakes = pso and not release and all(n != name for n, _, _ in earlier)
        if i == 0 or overtakes:
            memory = tuple((n, value if n == name else v) for n, v in state.memory)
            buffer = earlier + thread.buffer[i + 1 :]
            yield _with(state, who, thread._replace(buffer=buffer))._replace(
                memory=memory
            )


def _with(state: _State, who: int, thread: _Thread) -> _State:
    threads = (thread, state.threads[1]) if who == 0 else (state.threads[0], thread)
    return state._replace(threads=threads)


def _load(state: _State, who: int, name: str) -> int:
    for stored, value, _ in reversed(state.threads[who].buffer):
        if stored == name:
            return value
    return dict(state.memory)[name]


def _step(state: _State, who: int, program: list[Op]) -> Iterator[_State]:
    thread = state.threads[who]
    op = program[thread.at]
    after = thread._replace(at=thread.at + 1)
    jumped = thread._replace(at=_target(program, op.to)) if op.to else after
    match op.what:
        case "store" | "plain":
            new = (op.name, op.value, op.what == "store")
            yield _with(state, who, after._replace(buffer=(*thread.buffer, new)))
        case "fence":
            if not thread.buffer:
                yield _with(state, who, after)
        case "jump":
            taken = _load(state, who, op.name) == op.value
            yield _with(state, who, jumped if taken else after)
        case "look" | "look_new":
            ring = _load(state, who, "ring")
            chosen = jumped if ring != thread.seen else after
            yield _with(state, who, chosen._replace(seen=ring))
        case "bell":
            yield _with(state, who, after)._replace(bell=True)
        case "sleep":
            if state.bell:
                yield _with(state, who, after)._replace(bell=False)
        case _:
            yield _with(state, who, jumped)


def _target(program: list[Op], name: str) -> int:
    return program.index(label(name))
