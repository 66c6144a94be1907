"""A run of the ledger on one back end: its processes, its faults, and its account."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from itertools import count
from math import inf
from pathlib import Path
from random import Random
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]
import sqlalchemy as sa

from tests.ledger import model
from tests.ledger.book import Account, Committed, Reset, balance
from tests.ledger.chaos import Chaos, Fault, process_acts, store_acts
from tests.ledger.clients import FAILURES, Listener, Publisher, get
from tests.ledger.notes import RECEIVED_SECONDS, Last, Note, read_notes, records
from tests.ledger.plans import CHANNELS, LAST, Plan
from tests.ledger.servers import KINDS, SCRIPT, Process
from tests.ledger.stores import PostgreSQL, SQLite, Store, Valkey
from tests.live_apps.ledger_app import HISTORY
from tgstream import channels

PUBLISHERS, LISTENERS = 4, 10
END_SECONDS = 20.0
"""Seconds for the last events to arrive."""
GRACE = 3.0
"""Seconds after an outage in which a process may still have to send events."""


class Backend(NamedTuple):
    """A back end of channels, and the database of the ledger."""

    channels: str
    """The option ``tgstream.channels``. It is empty for the Valkey of the run."""
    make_database: Callable[[Path], AbstractContextManager[Store]]
    savepoints: bool = True
    """Whether the database has them."""


BACKENDS = {
    "memory": Backend("memory://", PostgreSQL),
    "redis": Backend("", PostgreSQL),
    "sqlite": Backend("database://", SQLite, savepoints=False),
    "postgresql": Backend("database://", PostgreSQL),
}


class Result(NamedTuple):
    """The account of a run, and what happened in it."""

    account: Account
    unexplained: list[Reset]
    """Resets that no fault and no long absence explains."""
    faults: list[Fault]
    outcomes: dict[str, Counter[str]]
    """How the requests of the publishers and listeners ended."""
    errors: list[str]
    """Exceptions of ``listen()``."""
    plans: dict[str, Plan]
    """The plans of the publishers, by the names of their transactions."""
    died: dict[int, float]
    """The processes that ended, and when they were last seen."""

    @property
    def wrongs(self) -> list[str]:
        """The faults of the back end, a sentence each."""
        resets = [
            f"{reset.listener}: unexplained reset of channel {reset.channel} at "
            f"{reset.time:.2f} s, for {reset.reported} events since {reset.since:.2f} s"
            for reset in self.unexplained
        ]
        faults = [
            f"{fault}, for {len(listeners)} listeners, such as {listeners[0]}"
            for fault, listeners in self.account.faults.items()
        ]
        return faults + resets + self.errors


def run(name: str, seed: int, seconds: float, folder: Path, plant: str = "") -> Result:
    """Publish and listen under faults, and compare what was received.

    :param name: of the back end, one of ``BACKENDS``.
    :param seed: of all random choices.
    :param folder: an empty folder. It will have the notes and logs of the run.
    :param plant: a fault that the application has on purpose.
    """
    with ExitStack() as stack:
        world = World(BACKENDS[name], f"{seed}-{name}", folder, plant, stack)
        world.work(seconds)
        world.settle()
        return world.result()


class World:
    """The stores, processes and clients of a run.

    :param seed: of all random choices.
    :param plant: a fault that the application has on purpose.
    :param stack: closes the stores and processes.
    """

    def __init__(
        self, backend: Backend, seed: str, folder: Path, plant: str, stack: ExitStack
    ) -> None:
        self._seed, self._folder, self._begun = seed, folder, time.monotonic()
        self._in_database = backend.channels == "database://"
        self._backend = backend
        self._database = stack.enter_context(backend.make_database(folder))
        self._stores: dict[str, Store] = {"database": self._database}
        url = backend.channels
        if not url:
            valkey = stack.enter_context(Valkey(folder / "valkey"))
            self._stores["valkey"], url = valkey, valkey.url
        self._create_tables()
        options = {"url": self._database.url, "channels": url}
        options |= {"folder": str(folder), "plant": plant}
        self._options = [f"{name}={value}" for name, value in options.items()]
        # With memory:// there is one process, which is another server after each start.
        one = url == "memory://"
        self._servers = [
            self._start(kinds) for kinds in ([KINDS] if one else zip(KINDS))
        ]
        self._scripts = [] if one else [self._start([SCRIPT])]
        stack.callback(self._close_processes)
        self._publishers: list[Publisher] = []
        self._listeners: list[Listener] = []
        self._faults: list[Fault] = []
        self._alive: set[int] = set()

    def _create_tables(self) -> None:
        engine = sa.create_engine(self._database.url, poolclass=sa.NullPool)
        model.Base.metadata.create_all(engine)
        if self._in_database:
            channels.metadata.create_all(engine)

    def _start(self, kinds: Iterable[str]) -> Process:
        kinds = list(kinds)
        return Process(kinds, *self._options, f"name={self._seed}-{kinds[0]}")

    def _close_processes(self) -> None:
        with ThreadPoolExecutor() as threads:
            list(threads.map(Process.close, self._servers + self._scripts))

    # While it runs.

    def work(self, seconds: float) -> None:
        """Publish, listen and cause faults for so many seconds."""
        for process in self._servers + self._scripts:
            process.wait()
        acts = [process_acts(self._servers + self._scripts)]
        acts += [store_acts(*store) for store in self._stores.items()]
        all_chaos = [
            Chaos(f"{self._seed} {number}", each, self._count_done)
            for number, each in enumerate(acts)
        ]
        savepoints = self._backend.savepoints
        self._publishers = [
            Publisher(self._seed, f"publisher{number}", self._choose, savepoints)
            for number in range(PUBLISHERS)
        ]
        for thread in all_chaos + self._publishers:
            thread.start()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._keep_listening()
            time.sleep(0.05)
        for chaos in all_chaos:
            chaos.close()
            self._faults += [
                fault._replace(
                    begun=fault.begun - self._begun, ended=fault.ended - self._begun
                )
                for fault in chaos.faults
            ]
        for publisher in self._publishers:
            publisher.close()

    def _count_done(self) -> int:
        return sum(len(publisher.done) for publisher in self._publishers)

    def _keep_listening(self) -> None:
        """Start a listener for each one that left. Some of them stay."""
        for _ in range(LISTENERS - sum(each.is_alive() for each in self._listeners)):
            number = len(self._listeners)
            listener = Listener(
                self._seed, f"listener{number}", self._choose, leaves=number % 2 == 0
            )
            self._listeners.append(listener)
            listener.start()

    def _choose(self, random: Random) -> int:
        """Choose a server that runs, and return its port. Wait for one if none does."""
        for _ in range(200):
            if ports := [server.port for server in self._servers if server.port]:
                return random.choice(ports)
            time.sleep(0.05)
        raise ConnectionRefusedError("no server runs")

    # The end.

    def settle(self) -> None:
        """Publish the last events, and wait until the listeners have received them."""
        for publisher in self._publishers:
            publisher.join()
        self._wait_for_listeners()
        begun = time.monotonic()
        for script in self._scripts:
            script.close()
        works = {self._publish_last(server) for server in self._servers}
        works |= {work for work in self._done() if work.startswith("end-")}
        last = Last(begun, time.monotonic(), {channel: set() for channel in CHANNELS})
        for entry in model.read(self._database.url):
            # A script that was terminated before has published last events, too.
            if entry.work in works and (entry.published or 0.0) > begun:
                last.texts[entry.channel].add(model.text_of(entry, entry.number))
        for listener in self._listeners:
            listener.close(last, END_SECONDS)
        for listener in self._listeners:
            listener.join()
        self._alive = self._wait_for_processes(last)
        self._close_processes()

    def _wait_for_listeners(self) -> None:
        """Wait until each listener has begun, so that it receives the last events."""
        until = time.monotonic() + END_SECONDS
        while time.monotonic() < until and not all(
            listener.notes for listener in self._listeners if listener.is_alive()
        ):
            time.sleep(0.1)

    def _publish_last(self, server: Process) -> str:
        """Publish the last events of a server, and return their transaction's name."""
        until, failure = time.monotonic() + END_SECONDS, "it does not run"
        for attempt in count():
            work = f"end-{server.name}-{attempt}"
            try:
                if (port := server.port) is not None:
                    get(port, "/request", plan=LAST, work=work, client="end").close()
                    return work
            except FAILURES as error:
                failure = repr(error)
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        log = "".join(server.log)
        raise RuntimeError(f"{server.name} does not answer: {failure}\n{log}")

    def _done(self) -> set[str]:
        """Return the transactions of which their client knows that they committed."""
        done = set().union(*(publisher.done for publisher in self._publishers))
        path = self._folder / "done"
        return done | set(path.read_text().split() if path.exists() else [])

    def _notes(self) -> dict[tuple[str, int, str], list[Note]]:
        """Return the notes of each process, by its name, its id and the channels."""
        notes = {}
        for path in self._folder.glob("*.notes"):
            name, pid, channels = path.stem.split()
            notes[name, int(pid), channels] = read_notes(path)
        return notes

    def _wait_for_processes(self, last: Last) -> set[int]:
        """Wait until the listeners of the running processes have the last events.

        :returns: the ids of these processes.
        """
        until = time.monotonic() + END_SECONDS
        while True:
            alive = {
                key: notes for key, notes in self._notes().items() if is_alive(key[1])
            }
            arrived = [
                last.arrived(channels.split("+"), each)
                for (_, _, channels), each in alive.items()
            ]
            if all(arrived) or time.monotonic() > until:
                return {pid for _, pid, _ in alive}
            time.sleep(0.1)

    # The account.

    def result(self) -> Result:
        """Return the account, and write what led to it into the folder."""
        for process in self._servers + self._scripts:
            (self._folder / f"{process.name}.log").write_text("".join(process.log))
        for listener in self._listeners:
            text = "".join(map(Note.line, listener.notes))
            (self._folder / f"{listener.name}.txt").write_text(text)
        notes = self._notes()
        heard = [
            record
            for (name, pid, channels), each in notes.items()
            for record in records(
                f"{name} {pid}",
                channels.split("+"),
                each,
                pid in self._alive,
                self._begun,
            )
        ]
        for listener in self._listeners:
            heard += records(
                listener.name,
                listener.channels,
                listener.notes,
                listener.stayed,
                self._begun,
            )
        died = {
            pid: each[-1].time - self._begun
            for (_, pid, _), each in notes.items()
            if each and pid not in self._alive
        }
        account = balance(self._committed(died), heard, self._in_database)
        return Result(
            account,
            [reset for reset in account.resets if not self._explains(reset, died)],
            sorted(self._faults),
            {
                "publishers": sum((x.outcomes for x in self._publishers), Counter()),
                "listeners": sum((x.outcomes for x in self._listeners), Counter()),
            },
            [
                f"listen() of {name} raised {note.text}"
                for (name, _, _), each in notes.items()
                for note in each
                if note.kind == "error"
            ],
            {work: plan for x in self._publishers for work, plan in x.plans.items()},
            died,
        )

    def _committed(self, died: dict[int, float]) -> list[Committed]:
        """Return the committed events in the order of their commits.

        :param died: by the ids of the processes, when they died.
        """
        done = self._done()
        committed = []
        for entry in model.read(self._database.url):
            pid = int(entry.publisher.split()[0])
            published = (entry.published or 0.0) - self._begun
            doubtful = not self._in_database and (
                entry.work not in done
                or self._was_away(published, died.get(pid, 0.0))
                or self._died_with_process(published, died.get(pid, inf))
            )
            text = model.text_of(entry, entry.number)
            committed.append(
                Committed(entry.channel, text, entry.publisher, published, doubtful)
            )
        return committed

    def _died_with_process(self, published: float, died: float) -> bool:
        """Whether an event was only in the memory of a process that died soon after.

        If no listener has received it, nobody knows its place among the others. The
        listeners receive a reset from the next process.
        """
        in_memory = not self._in_database and "valkey" not in self._stores
        return in_memory and died - published < RECEIVED_SECONDS

    def _was_away(self, published: float, died: float) -> bool:
        """Whether a process died while Valkey was away, and had this event to send."""
        return any(
            fault.begun - GRACE < published <= died + GRACE
            and died < fault.ended + GRACE
            for fault in self._faults
            if fault.subject == "valkey"
        )

    def _explains(self, reset: Reset, died: dict[int, float]) -> bool:
        """Whether a reset is due: its events were not stored, or may be lost."""
        if reset.reported >= HISTORY:
            return True
        if "valkey" in self._stores or self._in_database:
            store = "database" if self._in_database else "valkey"
            # A listener that begins while the server is away has no place to begin at.
            began_while_away = reset.is_first and any(
                fault.begun < reset.time and fault.ended > reset.since - 1
                for fault in self._faults
                if fault.subject == store
            )
            return began_while_away or (
                not self._in_database
                and any(self._was_away(time, time) for time in died.values())
            )
        return any(reset.since - 1 < time < reset.time for time in died.values())


def is_alive(pid: int) -> bool:
    """Whether a process runs. A process that has ended may still have its id."""
    try:
        status: str = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return False
    return status != "zombie"
