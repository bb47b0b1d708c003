"""The API gateway: answers HTTP requests for a user's portfolio value and its history.

Reads `users`, `positions` and `asset_prices` through the views that hold the valuation, and `portfolio_snapshots`.
Writes nothing and publishes nothing; NATS is connected for readiness alone, so answers do not depend on it.
"""
