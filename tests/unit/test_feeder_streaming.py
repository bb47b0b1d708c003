"""What is done with what streams bring besides trades: nothing that hangs or fails delays or loses a withdrawal."""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from services.price_feeder import streaming
from services.price_feeder.conflation import StreamedTrade
from services.price_feeder.frames import Withdrawal
from services.price_feeder.streaming import Streaming
from tests.waiting import eventually

WRONG = Withdrawal("AAPL", 7, 2000.0)


@dataclass
class FakeSink:
    """Fails to withdraw so many times; asking for MSFT hangs."""

    failures: int = 0
    withdrawn: list[Withdrawal] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    async def store_streamed(self, batch: Mapping[str, StreamedTrade]) -> bool:
        return True

    async def withdraw(self, withdrawals: Sequence[Withdrawal]) -> Collection[str] | None:
        if self.failures:
            self.failures -= 1
            return None
        self.withdrawn += withdrawals
        return {each.symbol for each in withdrawals}

    async def fill_gap(self, symbols: Iterable[str]) -> None:
        self.asked += symbols
        if "MSFT" in self.asked:
            await asyncio.Event().wait()

    def note_streams(self) -> None:
        pass

    async def has_asked_for(self, symbol: str) -> None:
        async def it_has() -> bool:
            return symbol in self.asked

        await eventually(it_has)


@asynccontextmanager
async def running(sink: FakeSink) -> AsyncIterator[Streaming]:
    streams = Streaming({}, feed="iex", symbols_max=30)
    task = asyncio.create_task(streams.run(sink))
    yield streams
    task.cancel()
    await asyncio.wait({task})


async def test_gap_that_takes_long_to_fill_delays_no_withdrawal() -> None:
    sink = FakeSink()
    async with running(sink) as streams:
        streams._gap.add(["MSFT"])
        await sink.has_asked_for("MSFT")
        streams._note_withdrawal(WRONG)
        await sink.has_asked_for("AAPL")
    assert sink.withdrawn == [WRONG]


async def test_withdrawal_that_cannot_be_noted_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "UNSTORED_PAUSE_SECONDS", 0.01)
    sink = FakeSink(failures=3)
    async with running(sink) as streams:
        streams._note_withdrawal(WRONG)
        await sink.has_asked_for("AAPL")
    assert sink.withdrawn == [WRONG]
