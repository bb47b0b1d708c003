"""The price feeder: on every interval, asks Alpaca for the last trade of every held symbol.

Reads `positions` (which symbols are held) and Alpaca's market data. Writes `asset_prices`. Publishes the changed
`PriceTick`s after the commit (`prices.v1.>`) and `FeedStatus` on a change (`feed.v1.status`). Answers what symbols cost
(`feed.v1.prices_requested`), and asks for a user's prices when he wants them now (`feed.v1.refresh_requested`).

The seed's PriceService, and where its methods are here:

- `get_all_active_symbols`: `queries.held_symbols`
- `fetch_prices_from_alpaca`: `market_data.MarketData.latest_trades`
- `update_price_cache`: `queries.store_trades`
- `get_price`, `get_prices`: `queries.cached_price`, `queries.cached_prices`
- `is_price_fresh`: `shared.freshness.is_price_fresh`
- `update_all_prices`: `feed.Feed.take_round`
"""
