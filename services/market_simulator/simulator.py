"""The simulator's state: its market, its clock, what tests have pinned and which faults they have ordered."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

from services.market_simulator.access import BusiestMinute, Credentials, RateLimit
from services.market_simulator.faults import Faults
from services.market_simulator.instants import datetime_of, ns_of
from services.market_simulator.market import Market, Trade
from services.market_simulator.market_clock import MarketClock, RealClock, ReplayClock
from services.market_simulator.replay import ReplayFileError, read_replay
from services.market_simulator.settings import Settings
from services.market_simulator.spoiling import LastSent
from services.market_simulator.streams import Streams
from services.market_simulator.synthetic import SyntheticMarket
from services.market_simulator.tape import Tape
from shared.settings import SettingsError

PINS_MAX = 10_000
"""Symbols of which tests may pin or report trades."""


@dataclass(slots=True)
class Simulator:
    market: Market
    clock: MarketClock
    credentials: Credentials
    data_limit: RateLimit
    trading_limit: RateLimit
    stream_symbols_max: int
    faults: Faults = field(default_factory=Faults)
    last_sent: LastSent = field(default_factory=LastSent)
    requests: int = 0
    busiest_minute: BusiestMinute = field(default_factory=BusiestMinute)
    """Of market data; the trading host's requests have a limit of their own."""
    _trade_id: int = 0
    tape: Tape = field(init=False)
    streams: Streams = field(init=False)

    def __post_init__(self) -> None:
        self.tape = Tape(self.market)
        self.streams = Streams(self.tape, self.clock, self.credentials)

    def pin(self, prices: Mapping[str, tuple[Decimal, int]]) -> None:
        """Make trades of a price and an instant the latest ones of symbols until they are unpinned, and stream them."""
        trades = {
            symbol: Trade(
                at_ns=at_ns,
                price=price,
                size=Decimal(100),
                id=self.new_trade_id(),
                exchange="V",
                conditions=("@",),
            )
            for symbol, (price, at_ns) in prices.items()
        }
        self.streams.turn()
        for symbol, trade in trades.items():
            self.tape.pin(symbol, trade)
        self.streams.announce(trades.items())

    def unpin(self, symbols: Iterable[str]) -> None:
        """Let symbols trade by themselves again."""
        pinned = [symbol for symbol in symbols if symbol in self.tape.pins]
        for symbol in pinned:
            self.tape.unpin(symbol)
        self.streams.announce_latest(pinned)

    def new_trade_id(self) -> int:
        """Return an id that no trade has, small enough to be exact in every JSON."""
        self._trade_id = max(self._trade_id + 1, time.time_ns() // 1000)
        return self._trade_id

    def source(self) -> str:
        """Say in words where the prices come from."""
        if isinstance(self.clock, ReplayClock):
            now: datetime = datetime_of(self.clock.now_ns())
            return f"replay of recorded bars from {now:%Y-%m-%d %H:%M} UTC at {self.clock.speed:g} times the speed"
        return "synthetic random walk, trading around the clock"


def build(settings: Settings) -> Simulator:
    """Build the simulator that the settings describe; raises SettingsError for a file that cannot be replayed."""
    market, clock = _source(settings)
    return Simulator(
        market=market,
        clock=clock,
        credentials=Credentials(settings.simulator_api_key, settings.simulator_secret_key),
        data_limit=RateLimit(settings.simulator_rate_limit),
        trading_limit=RateLimit(settings.simulator_rate_limit),
        stream_symbols_max=settings.simulator_stream_symbols_max,
    )


def _source(settings: Settings) -> tuple[Market, MarketClock]:
    if settings.simulator_replay_file is None:
        return SyntheticMarket(settings.simulator_seed), RealClock()
    try:
        recorded = read_replay(settings.simulator_replay_file)
    except ReplayFileError as error:
        raise SettingsError(f"SIMULATOR_REPLAY_FILE: {error}") from error
    start = settings.simulator_replay_start
    start_ns = recorded.first_ns if start is None else ns_of(start)
    return recorded, ReplayClock(start_ns, settings.simulator_replay_speed, recorded.end_ns)
