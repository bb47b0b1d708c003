"""The price feeder's Prometheus metrics."""

from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram

from services.price_feeder.frames import Heard

ROUNDS = Counter(
    "price_feeder_rounds",
    "Rounds by outcome: ok, partial (a request failed), failed (no price came), unstored (no database), "
    "lost (the lease has gone), resting (the market is closed), idle (nothing is held).",
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
OUTSIDE = Counter(
    "price_feeder_outside_session_trades",
    "Last trades outside the session, which confirm the session's last price.",
)
CHANGED = Counter("price_feeder_changed_prices", "Prices that changed.")
LAST_SUCCESS = Gauge(
    "price_feeder_last_success_timestamp_seconds", "When a price was last confirmed, Unix time."
)
HELD_SYMBOLS = Gauge("price_feeder_held_symbols", "Symbols that somebody holds.")
UNPUBLISHED = Gauge("price_feeder_unpublished_ticks", "Ticks that NATS has not acknowledged yet.")
WAITING = Gauge(
    "price_feeder_waiting_symbols",
    "Symbols that the last round did not ask for: the budget is spent, or Alpaca wants a pause.",
)
FEED_STATE = Gauge(
    "price_feeder_feed_state",
    "1 for the state that the feed is in: live, polling, stale, market_closed, stopped; none for a standby.",
    ["state"],
)
CALENDAR_STORED = Gauge(
    "price_feeder_calendar_stored_timestamp_seconds", "When Alpaca's calendar was last stored, Unix time."
)
BUDGET_LEFT = Gauge("price_feeder_request_budget_left", "Requests that may be sent to Alpaca now.")
LEASE_HELD = Gauge("price_feeder_lease_held", "1 while this feeder has the lease, 0 while it is a standby.")
STREAM_STATE = Gauge("price_feeder_stream_state", "1 for the state that a stream is in.", ["stream", "state"])
STREAMED_SYMBOLS = Gauge("price_feeder_streamed_symbols", "Symbols that a stream carries.", ["stream"])
STREAM_SYMBOLS_MAX = Gauge("price_feeder_stream_symbols_max", "Symbols that a stream may carry.", ["stream"])
POLLED_SYMBOLS = Gauge("price_feeder_polled_symbols", "Held symbols that no stream carries.")
STREAM_FAILURES = Counter(
    "price_feeder_stream_failures", "Streams that ended, by Alpaca's code or connection.", ["stream", "code"]
)
STREAMED_TRADES = Counter(
    "price_feeder_streamed_trades",
    "Trades of streams: taken, older than another, without_price (their conditions set none), malformed.",
    ["stream", "outcome"],
)
FLUSHES = Counter(
    "price_feeder_flushes", "Batches of streamed trades by outcome: stored, unstored, lost.", ["outcome"]
)
FLUSHED_TRADES = Counter("price_feeder_flushed_trades", "Streamed trades that went into batches.")
WITHDRAWALS = Counter("price_feeder_withdrawn_trades", "Cached trades that were corrected or cancelled.")
TRADING_STATUSES = Counter(
    "price_feeder_trading_statuses", "Statuses by kind: halted, resumed, other.", ["kind"]
)


def end_term() -> None:
    """Say nothing any more of a term that is over: another process has the lease, or will."""
    for labelled in (FEED_STATE, STREAM_STATE):
        labelled.clear()
    for gauge in (HELD_SYMBOLS, POLLED_SYMBOLS, UNPUBLISHED, WAITING):
        gauge.set(0)


def streamed_trades(stream: str) -> Callable[[Heard], None]:
    """Return what counts a frame's trades; a child is looked up once, not for every frame."""
    taken, older, without_price, malformed = (
        STREAMED_TRADES.labels(stream, outcome)
        for outcome in ("taken", "older", "without_price", "malformed")
    )

    def count(heard: Heard) -> None:
        if heard.taken:
            taken.inc(heard.taken)
        if heard.without_price:
            without_price.inc(heard.without_price)
        if heard.malformed:
            malformed.inc(heard.malformed)
        if rest := heard.trades - heard.taken - heard.without_price:
            older.inc(rest)

    return count
