"""A market that answers badly, slowly, with garbage, or not at all: the simulator does so on command."""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from typing import Any

import psutil

from services.market_simulator.instants import rfc3339
from shared.clock import utc_now
from shared.freshness import PRICE_FRESH_FOR
from tests.faults import audit, telemetry
from tests.faults.mix import Life
from tests.faults.parts import Service, frozen
from tests.faults.population import User
from tests.faults.rows.feeders import change_lease_holder, lease_holder
from tests.faults.rows.row import Row, control, environment, metric, seconds_until, session, total
from tests.faults.signs import Sign
from tests.faults.system import MARKET_SEED, System
from tests.faults.truth import Market
from tests.waiting import eventually

REST, STREAM = "faults", "stream/faults"
"""Where the simulator takes orders for faults, under `/simulator/`."""
FAULT_SECONDS_MAX = 900
VICTIM = "AAPL"
"""The symbol that garbage is sent of."""
EQUITIES = "/v2/stocks"
STREAMS = ("equity", "crypto")
SEEN_SECONDS = 3.0
"""After which whoever looks has seen what a check says by now."""
LIVE_SECONDS_MAX = 15.0
"""How long after a market answers again every price is confirmed: a request that hangs ends within 5 s."""
REQUESTS_PER_MINUTE = 100
"""Less than rounds of a second need, so that the budget is spent when all is well."""
STALE_SECONDS = PRICE_FRESH_FOR.total_seconds()
STALE_LATE_SECONDS_MAX = 5.0
UNAUTHORIZED_PAUSE_SECONDS = 60.0
REFUSED_KEY_SECONDS = 6.0

ANSWERS: tuple[tuple[str, Mapping[str, Any], str], ...] = (
    ("rate_limited", {"retry_after_seconds": 3}, "rate_limited"),
    ("server_error", {"status": 503}, "unavailable"),
    ("bad_gateway", {}, "unavailable"),
    ("empty_body", {}, "unavailable"),
    ("redirect", {}, "unavailable"),
    ("reset", {}, "unavailable"),
    ("byte_drip", {"interval_seconds": 0.05}, "unavailable"),
    ("hang", {}, "unavailable"),
)
"""Faults of whole answers, and how the feeder counts them."""

GARBAGE: tuple[tuple[str, Mapping[str, Any], str], ...] = (
    *(("wrong_types", {"as": name}, "malformed") for name in ("string", "text", "object", "bool", "array")),
    ("wrong_types", {"as": "null"}, "null"),
    ("nan", {}, "malformed"),
    ("negative_price", {}, "not_positive"),
    ("zero_price", {}, "not_positive"),
    ("huge_price", {}, "too_large"),
)
"""Faults of one symbol's trade, and why the feeder rejects it."""

GARBAGE_OF_STREAMS: tuple[object, ...] = (
    {"T": "t", "S": VICTIM, "p": "262.5"},
    {"T": "t", "S": VICTIM, "p": -262.5, "t": "2026-11-20T15:00:00Z"},
    {"T": "t", "S": VICTIM, "p": 1e300, "t": "2026-11-20T15:00:00Z"},
    {"T": "t", "S": VICTIM, "p": 262.5, "t": "yesterday"},
    {"T": "t", "S": VICTIM, "p": 262.5, "t": "2222-11-20T15:00:00Z"},
    {"T": "t", "S": 5, "p": 262.5, "t": "2026-11-20T15:00:00Z"},
    {"T": "t", "p": 262.5},
    {"S": VICTIM},
    [VICTIM, 262.5],
    None,
)


# ---- the simulator's controls --------------------------------------------------------------------


@asynccontextmanager
async def faulty(system: System, kind: str, *, door: str = REST, **parameters: Any) -> AsyncIterator[None]:
    """Order a fault for the length of the block; its end heals all that was ordered at the same door."""
    await control(system, "POST", door, {"kind": kind, "seconds": FAULT_SECONDS_MAX, **parameters})
    try:
        yield
    finally:
        await control(system, "DELETE", door)


