"""What a watched portfolio is worth, in exact decimals, and the JSON of it. Pure.

The numbers are those of the database's views, and the text that of `/current`: a market value is rounded once, half
away from zero, and a position of a trillion dollars or more has none. Tests compare the two.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_HALF_UP, Context, Decimal
from functools import lru_cache

import orjson

from shared.freshness import MarketMoment, PriceStatus
from shared.market_hours import SIMULATED
from shared.messages import PriceTick

VALUE_LIMIT = Decimal(10) ** 12
"""A market value from here on is none: no position is worth a trillion dollars."""

_EXACT = Context(prec=60, rounding=ROUND_HALF_UP)
"""Holds every product of shares (20 digits) and a price (15), and a percentage of amounts with 18."""
_CENT = Decimal("0.01")
_HUNDRED = Decimal(100)
_ZERO = Decimal("0.00")
_NO_VALUE = (
    '"current_value":null,"price_per_share":null,"unrealized_gain_loss":null,"unrealized_gain_loss_percent":null,'
    '"price_status":"missing","reason":"%s"}'
)


class Quote:
    """A symbol's last price as this gateway knows it; shared by all portfolios that hold it."""

    __slots__ = (
        "_as_of",
        "_ending",
        "_ending_status",
        "confirmed_at",
        "feed",
        "price",
        "price_text",
        "received_at",
        "sequence",
        "status",
        "symbol",
    )

    def __init__(self, symbol: str) -> None:
        self.symbol = symbol
        self.drop()

    def drop(self) -> None:
        """Have no price, as at the beginning."""
        self.price: Decimal | None = None
        self.price_text = ""
        self.received_at: datetime | None = None
        self.confirmed_at: datetime | None = None
        self.feed = ""
        self.sequence = 0
        self.status: PriceStatus | None = None
        self._as_of = ""
        self._ending = ""
        self._ending_status: PriceStatus | None = None

    def take(self, tick: PriceTick, confirmed_at: datetime) -> None:
        """Take another price; whoever hands it over sets its `status`."""
        self.price = tick.price
        self.price_text = price_text(tick.price)
        self.received_at = tick.received_at
        self.confirmed_at = confirmed_at
        self.feed = tick.feed
        self.sequence = tick.sequence
        self.status = None
        self._as_of = instant_text(tick.traded_at)
        self._ending = ""

    def ending(self) -> str:
        """Return the end of a position's JSON; made once for all who hold the symbol."""
        if not self._ending or self._ending_status is not self.status:
            self._ending_status = self.status
            self._ending = (
                f'"price_as_of":"{self._as_of}","price_status":"{self.status}",'
                f'"price_feed":{orjson.dumps(self.feed).decode()}}}'
            )
        return self._ending


@dataclass(frozen=True, slots=True)
class Holding:
    """A position as it is stored."""

    ticker: str
    shares: Decimal
    cost_basis: Decimal


@dataclass(frozen=True, slots=True)
class Holdings:
    """A user's cash and positions, in order of their ticker."""

    user_id: int
    is_active: bool
    cash_balance: Decimal
    positions: tuple[Holding, ...]


class _Position:
    __slots__ = ("beginning", "changed_in", "cost_basis", "quote", "shares", "text", "value")

    def __init__(self, holding: Holding, quote: Quote, before: "_Position | None" = None) -> None:
        self.quote = quote
        self.shares = holding.shares
        self.cost_basis = holding.cost_basis
        self.beginning = (
            f'{{"ticker":{orjson.dumps(holding.ticker).decode()},"shares":{quantity_text(holding.shares)},'
            f'"cost_basis":{holding.cost_basis},'
        )
        self.value: Decimal | None = before.value if before else None
        self.text = ""
        self.changed_in = 0

    def revalue(self) -> None:
        quote = self.quote
        self.value = None if quote.price is None else market_value(self.shares, quote.price)
        if self.value is None:
            reason = "no_price" if quote.price is None else "value_out_of_range"
            self.text = self.beginning + _NO_VALUE % reason
            return
        gain = _EXACT.subtract(self.value, self.cost_basis)
        self.text = (
            f'{self.beginning}"current_value":{self.value},"price_per_share":{quote.price_text},'
            f'"unrealized_gain_loss":{gain},"unrealized_gain_loss_percent":{gain_percent(gain, self.cost_basis)},'
            f"{quote.ending()}"
        )


