"""The simulator's state: its market, its clock, what tests have pinned and which faults they have ordered."""

from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

from services.market_simulator.access import Credentials, RateLimit
from services.market_simulator.faults import Faults
from services.market_simulator.instants import datetime_of, ns_of
from services.market_simulator.market import Market, Trade
from services.market_simulator.market_clock import MarketClock, RealClock, ReplayClock
from services.market_simulator.replay import ReplayFileError, read_replay
from services.market_simulator.settings import Settings
from services.market_simulator.spoiling import LastSent
from services.market_simulator.synthetic import SyntheticMarket
from shared.settings import SettingsError

PINS_MAX = 10_000


@dataclass(slots=True)
class Simulator:
    market: Market
    clock: MarketClock
    credentials: Credentials
    data_limit: RateLimit
    trading_limit: RateLimit
    faults: Faults = field(default_factory=Faults)
    last_sent: LastSent = field(default_factory=LastSent)
    pins: dict[str, Trade] = field(default_factory=dict)
    requests: int = 0

    def latest_trade(self, symbol: str, at_ns: int) -> Trade | None:
        """Return the pinned trade of a symbol, else the market's last one at an instant."""
        return self.pins.get(symbol) or self.market.latest_trade(symbol, at_ns)

    def pin(self, symbol: str, price: Decimal, at_ns: int) -> None:
        """Make a trade the latest one of a symbol until it is unpinned."""
        self.pins[symbol] = Trade(
            at_ns=at_ns, price=price, size=Decimal(100), id=at_ns // 1000, exchange="V", conditions=("@",)
        )

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
