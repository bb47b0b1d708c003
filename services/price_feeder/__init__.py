"""The price feeder: hears Alpaca's trades, and on every interval asks for the last trade of every held symbol.

Of several on one database the one that has the lease works; the others stand by.

Reads `positions` (which symbols are held), Alpaca's market data, streams and calendar. Writes `asset_prices`, `leases`,
`market_days` and `refreshes`. Publishes the changed `PriceTick`s after the commit (`prices.v1.>`), `PricesConfirmed`
after every round (`feed.v1.confirmed`) and `FeedStatus` on a change (`feed.v1.status`). Answers what symbols cost
(`feed.v1.prices_requested`), and asks the market at once for who wants that (`feed.v1.refresh_requested`).

The seed's PriceService, and where its methods are here:

- `get_all_active_symbols`: `queries.held_symbols`
- `fetch_prices_from_alpaca`: `market_data.MarketData.latest_trades`
- `update_price_cache`: `queries.store_trades`
- `get_price`, `get_prices`: `queries.cached_price`, `queries.cached_prices`
- `is_price_fresh`: `shared.freshness.is_price_fresh`
- `update_all_prices`: `feed.Feed.take_round`
"""
