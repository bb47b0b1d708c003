"""Alpaca's market data: the last trade of many symbols, within a deadline and a budget of requests.

With `streams` and `calendar` the only importer of alpaca. Its blocking clients run in a few threads of their own.
"""

import asyncio
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self, cast
from urllib.parse import urlsplit

from alpaca.data.enums import CryptoFeed, DataFeed
from alpaca.data.historical.crypto import CryptoHistoricalDataClient
from alpaca.data.historical.stock import StockHistoricalDataClient
from alpaca.data.requests import CryptoLatestTradeRequest, StockLatestTradeRequest

from services.price_feeder import metrics
from services.price_feeder.budget import RateBudget
from services.price_feeder.failures import BadRequest, MarketDataError, MarketDataUnavailable, Unsent
from services.price_feeder.trades import LastTrade, Rejection, last_trade, symbol_problem
from services.price_feeder.transport import DaemonThreads, Door, Pause
from shared.market_hours import SIMULATED
from shared.messages import AssetClass, asset_class

BATCH_SIZE_MAX = 100
THREADS = 4
REQUEST_SECONDS_MAX = 5.0
"""From connecting to the last byte of the answer, however slowly the bytes come."""
SIMULATED_HEADER = "X-Market-Simulated"

REPAIRS_MAX = 20
"""Refused batches that are asked for again without the bad symbol or in halves, per round."""
REFUSED_FOR_SECONDS = 600.0
REFUSED_SYMBOLS_MAX = 10_000
ASKED_SYMBOLS_MAX = 100_000
"""Symbols of which is remembered when they were asked for."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass
class LastTrades:
    """What a round brought. A symbol in neither `trades` nor `rejected` had no answer."""

    trades: list[LastTrade] = field(default_factory=list)
    rejected: dict[str, Rejection] = field(default_factory=dict)
    problems: list[MarketDataError] = field(default_factory=list)
    waiting: int = 0
    """Symbols that were not asked for: the budget is spent, or a pause is on."""
    beyond_budget: int = 0
    """Those of them for which the budget did not suffice."""
    refused: set[str] = field(default_factory=set)
    repairs: int = 0


class MarketData:
    """Alpaca's last trades of equities and crypto. Use as an async context manager."""

    def __init__(
        self,
        *,
        api_key: str,
        secret_key: str,
        url: str,
        feed: str,
        requests_per_minute: int,
        request_seconds_max: float = REQUEST_SECONDS_MAX,
    ) -> None:
        self.feed = feed
        self._budget = RateBudget(requests_per_minute)
        self._threads = DaemonThreads(THREADS, name="alpaca")
        self._round = 0
        self._asked_in: dict[str, int] = {}
        self._refused_until: dict[str, float] = {}
        self._stocks = StockHistoricalDataClient(api_key, secret_key, raw_data=True, url_override=url)
        self._crypto = CryptoHistoricalDataClient(api_key, secret_key, raw_data=True, url_override=url)
        pause = Pause()
        self._doors = {
            kind: Door(self._budget, pause, connections_max=THREADS, request_seconds_max=request_seconds_max)
            for kind in AssetClass
        }
        for client, kind in ((self._stocks, AssetClass.EQUITY), (self._crypto, AssetClass.CRYPTO)):
            client._retry = 0  # its own retries sleep in the thread and ignore Retry-After
            client._session.trust_env = urlsplit(url).hostname not in _LOOPBACK  # no proxy leads there
            for scheme in ("http://", "https://"):
                client._session.mount(scheme, self._doors[kind])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._threads.shutdown()  # not waited for: a request that hangs ends by its own deadline
        self._stocks._session.close()
        self._crypto._session.close()

    async def latest_trades(
        self, symbols: Iterable[str], *, now: datetime, seconds_max: float, stop: asyncio.Event
    ) -> LastTrades:
        """Ask for the last trade of each symbol, the least recently asked for first.

        Returns what came until `seconds_max` have passed or `stop` is set; never raises for what Alpaca does.
        """
        answers = LastTrades()
        batches = self._batches(symbols, answers)
        answering = asyncio.create_task(self._ask_all(batches, now, answers))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait(
                {answering, stopping}, timeout=seconds_max, return_when=asyncio.FIRST_COMPLETED
            )
            if not answering.done() and not stop.is_set():
                answers.problems.append(MarketDataUnavailable(f"not all answered within {seconds_max:g} s"))
        finally:
            answering.cancel()
            stopping.cancel()
            await asyncio.wait({answering, stopping})
        if not answering.cancelled():
            answering.result()  # an unexpected failure goes on to the top
        self._remember_refused(answers)
        metrics.BUDGET_LEFT.set(self._budget.left(time.monotonic()))
        return answers

    def _batches(self, symbols: Iterable[str], answers: LastTrades) -> list[list[str]]:
        """Reject what need not be asked for, and cut the rest into batches of one class each."""
        at = time.monotonic()
        self._refused_until = {symbol: until for symbol, until in self._refused_until.items() if until > at}
        wanted = []
        for symbol in symbols:
            refused = Rejection.REFUSED if symbol in self._refused_until else None
            if problem := symbol_problem(symbol) or refused:
                answers.rejected[symbol] = problem
            else:
                wanted.append(symbol)
        # A budget that does not suffice for all goes round.
        self._round += 1
        self._asked_in |= {symbol: self._asked_in.get(symbol, 0) for symbol in wanted}
        if len(self._asked_in) > ASKED_SYMBOLS_MAX:
            self._asked_in = {symbol: self._asked_in[symbol] for symbol in wanted}
        wanted.sort(key=self._asked_in.__getitem__)
        batches: list[list[str]] = []
        unfilled: dict[AssetClass, list[str]] = {}
        for symbol in wanted:
            batch = unfilled.get(asset_class(symbol))
            if batch is None or len(batch) == BATCH_SIZE_MAX:
                batch = unfilled[asset_class(symbol)] = []
                batches.append(batch)
            batch.append(symbol)
        return batches

    async def _ask_all(self, batches: Sequence[list[str]], now: datetime, answers: LastTrades) -> None:
        async with asyncio.TaskGroup() as tasks:
            for batch in batches:
                tasks.create_task(self._ask(batch, now, answers))

    async def _ask(self, batch: list[str], now: datetime, answers: LastTrades) -> None:
        """Ask for a batch; when it is refused for parts of it, so that one bad symbol does not lose the rest."""
        kind = asset_class(batch[0])
        parts = [batch]
        while parts:
            part = parts.pop()
            fetching = asyncio.get_running_loop().run_in_executor(self._threads, self._fetch, kind, part)
            try:
                raw, feed = await fetching
            except Unsent as unsent:
                answers.waiting += len(part)
                if unsent.pause:
                    answers.problems.append(unsent.pause)
                else:
                    answers.beyond_budget += len(part)
            except BadRequest as error:
                parts += _parts_to_ask(part, error, answers)
            except MarketDataError as error:
                answers.problems.append(error)
            else:
                _judge(part, raw, feed, now, answers)

    def _fetch(self, kind: AssetClass, symbols: list[str]) -> tuple[Mapping[str, object], str]:
        """Send one request, in a thread; return what Alpaca says of each symbol, and which feed it is."""
        door = self._doors[kind]
        door.expect_one_request()
        outcome = MarketDataUnavailable.outcome
        try:
            raw = self._request(kind, symbols)
            outcome = "ok"
        except Unsent:
            outcome = ""
            raise
        except MarketDataError as error:
            outcome = error.outcome
            raise
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            # Whatever alpaca-py meets in a body that is not what it expects.
            raise MarketDataUnavailable("answered with something that is not a list of trades") from error
        finally:
            if outcome:
                metrics.REQUESTS.labels(outcome).inc()
                self._asked_in.update(dict.fromkeys(symbols, self._round))
        if door.answer_headers.get(SIMULATED_HEADER, "").strip().lower() == "true":
            return raw, SIMULATED
        return raw, CryptoFeed.US.value if kind is AssetClass.CRYPTO else self.feed

    def _request(self, kind: AssetClass, symbols: list[str]) -> Mapping[str, object]:
        if kind is AssetClass.CRYPTO:
            crypto = CryptoLatestTradeRequest(symbol_or_symbols=symbols)
            answer = self._crypto.get_crypto_latest_trade(crypto, feed=CryptoFeed.US)
        else:
            equities = StockLatestTradeRequest(symbol_or_symbols=symbols, feed=DataFeed(self.feed))
            answer = self._stocks.get_stock_latest_trade(equities)
        return cast(Mapping[str, object], answer)

    def _remember_refused(self, answers: LastTrades) -> None:
        """Do not ask for refused symbols again for a while, unless nothing else worked either."""
        if answers.trades:
            until = time.monotonic() + REFUSED_FOR_SECONDS
            room = REFUSED_SYMBOLS_MAX - len(self._refused_until)
            self._refused_until |= dict.fromkeys(sorted(answers.refused)[:room], until)