async def attempts(system: System, since: datetime) -> list[tuple[str, datetime]]:
    """Return path and time of each attempt to open a stream."""
    found = [
        (each["path"], datetime.fromisoformat(each["at"]))
        for each in (await control(system, "GET", "status"))["stream_attempts"]
    ]
    return [(path, at) for path, at in found if at >= since]


# ---- what is seen of it --------------------------------------------------------------------------


async def confirmations(system: System) -> dict[str, datetime]:
    """Return when each price was last confirmed."""
    async with session(system) as connection:
        rows = await connection.fetch("SELECT symbol, updated_at FROM asset_prices")
    return {row["symbol"]: row["updated_at"] for row in rows}


async def seconds_until_confirmed(
    system: System, *, but: Collection[str] = (), seconds_max: float = LIVE_SECONDS_MAX
) -> float:
    """Wait until every price, or all but some, is confirmed anew; return how many seconds that takes."""
    since = utc_now()

    async def are_confirmed() -> bool:
        return all(at > since for symbol, at in (await confirmations(system)).items() if symbol not in but)

    return await seconds_until(are_confirmed, seconds_max)


async def stored_prices(system: System) -> list[tuple[Any, ...]]:
    """Return the cached prices, as they are."""
    async with session(system) as connection:
        rows = await connection.fetch(
            "SELECT symbol, price, traded_at, sequence, updated_at FROM asset_prices ORDER BY symbol"
        )
    return [tuple(row) for row in rows]


async def went_back(system: System) -> list[str]:
    """Return which prices were ever overwritten by older ones."""
    async with session(system) as connection:
        return [str(dict(row)) for row in await connection.fetch(audit.WENT_BACK)]


async def wait_for_more(services: list[Service], sample: str, more: float, *, seconds_max: float) -> None:
    """Wait until a counter has grown by so much, summed over the services."""
    before = await total(services, sample)

    async def has_grown() -> bool:
        return await total(services, sample) >= before + more

    await eventually(has_grown, timeout=seconds_max, every=0.1)


def requests(outcome: str) -> str:
    return f'price_feeder_requests_total{{outcome="{outcome}"}}'


def rejections(reason: str) -> str:
    return f'price_feeder_rejected_symbols_total{{reason="{reason}"}}'


async def current(system: System, gateway: str, user: User) -> Any:
    """Return a user's portfolio; it must be there."""
    async with system.http.get(
        f"http://127.0.0.1:{system.gateway_ports[gateway]}/api/portfolio/current",
        headers={"Authorization": f"Bearer {system.token(user.subject)}"},
    ) as answer:
        assert answer.status == 200, f"{gateway} answered {answer.status}: {await answer.text()}"
        return await answer.json()


# ---- 15: bad answers -----------------------------------------------------------------------------


async def _bad_answers(system: System, _: Life) -> str:
    gone = await _market_gone(system)
    feeder = await lease_holder(system)
    process = feeder.process
    async with faulty(system, "mute", door=STREAM):  # it is about polling alone
        slowest = max([await _seconds_after(system, feeder, *answer) for answer in ANSWERS])
        hung = await _hung_for_minutes(system, feeder)
    asked = await _busiest_minute(system)
    assert asked <= REQUESTS_PER_MINUTE, f"{asked} requests in 60 s"
    spent = await _spent_budget(system)
    assert feeder.process is process, f"{feeder.name} has not survived it"
    return (
        f"{gone}; after {len(ANSWERS)} kinds of bad answers live again within {slowest:.1f} s; {hung}; "
        f"at most {asked} requests in 60 s, {spent} when all was well, of {REQUESTS_PER_MINUTE} allowed"
    )


async def _busiest_minute(system: System) -> int:
    """Return how many requests the market was sent within 60 seconds, at most."""
    count: int = (await control(system, "GET", "status"))["data_requests_of_busiest_minute"]
    return count


