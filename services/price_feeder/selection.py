"""Which held symbols are streamed, when not all can be: the most widely held ones."""

import time
from collections.abc import Iterable

from services.price_feeder import queries
from services.price_feeder.trades import symbol_problem
from shared.database import Database
from shared.messages import AssetClass, asset_class

COUNT_EVERY_SECONDS = 60.0


class Selection:
    """The choice, made anew when other symbols are held and once a minute; while all fit nothing is counted."""

    def __init__(self, database: Database, symbols_max: int) -> None:
        self._database = database
        self._symbols_max = symbols_max
        self._held: frozenset[str] = frozenset()
        self._counted_at = 0.0
        self._ranked: dict[AssetClass, list[str]] = {}

    async def choose(self, held: Iterable[str]) -> dict[AssetClass, list[str]]:
        """Return the symbols to stream by class, the most widely held first.

        Raises DatabaseUnavailable.
        """
        symbols = frozenset(symbol for symbol in held if symbol_problem(symbol) is None)
        by_class: dict[AssetClass, set[str]] = {kind: set() for kind in AssetClass}
        for symbol in symbols:
            by_class[asset_class(symbol)].add(symbol)
        at = time.monotonic()
        is_old = symbols != self._held or at - self._counted_at >= COUNT_EVERY_SECONDS
        chosen: dict[AssetClass, list[str]] = {}
        for kind, names in by_class.items():
            if len(names) > self._symbols_max and (is_old or kind not in self._ranked):
                self._ranked[kind] = await queries.most_widely_held(
                    self._database, is_pair=kind is AssetClass.CRYPTO, count_max=2 * self._symbols_max
                )
                self._counted_at = at
            if len(names) <= self._symbols_max:
                chosen[kind] = sorted(names)
            else:
                chosen[kind] = [name for name in self._ranked[kind] if name in names][: self._symbols_max]
        self._held = symbols
        return chosen
