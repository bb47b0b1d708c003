"""Hears ticks with bare nats-py, and the market's trades: `python -m bench.tick_ears NATS_URL [STREAM_URL]`.

Questions, one a line on stdin: `{"do": "follow", "symbols": […]}` follows these at the market, `{"do": "begin"}`
forgets what was heard before, `{"do": "report"}` says what was heard since, `{"do": "newest"}` tells the newest trade
of each symbol that the market has sent at all.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple

import aiohttp
import msgpack  # type: ignore[import-untyped]  # has no types of its own
import nats
import orjson
from nats.aio.msg import Msg

from bench.figures import percentile
from bench.processes import answer_questions
from shared.messages import ALL_PRICES

_WINDOW_US = 250_000
"""Between two ticks of a symbol, at least."""
_KEYS = {"APCA-API-KEY-ID": "bench", "APCA-API-SECRET-KEY": "bench", "Content-Type": "application/msgpack"}


class Ears:
    def __init__(self, market: aiohttp.ClientWebSocketResponse | None) -> None:
        self._market = market
        self._ticks: list[tuple[int, bytes]] = []
        self._trades: dict[str, dict[int, float]] = {}
        """Prices by symbol and microsecond of the trade."""
        self._newest: dict[str, tuple[int, float]] = {}

    async def hear_tick(self, message: Msg) -> None:
        self._ticks.append((time.time_ns() // 1000, message.data))

    async def hear_market(self) -> None:
        assert self._market is not None
        async for frame in self._market:
            for trade in msgpack.unpackb(frame.data, timestamp=2):
                if trade["T"] == "t":
                    symbol, at_us, price = trade["S"], trade["t"] // 1000, trade["p"]
                    self._trades.setdefault(symbol, {})[at_us] = price
                    if at_us >= self._newest.get(symbol, (0, 0.0))[0]:
                        self._newest[symbol] = at_us, price

    async def answer(self, question: dict[str, Any]) -> dict[str, object]:
        if question["do"] == "follow":
            assert self._market is not None
            await self._market.send_bytes(
                msgpack.packb({"action": "subscribe", "trades": question["symbols"]})
            )
            return {}
        if question["do"] == "begin":
            self._ticks.clear()
            return {}
        if question["do"] == "report":
            return self._report()
        return {"trades": {symbol: (at_us, price) for symbol, (at_us, price) in self._newest.items()}}

    def _report(self) -> dict[str, object]:
        """Return how long ticks took, in milliseconds, and how many of them were wrong.

        `since_due` counts from the moment at which a tick might have gone out: when the market sent its trade, or, if
        that is later, when the conflation window after the symbol's tick before it had ended. `since_received` counts
        from the tick's own `received_at`. Those that were stored together have the same one.
        """
        heard = [(at_us, orjson.loads(payload)) for at_us, payload in self._ticks]
        since_due, since_received, backwards, not_traded = [], [], 0, 0
        last: dict[str, _Heard] = {}
        for at_us, tick in heard:
            symbol = tick["symbol"]
            now = _Heard(
                tick["sequence"], _microseconds(tick["traded_at"]), _microseconds(tick["received_at"])
            )
            before = last.get(symbol)
            last[symbol] = now
            due_us = now.traded_us if before is None else max(now.traded_us, before.received_us + _WINDOW_US)
            since_due.append((at_us - due_us) / 1000)
            since_received.append((at_us - now.received_us) / 1000)
            if before is not None:
                backwards += now.sequence <= before.sequence or now.traded_us < before.traded_us
            if self._trades:
                price = self._trades.get(symbol, {}).get(now.traded_us)
                not_traded += price is None or Decimal(str(price)) != Decimal(tick["price"])
        return {
            "ticks": len(heard),
            "batches": len({tick["received_at"] for _, tick in heard}),
            "since_due": _spread(since_due),
            "since_received": _spread(since_received),
            "wrong": backwards + not_traded,
        }


class _Heard(NamedTuple):
    """A tick that was heard; times in microseconds since the epoch."""

    sequence: int
    traded_us: int
    received_us: int


def _spread(milliseconds: Sequence[float]) -> dict[str, float]:
    return (
        {"p50": percentile(milliseconds, 0.50), "p99": percentile(milliseconds, 0.99)} if milliseconds else {}
    )


def _microseconds(instant: str) -> int:
    at = datetime.fromisoformat(instant)
    return int(at.replace(microsecond=0).timestamp()) * 1_000_000 + at.microsecond


async def main(nats_url: str, stream_url: str | None) -> None:
    client = await nats.connect(nats_url)
    async with AsyncExitStack() as stack:
        market = None
        if stream_url is not None:
            session = await stack.enter_async_context(aiohttp.ClientSession())
            market = await stack.enter_async_context(session.ws_connect(stream_url, headers=_KEYS))
        ears = Ears(market)
        await client.subscribe(
            ALL_PRICES,
            cb=ears.hear_tick,
            pending_msgs_limit=1_000_000,
            pending_bytes_limit=1024 * 1024 * 1024,
        )
        await client.flush()
        hearing = [asyncio.create_task(ears.hear_market())] if market else []
        await answer_questions(ears.answer)
        for task in hearing:
            task.cancel()
        await asyncio.gather(*hearing, return_exceptions=True)
    await client.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None))
