"""The commands about dead letters: messages of the bus that could not be handled and were put aside."""

import asyncio
from argparse import Namespace
from collections.abc import Sequence

from services.admin.amounts import shown
from services.admin.commands import CommandFailed, counted, instant, table
from services.admin.settings import DeadLetterSettings
from shared.bus import Bus, BusUnavailable, NotReplayable, NumberedLetter
from shared.messages import SNAPSHOT_DUE, DeadLetter

COMMANDS = ("dead-letters", "replay-dead-letter", "discard-dead-letter")
CONNECT_SECONDS_MAX = 5.0


async def performed(settings: DeadLetterSettings, given: Namespace) -> str:
    """Do what was asked; return the text to print."""
    url = settings.nats_url.get_secret_value()
    async with Bus(url, name="admin", replicas=settings.nats_stream_replicas) as bus:
        try:
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                await bus.wait_until_ready(asyncio.Event())
        except TimeoutError:
            raise CommandFailed(f"NATS cannot be used: {await bus.check()}") from None
        try:
            match given.command:
                case "dead-letters":
                    return listed(await bus.dead_letters())
                case "replay-dead-letter":
                    return await _replay(bus, await _chosen(bus, given.id))
                case _:
                    return await _discard(bus, await _chosen(bus, given.id))
        except BusUnavailable as error:
            raise CommandFailed(f"NATS cannot be used: {error}") from error


def listed(letters: Sequence[NumberedLetter]) -> str:
    """Return the letters as a table."""
    if not letters:
        return "no dead letters"
    header = ("id", "put aside", "by", "subject", "deliveries", "bytes", "payload", "reason")
    return "\n".join(table(header, [_row(each) for each in letters], left=(1, 2, 3, 6, 7)))


def _row(numbered: NumberedLetter) -> tuple[str, ...]:
    number, letter = numbered
    if letter is None:
        return (str(number), "-", "-", "-", "-", "-", "-", "is no dead letter, but somebody else's")
    return (
        str(number),
        instant(letter.put_aside_at),
        _plain(letter.put_aside_by),
        _plain(letter.subject),
        str(letter.deliveries),
        str(letter.size),
        shown(letter.content.decode(errors="replace")),
        _plain(letter.reason),
    )


def _plain(text: str) -> str:
    """Return the text with nothing in it that a terminal would obey."""
    return ascii(text)[1:-1]


async def _chosen(bus: Bus, number: int | None) -> list[NumberedLetter]:
    if number is None:
        return await bus.dead_letters()
    letter = await bus.dead_letter(number)
    if letter is None:
        raise CommandFailed(f"there is no dead letter {number}")
    return [letter]


def _cut_short(done: int, what: str, error: BusUnavailable) -> str:
    before = f"{counted(done, 'dead letter')} {what}; then " if done else ""
    return f"{before}NATS cannot be used: {error}"


async def _replay(bus: Bus, letters: Sequence[NumberedLetter]) -> str:
    done: list[DeadLetter] = []
    problems: list[str] = []
    for each in letters:
        try:
            await bus.replay(each)
        except BusUnavailable as error:
            raise CommandFailed(_cut_short(len(done), "replayed", error)) from error
        except NotReplayable as error:
            problems.append(f"dead letter {each.number} cannot be replayed: {error}")
        else:
            assert each.letter is not None
            done.append(each.letter)
    if problems and not done:
        raise CommandFailed("; ".join(problems))
    lines = [f"{counted(len(done), 'dead letter')} replayed", *problems]
    if any(letter.subject == SNAPSHOT_DUE for letter in done):
        lines.append("a slot that is too late by now is skipped and counted, not stored")
    return "\n".join(lines)


async def _discard(bus: Bus, letters: Sequence[NumberedLetter]) -> str:
    gone = 0
    for each in letters:
        try:
            gone += await bus.discard(each.number)
        except BusUnavailable as error:
            raise CommandFailed(_cut_short(gone, "discarded", error)) from error
    return f"{counted(gone, 'dead letter')} discarded"