async def _spent_budget(system: System) -> int:
    """Wait until the budget is spent, and a little longer; return what was spent in the busiest minute.

    On a machine on which rounds take longer than a second it is not all spent.
    """

    async def is_spent() -> bool:
        return await _busiest_minute(system) >= REQUESTS_PER_MINUTE

    with suppress(AssertionError):
        await eventually(is_spent, timeout=75, every=0.5)
    await asyncio.sleep(5)
    spent = await _busiest_minute(system)
    assert spent <= REQUESTS_PER_MINUTE, f"{spent} requests in 60 s"
    return spent


async def _market_gone(system: System) -> str:
    seen = []
    for what in ("killed", "frozen"):
        before = len(await stored_prices(system))
        if what == "killed":
            system.market.kill()
            await system.market.wait_until_ready()
        else:
            async with frozen(system.market):
                unavailable = requests("unavailable")
                await wait_for_more(system.services["price_feeder"], unavailable, 2, seconds_max=20)
        assert len(await stored_prices(system)) == before, "prices are gone"
        seen.append(f"market {what}: live {await seconds_until_confirmed(system):.1f} s after its return")
    return "; ".join(seen)


async def _seconds_after(
    system: System, feeder: Service, kind: str, parameters: Mapping[str, Any], outcome: str
) -> float:
    """Let the market answer badly, twice; return how long after it prices are live again."""
    async with faulty(system, kind, **parameters):
        await wait_for_more([feeder], requests(outcome), 2, seconds_max=30)  # what was under way has ended
        before = await stored_prices(system)
        await wait_for_more([feeder], requests(outcome), 1, seconds_max=30)
        assert await stored_prices(system) == before, f"{kind} has changed prices"
    try:
        return await seconds_until_confirmed(system)
    except AssertionError:
        raise AssertionError(f"not live {LIVE_SECONDS_MAX:g} s after {kind}") from None


async def _hung_for_minutes(system: System, feeder: Service) -> str:
    """Let every request hang until prices are stale, and see that nothing piles up behind them."""
    assert feeder.process is not None
    process = psutil.Process(feeder.process.pid)
    user = next(user for user in system.population.active if user.shares)
    gateways = list(system.gateway_ports)
    said_before = _said(feeder, "prices_not_updated")
    hangs_before = await metric(feeder, requests("unavailable"))
    async with faulty(system, "hang"):
        await wait_for_more([feeder], requests("unavailable"), 2, seconds_max=30)
        before, threads = await stored_prices(system), set()
        ends = time.monotonic() + STALE_SECONDS + 2 * STALE_LATE_SECONDS_MAX
        while all([(await current(system, gateway, user))["price_fresh"] for gateway in gateways]):
            assert time.monotonic() < ends, "prices do not become stale"
            threads.add(process.num_threads())
            await asyncio.sleep(1)
        confirmed_at = (await confirmations(system)).values()
        oldest, newest = ((utc_now() - at).total_seconds() for at in (min(confirmed_at), max(confirmed_at)))
        assert oldest >= STALE_SECONDS, f"stale after {oldest:.1f} s"
        assert newest <= STALE_SECONDS + STALE_LATE_SECONDS_MAX, f"stale after {newest:.1f} s only"
        await asyncio.sleep(1)  # a gateway may look a moment later than the other
        for gateway in gateways:
            body = await current(system, gateway, user)
            assert not body["price_fresh"], f"{gateway} takes them for fresh"
            assert {each["price_status"] for each in body["positions"]} == {"stale"}
        assert await stored_prices(system) == before, "prices have changed"

        async def is_said() -> bool:  # by the feeder, at the end of its round, in which every request hangs
            return await metric(feeder, 'price_feeder_feed_state{state="stale"}') == 1

        await eventually(is_said, timeout=LIVE_SECONDS_MAX)
        await asyncio.sleep(SEEN_SECONDS)
    assert max(threads) - min(threads) == 0, f"{sorted(threads)} threads"
    said = _said(feeder, "prices_not_updated") - said_before
    assert 1 <= said <= 3, f"said {said} times"
    seconds = await seconds_until_confirmed(system)

    async def is_fresh() -> bool:
        return all([(await current(system, gateway, user))["price_fresh"] for gateway in gateways])

    await eventually(is_fresh)
    hangs = await metric(feeder, requests("unavailable")) - hangs_before
    return (
        f"{hangs:g} hung requests, {threads.pop()} threads all the time, stale after {newest:.0f} s, "
        f"said {said} time(s), live {seconds:.1f} s after"
    )