def _judge(
    symbols: list[str], raw: Mapping[str, object], feed: str, now: datetime, answers: LastTrades
) -> None:
    for symbol in symbols:
        trade: LastTrade | Rejection = Rejection.MISSING
        if symbol in raw:
            trade = last_trade(symbol, raw[symbol], feed=feed, now=now)
        if isinstance(trade, LastTrade):
            answers.trades.append(trade)
        else:
            answers.rejected[symbol] = trade


def _parts_to_ask(symbols: list[str], error: BadRequest, answers: LastTrades) -> list[list[str]]:
    """Return what to ask for instead of a refused batch: all but the symbol that Alpaca names, else its halves."""
    named = _named(symbols, error.message)
    bad = set(named or (symbols if len(symbols) == 1 else ()))
    answers.refused |= bad
    answers.rejected |= dict.fromkeys(bad, Rejection.REFUSED)
    rest = [symbol for symbol in symbols if symbol not in bad]
    if not rest:
        return []
    if answers.repairs >= REPAIRS_MAX:
        answers.problems.append(error)
        return []
    answers.repairs += 1
    if bad:
        return [rest]
    middle = len(rest) // 2
    return [rest[middle:], rest[:middle]]


def _named(symbols: list[str], message: str) -> set[str]:
    """Return those of `symbols` that a message like `invalid symbol: XYZ` names after the word symbol."""
    _, *after = re.split("symbol", message, maxsplit=1, flags=re.IGNORECASE)
    words = {word.strip("./-") for text in after for word in re.findall(r"[A-Za-z0-9./-]+", text)}
    return words & set(symbols)
