"""The notes of listeners about what they receive.

The process of each application has a listener, which writes its notes into a file. It
stops at random, and resumes with its last id.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import NamedTuple

import tgstream
from tests.ledger.book import Record
from tests.ledger.plans import CHANNELS
from tgstream import Event

RECEIVED_SECONDS = 1.0
"""Seconds in which a listener receives an event."""


class Note(NamedTuple):
    """Something that a listener received."""

    time: float
    kind: str
    """``open``, ``event``, ``reset``, ``error``, or ``beat`` for a heartbeat."""
    text: str

    def line(self) -> str:
        return f"{self.time} {self.kind} {self.text}\n"


def read_notes(path: Path) -> list[Note]:
    """Return the notes of a file. A process may have died while it wrote a line."""
    notes = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            seconds, kind, text = line[:-1].split(" ", 2)
            notes.append(Note(float(seconds), kind, text))
    return notes


class Last(NamedTuple):
    """The last events of a run."""

    begun: float
    """When the first one was published, in seconds of ``time.monotonic()``."""
    published: float
    """When all of them had been published."""
    texts: dict[str, set[str]]
    """Their data, by channel."""

    def arrived(self, channels: list[str], notes: list[Note]) -> bool:
        """Whether a listener has received them, or a reset in their place.

        A listener that has begun meanwhile need not receive all of them. It has those
        that it must receive after so many seconds.
        """
        if notes and notes[0].time > self.begun:
            return notes[-1].time > self.published + RECEIVED_SECONDS
        texts = {note.text for note in notes if note.kind == "event"}
        resets = [
            note
            for note in notes
            if note.kind == "reset" and note.time > self.published
        ]
        return all(
            self.texts[channel] <= texts
            or any(_concerns(reset, channel) for reset in resets)
            for channel in channels
        )


def records(
    listener: str,
    channels: list[str],
    notes: list[Note],
    stayed: bool,
    begun: float = 0.0,
) -> list[Record]:
    """Return what a listener received, for each of its channels.

    :param begun: when the run began.
    """
    opened = next((note.time for note in notes if note.kind == "open"), float("inf"))
    return [
        Record(
            listener,
            channel,
            opened - begun,
            [
                (note.time - begun, None if note.kind == "reset" else note.text)
                for note in notes
                if _concerns(note, channel)
            ],
            stayed,
        )
        for channel in channels
    ]


def _concerns(note: Note, channel: str) -> bool:
    """Whether it is an event of a channel, or a reset of it or of all channels."""
    if note.kind == "event":
        return note.text.partition(" ")[0] == channel
    return note.kind == "reset" and (not note.text or channel in note.text)


def note_of(event: Event) -> Note:
    """Return the note of an event."""
    now, data = time.monotonic(), event.data
    if event.event == "reset":
        return Note(now, "reset", str(data))
    if data is not None:
        return Note(now, "event", str(data))
    return Note(now, "open" if event.comment == "open" else "beat", "")


# In the processes of the applications.


def listen(channels: list[str], after: str | None, plant: str = "") -> Iterator[Event]:
    """Listen to channels, with a planted fault if one is named."""
    return PLANTS.get(plant, iter)(tgstream.listen(*channels, after=after))


def follow(folder: str, name: str, plant: str) -> None:
    """Listen until the process ends. Append what arrives to a file of the folder.

    :param name: of the process.
    """
    random = Random(f"{name} follow")
    channels = choose_channels(random)
    path = Path(folder, f"{name} {os.getpid()} {'+'.join(channels)}.notes")
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    after = None

    def write(note: Note) -> None:
        os.write(file, note.line().encode())

    while True:
        until = time.monotonic() + random.expovariate(0.3)
        try:
            with closing(listen(channels, after, plant)) as events:  # type: ignore
                for event in events:
                    write(note_of(event))
                    after = event.id or after
                    if time.monotonic() > until:
                        break
        except Exception as error:
            write(Note(time.monotonic(), "error", repr(error)))
        time.sleep(random.expovariate(5))


def choose_channels(random: Random) -> list[str]:
    """Choose the channels of a listener: one, or several in one stream."""
    return random.sample(CHANNELS, random.choice([1, 2, 3]))


# Planted faults, which the ledger must find.


def _drop(events: Iterator[Event]) -> Iterator[Event]:
    for number, event in enumerate(events):
        if number % 10 != 9:
            yield event


def _duplicate(events: Iterator[Event]) -> Iterator[Event]:
    for number, event in enumerate(events):
        yield event
        if number % 10 == 9:
            yield event


def _reorder(events: Iterator[Event]) -> Iterator[Event]:
    for number, event in enumerate(events):
        if number % 10 == 4:
            yield next(events)
        yield event


PLANTS: dict[str, Callable[[Iterator[Event]], Iterator[Event]]] = {
    "drop": _drop,
    "duplicate": _duplicate,
    "reorder": _reorder,
}