def _said(service: Service, event: str) -> int:
    """Return how many lines of a service's log are about an event."""
    return telemetry.said(service.log, event)


# ---- 16: garbage ---------------------------------------------------------------------------------


async def _garbage(system: System, _: Life) -> str:
    feeders = system.services["price_feeder"]
    async with faulty(system, "mute", door=STREAM):
        for kind, parameters, reason in GARBAGE:
            await _rejected(system, kind, reason, parameters)
        async with faulty(system, "truncated_json"):
            await wait_for_more(feeders, requests("unavailable"), 2, seconds_max=20)
        slowest = await seconds_until_confirmed(system)
    malformed = await _garbage_of_streams(system)
    return (
        f"{len(GARBAGE)} kinds of garbage rejected, each counted by its reason, the other symbols kept; "
        f"after truncated JSON live again within {slowest:.1f} s; "
        f"{malformed:g} malformed messages of streams counted, the rest kept"
    )


async def _rejected(system: System, kind: str, reason: str, parameters: Mapping[str, Any]) -> None:
    """Spoil one symbol: it alone keeps its old price, is counted, and is confirmed again when it is well."""
    feeders = system.services["price_feeder"]
    async with faulty(system, kind, symbols=[VICTIM], **parameters):
        try:
            await wait_for_more(feeders, rejections(reason), 1, seconds_max=20)
        except AssertionError:
            raise AssertionError(f"{kind} {dict(parameters)} is not counted as {reason}") from None
        before = (await confirmations(system))[VICTIM]
        await seconds_until_confirmed(system, but=[VICTIM])
        assert (await confirmations(system))[VICTIM] == before, f"{VICTIM} is confirmed by {kind}"
    await seconds_until_confirmed(system)


async def _garbage_of_streams(system: System) -> float:
    """Send garbage among good trades; return how many messages were counted as malformed."""
    feeders = system.services["price_feeder"]
    await streams_carry(system)
    before = await streamed(system, "malformed")
    messages = [{"raw": message} for message in GARBAGE_OF_STREAMS]
    for frames in ("one", "each"):
        await control(system, "POST", "stream/messages", {"messages": messages, "frames": frames})
    async with faulty(system, "malformed", door=STREAM):  # in the middle of every frame
        await wait_for_more(feeders, _trades("equity", "malformed"), 3, seconds_max=20)
        await wait_for_more(feeders, _trades("equity", "taken"), 3, seconds_max=20)
    for once in ("garbage", "half_frame"):
        await control(system, "POST", STREAM, {"kind": once})
        await streams_carry(system)
        await wait_for_more(feeders, _trades("equity", "taken"), 3, seconds_max=40)
    return await streamed(system, "malformed") - before


def _trades(stream: str, outcome: str) -> str:
    return f'price_feeder_streamed_trades_total{{outcome="{outcome}",stream="{stream}"}}'


async def streamed(system: System, outcome: str) -> float:
    """Return how many streamed trades had an outcome."""
    feeders = system.services["price_feeder"]
    return sum([await total(feeders, _trades(stream, outcome)) for stream in STREAMS])


