"""The API gateway: answers HTTP requests for a user's portfolio value and its history.

Reads `users`, `positions` and `asset_prices` through the views that hold the valuation, and `portfolio_snapshots`.
Writes nothing and publishes nothing. Hears `prices.v1.>` and `portfolio.v1.snapshots_taken`, so as to know for how long
a chart stays true; without NATS it asks the database more often, so answers do not depend on it.
"""