class Portfolio:
    """A user's positions at the last prices, and which of them changed when.

    `version` counts the states that were shown. Who has seen one of them is brought up to date with `changes_since`.
    """

    def __init__(self, holdings: Holdings, quotes: Mapping[str, Quote], market: str) -> None:
        self.key = secrets.token_hex(6)
        """Tells the versions of this object from those of another gateway, or of an earlier time."""
        self.version = 1
        self.holdings = holdings
        self._market = market
        self._whole_since = 1
        self._positions: dict[str, _Position] = {}
        self._touched: set[str] = set()
        self._changes: tuple[int, int, str] = (0, 0, "")
        self._hold(holdings, quotes)

    def hold(self, holdings: Holdings, quotes: Mapping[str, Quote]) -> None:
        """Take what is stored now."""
        before, self.holdings = self.holdings, holdings
        if holdings == before:
            return
        self.version += 1
        if [held.ticker for held in holdings.positions] != list(self._positions):
            self._whole_since = self.version
            self._hold(holdings, quotes)
            return
        for was, held in zip(before.positions, holdings.positions, strict=True):
            if held != was:
                self._positions[held.ticker] = _Position(
                    held, quotes[held.ticker], self._positions[held.ticker]
                )
                self._touched.add(held.ticker)

    def touch(self, symbol: str) -> None:
        """Learn that the quote of a held symbol has changed."""
        self._touched.add(symbol)

    def tell_market(self, market: str) -> None:
        """Take the JSON that says whether the market is open."""
        if market != self._market:
            self._market = market
            self.version += 1

    def settle(self) -> int:
        """Bring what was touched up to date; return the version."""
        if self._touched:
            self.version += 1
            for symbol in self._touched:
                position = self._positions.get(symbol)
                if position is None:
                    continue
                was_priced = position.value is not None
                position.revalue()
                position.changed_in = self.version
                if was_priced != (position.value is not None):
                    self._whole_since = self.version
            self._touched.clear()
        return self.version

    def is_known(self, version: int) -> bool:
        """Tell whether changes since that version say it all: no position has come or gone."""
        return self._whole_since <= version <= self.version

    def changes_since(self, version: int, now: datetime) -> str:
        """Return the JSON of the totals and of the positions that changed after that version, which `is_known`."""
        assert not self._touched
        since, until, text = self._changes
        if (since, until) != (version, self.version):
            changed = ",".join(
                position.text for position in self._positions.values() if position.changed_in > version
            )
            total, investment, newest, is_fresh, simulated = self._totals()
            text = (
                f'{{"total_value":{total},"investment_value":{investment},'
                f'"cash_balance":{self.holdings.cash_balance},"last_updated":"{instant_text(newest or now)}",'
                f'"price_fresh":{_boolean(is_fresh)},"simulated":{_boolean(simulated)},"market":{self._market},'
                f'"positions":[{changed}]}}'
            )
            self._changes = version, self.version, text
        return text

    def whole(self, now: datetime) -> str:
        """Return the JSON of the whole, as `/current` answers."""
        assert not self._touched
        priced = ",".join(held.text for held in self._positions.values() if held.value is not None)
        unpriced = ",".join(held.text for held in self._positions.values() if held.value is None)
        total, investment, newest, is_fresh, simulated = self._totals()
        return (
            f'{{"total_value":{total},"investment_value":{investment},"cash_balance":{self.holdings.cash_balance},'
            f'"positions":[{priced}],"last_updated":"{instant_text(newest or now)}",'
            f'"price_fresh":{_boolean(is_fresh)},"unpriced":[{unpriced}],"simulated":{_boolean(simulated)},'
            f'"market":{self._market}}}'
        )

    def pulse(self, now: datetime) -> str:
        """Return the JSON of a heartbeat."""
        _, _, newest, is_fresh, _ = self._totals()
        return (
            f'{{"at":"{instant_text(now)}","last_updated":"{instant_text(newest or now)}",'
            f'"price_fresh":{_boolean(is_fresh)}}}'
        )

    def _hold(self, holdings: Holdings, quotes: Mapping[str, Quote]) -> None:
        self._positions = {
            holding.ticker: _Position(holding, quotes[holding.ticker]) for holding in holdings.positions
        }
        for position in self._positions.values():
            position.revalue()
            position.changed_in = self.version
        self._touched.clear()

    def _totals(self) -> tuple[Decimal, Decimal, datetime | None, bool, bool]:
        """Return total and investment value, the newest confirmation, whether all is fresh, and whether simulated."""
        investment = _ZERO
        newest: datetime | None = None
        is_fresh, simulated, priced = True, False, 0
        for position in self._positions.values():
            if position.value is None:
                continue
            quote = position.quote
            priced += 1
            investment = _EXACT.add(investment, position.value)
            assert quote.confirmed_at is not None
            if newest is None or quote.confirmed_at > newest:
                newest = quote.confirmed_at
            is_fresh = is_fresh and quote.status is not PriceStatus.STALE
            simulated = simulated or quote.feed == SIMULATED
        if not priced:
            is_fresh = not self._positions
        return _EXACT.add(investment, self.holdings.cash_balance), investment, newest, is_fresh, simulated


def market_value(shares: Decimal, price: Decimal) -> Decimal | None:
    """Return shares times price, rounded to the cent; None from a trillion dollars on."""
    value = _EXACT.quantize(_EXACT.multiply(shares, price), _CENT)
    return value if value < VALUE_LIMIT else None


def gain_percent(gain: Decimal, cost_basis: Decimal) -> Decimal:
    """Return the gain as a percentage of the cost with two decimals; 0 when nothing was paid."""
    if not cost_basis:
        return _ZERO
    return _EXACT.quantize(_EXACT.divide(_EXACT.multiply(gain, _HUNDRED), cost_basis), _CENT)


def market_text(moment: MarketMoment) -> str:
    """Write the JSON that says whether equities trade."""
    return _market_text(moment.is_open, moment.next_open, moment.next_close)


@lru_cache(maxsize=4)  # every request asks, and it changes twice a day
def _market_text(is_open: bool, next_open: datetime, next_close: datetime) -> str:
    return (
        f'{{"is_open":{_boolean(is_open)},"next_open":"{instant_text(next_open)}",'
        f'"next_close":"{instant_text(next_close)}"}}'
    )


def price_text(price: Decimal) -> str:
    """Write a price with two to four decimals."""
    whole, _, places = f"{price:.4f}".partition(".")
    return f"{whole}.{places.rstrip('0').ljust(2, '0')}"


def quantity_text(shares: Decimal) -> str:
    """Write shares with as many decimals as they have."""
    text = f"{shares:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def instant_text(at: datetime) -> str:
    """Write an instant of UTC in RFC 3339, with as many digits of a second as it has."""
    text = at.replace(tzinfo=None).isoformat()
    return (text.rstrip("0") if at.microsecond else text) + "Z"


def _boolean(value: bool) -> str:
    return "true" if value else "false"
