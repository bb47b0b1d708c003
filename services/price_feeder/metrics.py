"""The price feeder's Prometheus metrics."""

from prometheus_client import Counter, Gauge, Histogram

ROUNDS = Counter(
    "price_feeder_rounds",
    "Rounds by outcome: ok, partial (a request failed), failed (no price came), unstored (no database), idle.",
    ["outcome"],
)
ROUND_SECONDS = Histogram(
    "price_feeder_round_seconds",
    "Duration of a round.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
REQUESTS = Counter(
    "price_feeder_requests",
    "Requests to Alpaca by outcome: ok, unavailable, rate_limited, unauthorized, refused.",
    ["outcome"],
)
REJECTED = Counter("price_feeder_rejected_symbols", "Symbols without a usable price, by reason.", ["reason"])
CHANGED = Counter("price_feeder_changed_prices", "Prices that changed.")
LAST_SUCCESS = Gauge(
    "price_feeder_last_success_timestamp_seconds", "When a price was last confirmed, Unix time."
)
HELD_SYMBOLS = Gauge("price_feeder_held_symbols", "Symbols that somebody holds.")
UNPUBLISHED = Gauge("price_feeder_unpublished_ticks", "Ticks that NATS has not acknowledged yet.")
BUDGET_LEFT = Gauge("price_feeder_request_budget_left", "Requests that may be sent to Alpaca now.")