async def streams_carry(system: System, *, seconds_max: float = 40.0) -> float:
    """Wait until both streams carry symbols; return how long that takes."""
    feeders = system.services["price_feeder"]

    async def do_carry() -> bool:
        samples = [f'price_feeder_streamed_symbols{{stream="{stream}"}}' for stream in STREAMS]
        return all([await total(feeders, sample) for sample in samples])

    return await seconds_until(do_carry, seconds_max)


# ---- 17: symbols and keys ------------------------------------------------------------------------


async def _symbols_and_keys(system: System, _: Life) -> str:
    feeder = await lease_holder(system)
    process = feeder.process
    async with faulty(system, "mute", door=STREAM):
        for kind, reason in (("missing_symbols", "missing"), ("null_symbols", "null")):
            await _rejected(system, kind, reason, {})
        async with faulty(system, "unknown_symbols", symbols=["ZZZZ"]):
            await seconds_until_confirmed(system)
        assert "ZZZZ" not in await confirmations(system), "a symbol is stored that nobody holds"
    said = _said(feeder, "market_stream_refused")
    async with faulty(system, "refuse_auth", door=STREAM, code=402):
        await control(system, "POST", STREAM, {"kind": "drop"})

        async def are_refused() -> bool:
            return _said(feeder, "market_stream_refused") >= said + len(STREAMS)

        await eventually(are_refused, timeout=40)
        since = utc_now()
        plan = await _wrong_key(system, feeder, "forbidden", path=EQUITIES)
        key = await _wrong_key(system, feeder, "unauthorized")
        seconds = await seconds_until_confirmed(system, seconds_max=UNAUTHORIZED_PAUSE_SECONDS + 10)
        tried = len(await attempts(system, since))
        assert tried == 0, f"streams were tried {tried} times with a key that is refused"
    assert feeder.process is process, f"{feeder.name} has not survived it"
    await change_lease_holder(system)  # else the next row would wait five minutes for the streams
    await streams_carry(system)
    return (
        f"missing and null symbols counted, an unknown one not stored; 403: {plan}; 401: {key}, polled again "
        f"{seconds:.0f} s after the key worked again; streams refused, said, and left alone "
        "meanwhile, carried again after a restart"
    )


async def _wrong_key(system: System, feeder: Service, kind: str, **parameters: Any) -> str:
    """Refuse the key for a while: that is said as an error, and the market is hardly asked any more."""
    said = _said(feeder, "market_data_unauthorized")
    async with faulty(system, kind, **parameters):
        await wait_for_more([feeder], requests("unauthorized"), 1, seconds_max=20)
        asked = await metric(feeder, requests("unauthorized"))
        if kind == "forbidden":  # of one host's path alone: the others go on
            await seconds_until_confirmed(system, but=await _equities(system))
        await asyncio.sleep(REFUSED_KEY_SECONDS)
        again = await metric(feeder, requests("unauthorized")) - asked
        assert again <= 1, f"asked {again:g} times more with a key that is refused"
        status, _ = await feeder.ask("healthz")
        assert status == 200, f"{feeder.name} is not live"
    said = _said(feeder, "market_data_unauthorized") - said
    assert said >= 1, "nothing is said of it"
    return f"said {said} time(s) as an error, asked {again:g} times more in {REFUSED_KEY_SECONDS:g} s"


async def _equities(system: System) -> list[str]:
    return [symbol for symbol in await confirmations(system) if "/" not in symbol]


# ---- 18: old trades ------------------------------------------------------------------------------


