"""What is true of the simulated market: every price it ever had, known without asking anybody."""

from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal

from services.market_simulator.market import Trade
from services.market_simulator.synthetic import SyntheticMarket

CENT = Decimal("0.01")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def market_value(shares: Decimal, price: Decimal) -> Decimal:
    """Return shares times price, rounded to the cent, half away from zero."""
    return (shares * price).quantize(CENT, ROUND_HALF_UP)


def traded_at(trade: Trade) -> datetime:
    """Return a trade's time as the feeder stores it: what is beyond a microsecond is cut."""
    return _EPOCH + timedelta(microseconds=trade.at_ns // 1000)


class Market:
    """The market of a seed."""

    def __init__(self, seed: int) -> None:
        self._market = SyntheticMarket(seed)

    def price_of(self, symbol: str, traded_at: datetime) -> Decimal | None:
        """Return the price of the trade at a microsecond; None when there was no trade."""
        microseconds = _microseconds(traded_at)
        trade = self._market.latest_trade(symbol, microseconds * 1000 + 999)
        if trade is None or trade.at_ns // 1000 != microseconds:
            return None
        return trade.price

    def latest_trade(self, symbol: str, at: datetime) -> Trade:
        """Return the last trade of a listed symbol up to an instant."""
        trade = self._market.latest_trade(symbol, _microseconds(at) * 1000)
        assert trade is not None
        return trade


def _microseconds(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1)
