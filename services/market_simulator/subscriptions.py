"""What a stream is subscribed to. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.market_simulator.questions import CRYPTO, Venue
from services.market_simulator.wire import Json

EVERY = "*"
SYMBOLS_MAX = 20_000
"""Names that all channels of a stream hold together, whatever the plan allows."""

_OF_STOCKS = (
    "trades",
    "quotes",
    "bars",
    "updatedBars",
    "dailyBars",
    "statuses",
    "lulds",
    "corrections",
    "cancelErrors",
)
_OF_CRYPTO = ("trades", "quotes", "orderbooks", "bars", "updatedBars", "dailyBars")
_WITH_TRADES = ("corrections", "cancelErrors")
_LIMITED = ("trades", "quotes")


class Rejected(Exception):
    """A subscription is not changed; `code` says why, in Alpaca's numbers."""

    def __init__(self, code: int) -> None:
        super().__init__(str(code))
        self.code = code


@dataclass(slots=True)
class Subscriptions:
    """The symbols of each channel, in the order in which they were named."""

    venue: Venue
    channels: dict[str, dict[str, None]] = field(init=False)

    def __post_init__(self) -> None:
        self.channels = {name: {} for name in (_OF_CRYPTO if self.venue is CRYPTO else _OF_STOCKS)}

    def change(self, said: Mapping[str, Any], symbols_max: int | None) -> None:
        """Do what a subscribe or unsubscribe message says, all of it or nothing.

        Corrections and cancels come and go with trades. Raises Rejected 400 for what is no list of symbols or names no
        channel, 410 for a channel that this stream does not have, 405 when trades and quotes would be of more than
        `symbols_max` symbols together.
        """
        asked = {name: symbols for name, symbols in said.items() if name != "action"}
        if not asked:
            raise Rejected(400)
        if not set(asked) <= set(self.channels):
            raise Rejected(410)
        for symbols in asked.values():
            if not isinstance(symbols, list) or not all(self._is_symbol(one) for one in symbols):
                raise Rejected(400)
        adding = said["action"] == "subscribe"
        changed = {name: dict(symbols) for name, symbols in self.channels.items()}
        for name, symbols in asked.items():
            for channel in (name, *_WITH_TRADES) if name == "trades" else (name,):
                if channel not in changed:
                    continue
                for symbol in symbols:
                    if adding:
                        changed[channel][symbol] = None
                    else:
                        changed[channel].pop(symbol, None)
        if adding and symbols_max is not None and _limited(changed) > symbols_max:
            raise Rejected(405)
        if sum(map(len, changed.values())) > SYMBOLS_MAX:
            raise Rejected(405)
        self.channels = changed

    def wants(self, channel: str, symbol: str) -> bool:
        named = self.channels.get(channel, {})
        return symbol in named or EVERY in named

    def message(self) -> Json:
        """Return the acknowledgement: always the whole subscription."""
        return {"T": "subscription"} | {name: list(symbols) for name, symbols in self.channels.items()}

    def _is_symbol(self, value: Any) -> bool:
        return isinstance(value, str) and (value == EVERY or self.venue.symbol.fullmatch(value) is not None)


def _limited(channels: Mapping[str, Mapping[str, None]]) -> float:
    """Return how many symbols count for the plan's limit: every symbol is more than any number."""
    if any(EVERY in channels[name] for name in _LIMITED):
        return float("inf")
    return sum(len(channels[name]) for name in _LIMITED)