async def _old_trades(system: System, _: Life) -> str:
    feeders = system.services["price_feeder"]
    symbols = sorted(await confirmations(system))
    await streams_carry(system)
    before, sent = await streamed(system, "older"), 0
    for ago in (timedelta(0), timedelta(seconds=10), timedelta(days=90)):
        # The last trade once more, one before it, one of months ago: twice in one frame, twice in frames of their own.
        messages = [{"raw": _trade_message(symbol, utc_now() - ago)} for symbol in symbols]
        for frames in ("one", "each"):
            await control(system, "POST", "stream/messages", {"messages": messages * 2, "frames": frames})
            sent += 2 * len(messages)

    async def are_refused() -> bool:
        return await streamed(system, "older") >= before + 4 * len(symbols)

    await eventually(are_refused, timeout=20)
    older = await streamed(system, "older") - before
    # A stream that has just begun knows of no newer trade: there it is the cache that must not take it.
    await control(system, "POST", STREAM, {"kind": "drop"})
    await eventually(lambda: streams_are_lost(system), timeout=10)
    await streams_carry(system)
    messages = [{"raw": _trade_message(symbol, utc_now() - timedelta(days=90))} for symbol in symbols]
    await control(system, "POST", "stream/messages", {"messages": messages})
    async with faulty(system, "refuse_handshake", door=STREAM):  # so that answers are judged by themselves
        await control(system, "POST", STREAM, {"kind": "drop"})
        await eventually(lambda: streams_are_lost(system), timeout=10)
        for kind in ("stale_trades", "out_of_order"):
            async with faulty(system, kind):
                await wait_for_more(feeders, rejections("older"), len(symbols), seconds_max=20)
                prices = await stored_prices(system)
                await wait_for_more(feeders, rejections("older"), len(symbols), seconds_max=20)
                assert await stored_prices(system) == prices, f"{kind} has changed prices, or confirmed them"
            await seconds_until_confirmed(system)
    back = await streams_carry(system)
    overwritten = await went_back(system)
    assert not overwritten, f"overwritten by an older one: {overwritten[:3]}"
    return (
        f"{sent} streamed trades, duplicate, out of order and of months ago, {older:g} counted as older; "
        f"answers of months ago and out of order rejected as older; "
        f"none overwrote a newer one; streams back after {back:.0f} s"
    )


def _trade_message(symbol: str, at: datetime) -> dict[str, object]:
    """Return the message of the trade that was the last one at an instant."""
    trade = Market(MARKET_SEED).latest_trade(symbol, at)
    return {
        "T": "t",
        "S": symbol,
        "p": float(trade.price),
        "s": float(trade.size),
        "i": trade.id,
        "x": "V",
        "c": ["@"],
        "z": "C",
        "t": rfc3339(trade.at_ns),
    }


async def streams_are_lost(system: System) -> bool:
    feeders = system.services["price_feeder"]
    samples = [f'price_feeder_streamed_symbols{{stream="{stream}"}}' for stream in STREAMS]
    return not any([await total(feeders, sample) for sample in samples])


ROWS = (
    Row(
        15,
        "the market answers badly, or not at all",
        "429, 503, HTML, empty, 302, reset, byte by byte, silence; killed, frozen; five minutes of silence",
        _bad_answers,
        environment(ALPACA_REQUESTS_PER_MINUTE=str(REQUESTS_PER_MINUTE)),
        signs=(
            Sign("rounds", 'price_feeder_rounds_total{outcome="failed"}', "prices_not_updated"),
            Sign("prices", 'price_feeder_feed_state{state="stale"}', "feed_status"),
        ),
    ),
    Row(
        16,
        "the market sends garbage",
        "truncated JSON, wrong types, NaN, negative, 0, 1e400, half and malformed frames",
        _garbage,
        signs=(Sign("rounds", "price_feeder_rejected_symbols_total", "symbols_rejected"),),
    ),
    Row(
        17,
        "missing, unknown, null symbols; a wrong key",
        "by the market, 401 and 403",
        _symbols_and_keys,
        signs=(
            Sign("", 'price_feeder_rejected_symbols_total{reason="missing"}', "symbols_rejected"),
            Sign("rounds", 'price_feeder_requests_total{outcome="unauthorized"}', "market_data_unauthorized"),
        ),
    ),
    Row(
        18,
        "months-old, duplicate, out-of-order trades",
        "in answers and streams",
        _old_trades,
        signs=(Sign("", 'price_feeder_rejected_symbols_total{reason="older"}', "symbols_rejected"),),
    ),
)
