"""`GET /api/portfolio/current` over HTTP, on a real database; every expected number worked by hand."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from services.api_gateway import queries
from services.api_gateway.responses import CurrentPortfolio
from shared.clock import utc_now
from shared.database import Database
from shared.freshness import PRICE_FRESH_FOR, market_moment
from tests.factories import create_user, set_position, set_price
from tests.gateway import Answer, Gateway, bearer, running, token
from tests.market import closed_now, open_now

CURRENT = "/api/portfolio/current"


@pytest.fixture
async def gateway(database_url: str) -> AsyncIterator[Gateway]:
    async with running(database_url) as started:
        yield started


def portfolio(answer: Answer) -> CurrentPortfolio:
    """Check the answer strictly against the contract, and return it."""
    assert answer.status == 200, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    return CurrentPortfolio.model_validate(answer.json())


async def test_the_specifications_portfolio_has_the_specifications_numbers(
    database: Database, gateway: Gateway
) -> None:
    await create_user(
        database,
        cash="5000.50",
        positions={"AAPL": ("100", "15000.00"), "BTC/USD": ("2.5", "100000")},
    )
    await set_price(database, "AAPL", "175.00", traded_at=datetime(2024, 1, 1, 9, 59, 58, 120000, tzinfo=UTC))
    await set_price(database, "BTC/USD", "41000", feed="us")
    answer = await gateway.get(CURRENT)
    found = portfolio(answer)
    assert list(answer.json())[:6] == [
        "total_value",
        "investment_value",
        "cash_balance",
        "positions",
        "last_updated",
        "price_fresh",
    ]
    assert '"total_value":125000.50,"investment_value":120000.00,"cash_balance":5000.50,' in answer.text
    assert found.price_fresh is True
    assert found.simulated is False
    assert found.unpriced == []
    apple = answer.json()["positions"][0]
    assert apple == {
        "ticker": "AAPL",
        "shares": 100,
        "cost_basis": Decimal("15000.00"),
        "current_value": Decimal("17500.00"),
        "price_per_share": Decimal("175.00"),
        "unrealized_gain_loss": Decimal("2500.00"),
        "unrealized_gain_loss_percent": Decimal("16.67"),
        "price_as_of": "2024-01-01T09:59:58.12Z",
        "price_status": "live",
        "price_feed": "iex",
    }
    assert '"price_per_share":175.00,' in answer.text
    assert '"shares":2.5,' in answer.text


@pytest.mark.parametrize(
    ("held", "price", "expected"),
    [  # (shares, cost basis), price, (market value, gain, percent)
        (("10", "1400"), "150", ("1500.00", "100.00", "7.14")),
        (("4", "559"), "148.90", ("595.60", "36.60", "6.55")),
        (("10", "1000"), "110", ("1100.00", "100.00", "10.00")),
        (("3", "0.38"), "0.125", ("0.38", "0.00", "0.00")),  # 0.375, half away from zero
        (("1", "0"), "12.3456", ("12.35", "12.35", "0.00")),  # nothing was paid
        (("2", "1000"), "125.5", ("251.00", "-749.00", "-74.90")),
        (("0.000000001", "1"), "0.0001", ("0.00", "-1.00", "-100.00")),
    ],
)
async def test_market_value_gain_and_percentage(
    database: Database,
    gateway: Gateway,
    held: tuple[str, str],
    price: str,
    expected: tuple[str, str, str],
) -> None:
    await create_user(database, positions={"IBM": held})
    await set_price(database, "IBM", price)
    (found,) = portfolio(await gateway.get(CURRENT)).positions
    amounts = (found.current_value, found.unrealized_gain_loss, found.unrealized_gain_loss_percent)
    assert tuple(map(str, amounts)) == expected


@pytest.mark.parametrize(
    ("stored", "shown"), [("175", "175.00"), ("0.1", "0.10"), ("12.345", "12.345"), ("0.0001", "0.0001")]
)
async def test_price_has_two_to_four_decimals(
    database: Database, gateway: Gateway, stored: str, shown: str
) -> None:
    await create_user(database, positions={"IBM": ("1", "1")})
    await set_price(database, "IBM", stored)
    assert f'"price_per_share":{shown},' in (await gateway.get(CURRENT)).text


async def test_parts_add_up_because_each_is_rounded_first(database: Database, gateway: Gateway) -> None:
    await create_user(database, positions=dict.fromkeys(("A", "B", "C"), ("1", "1")))
    for ticker in ("A", "B", "C"):
        await set_price(database, ticker, "0.335")
    found = portfolio(await gateway.get(CURRENT))
    assert [str(position.current_value) for position in found.positions] == ["0.34", "0.34", "0.34"]
    assert str(found.total_value) == "1.02"


async def test_cash_alone_is_fresh_and_updated_now(database: Database, gateway: Gateway) -> None:
    await create_user(database, cash="250")
    before = utc_now()
    found = portfolio(await gateway.get(CURRENT))
    assert (str(found.total_value), str(found.investment_value)) == ("250.00", "0.00")
    assert found.positions == []
    assert found.price_fresh is True
    assert before <= datetime.fromisoformat(found.last_updated) <= utc_now()


async def test_negative_cash_lowers_the_total(database: Database, gateway: Gateway) -> None:
    await create_user(database, cash="-100.25", positions={"IBM": ("1", "1")})
    await set_price(database, "IBM", "50")
    assert str(portfolio(await gateway.get(CURRENT)).total_value) == "-50.25"


async def test_position_without_a_price_is_listed_and_left_out(database: Database, gateway: Gateway) -> None:
    await create_user(
        database, cash="100", positions={"IBM": ("10", "1400"), "ZZZ": ("5.50", "70"), "AAA": ("1", "2")}
    )
    await set_price(database, "IBM", "150")
    answer = await gateway.get(CURRENT)
    found = portfolio(answer)
    assert str(found.total_value) == "1600.00"
    assert [position.ticker for position in found.positions] == ["IBM"]
    assert found.price_fresh is True
    assert answer.json()["unpriced"][1] == {
        "ticker": "ZZZ",
        "shares": Decimal("5.5"),
        "cost_basis": Decimal("70.00"),
        "current_value": None,
        "price_per_share": None,
        "unrealized_gain_loss": None,
        "unrealized_gain_loss_percent": None,
        "price_status": "missing",
        "reason": "no_price",
    }


async def test_positions_of_which_none_has_a_price_are_not_fresh(
    database: Database, gateway: Gateway
) -> None:
    await create_user(database, cash="100", positions={"ZZZ": ("5", "70")})
    found = portfolio(await gateway.get(CURRENT))
    assert found.price_fresh is False
    assert str(found.total_value) == "100.00"


async def test_a_trillion_dollars_is_out_of_range(database: Database, gateway: Gateway) -> None:
    await create_user(
        database, positions={"HUGE": ("10000000", "1"), "MOST": ("9999999", "1"), "IBM": ("1", "1")}
    )
    await set_price(database, "HUGE", "100000")  # ten million at 100,000: a trillion
    await set_price(database, "MOST", "100000")
    await set_price(database, "IBM", "100")
    found = portfolio(await gateway.get(CURRENT))
    assert [(position.ticker, position.reason) for position in found.unpriced] == [
        ("HUGE", "value_out_of_range")
    ]
    assert str(found.total_value) == "999999900100.00"


async def test_sold_position_is_not_listed(database: Database, gateway: Gateway) -> None:
    user_id = await create_user(database, positions={"IBM": ("1", "1")})
    await set_price(database, "IBM", "100")
    await set_position(database, user_id, "IBM", "0")
    found = portfolio(await gateway.get(CURRENT))
    assert (found.positions, found.unpriced, str(found.total_value)) == ([], [], "0.00")


async def test_old_price_counts_and_says_that_it_is_stale(database: Database, gateway: Gateway) -> None:
    await create_user(database, positions={"NEW": ("1", "1"), "OLD": ("1", "1")})
    await set_price(database, "NEW", "10", age=timedelta(minutes=4, seconds=50))
    await set_price(database, "OLD", "20", age=timedelta(minutes=5, seconds=1))
    found = portfolio(await gateway.get(CURRENT))
    assert [(position.ticker, position.price_status) for position in found.positions] == [
        ("NEW", "live"),
        ("OLD", "stale"),
    ]
    assert found.price_fresh is False
    assert str(found.total_value) == "30.00"


async def test_price_confirmed_five_minutes_ago_to_the_instant_is_stale(database: Database) -> None:
    await create_user(database, positions={"IBM": ("1", "1")})
    await set_price(database, "IBM", "10")
    confirmed_at = await database.fetch_value("SELECT updated_at FROM asset_prices")
    for now, status in (
        (confirmed_at + PRICE_FRESH_FOR, "stale"),
        (confirmed_at + PRICE_FRESH_FOR - timedelta(microseconds=1), "live"),
    ):
        found = await queries.current_portfolio(database, "demo", now, market_moment(open_now(), now))
        assert found is not None
        assert f'"price_status":"{status}"' in found.answer


async def test_while_the_market_is_closed_the_sessions_last_price_is_closed_and_fresh(
    database: Database, database_url: str
) -> None:
    hours = closed_now()
    now = utc_now()
    since_close = now - hours.last_session(now).closes_at
    await create_user(database, positions={"IBM": ("1", "1"), "BTC/USD": ("1", "1")})
    await set_price(database, "IBM", "10", age=since_close + timedelta(minutes=4))
    await set_price(database, "BTC/USD", "20", feed="us")
    async with running(database_url, hours=hours) as gateway:
        found = portfolio(await gateway.get(CURRENT))
        assert [(position.ticker, position.price_status) for position in found.positions] == [
            ("BTC/USD", "live"),
            ("IBM", "closed"),
        ]
        assert found.price_fresh is True
        await set_price(database, "IBM", "10", age=since_close + timedelta(minutes=6))
        found = portfolio(await gateway.get(CURRENT))
        assert [position.price_status for position in found.positions] == ["live", "stale"]
        assert found.price_fresh is False
    opens_at, closes_at = (
        datetime.fromisoformat(at) for at in (found.market.next_open, found.market.next_close)
    )
    assert (found.market.is_open, opens_at) == (False, hours.next_session(now).opens_at)
    assert closes_at - opens_at == timedelta(hours=6, minutes=30)


async def test_open_market_says_when_it_closes_and_opens_again(database: Database, database_url: str) -> None:
    hours = open_now()
    now = utc_now()
    await create_user(database, cash="1")
    async with running(database_url, hours=hours) as gateway:
        answer = await gateway.get(CURRENT)
    market = portfolio(answer).market
    assert list(answer.json())[-1] == "market"
    assert market.is_open is True
    assert datetime.fromisoformat(market.next_close) == hours.last_session(now).closes_at
    assert datetime.fromisoformat(market.next_open) == hours.next_session(now).opens_at


async def test_last_updated_is_the_newest_confirmation_of_a_priced_position(
    database: Database, gateway: Gateway
) -> None:
    await create_user(database, positions={"A": ("1", "1"), "B": ("1", "1"), "HUGE": ("10000000", "1")})
    await set_price(database, "A", "10", age=timedelta(hours=2))
    await set_price(database, "B", "10", age=timedelta(hours=3))
    await set_price(database, "HUGE", "100000")
    await set_price(database, "OTHER", "10")
    newest = await database.fetch_value("SELECT updated_at FROM asset_prices WHERE symbol = 'A'")
    found = portfolio(await gateway.get(CURRENT))
    assert datetime.fromisoformat(found.last_updated) == newest
    assert found.price_fresh is False


async def test_one_simulated_price_makes_the_answer_simulated(database: Database, gateway: Gateway) -> None:
    await create_user(database, positions={"A": ("1", "1"), "B": ("1", "1")})
    await set_price(database, "A", "10")
    await set_price(database, "B", "10", feed="simulated")
    found = portfolio(await gateway.get(CURRENT))
    assert found.simulated is True
    assert [position.price_feed for position in found.positions] == ["iex", "simulated"]


async def test_positions_are_in_order_of_their_ticker(database: Database, gateway: Gateway) -> None:
    tickers = ["BRK.B", "BTC/USD", "BRK-A", "b", "AAPL", "BRKB"]
    await create_user(database, positions=dict.fromkeys(tickers, ("1", "1")))
    for ticker in tickers:
        await set_price(database, ticker, "1")
    found = portfolio(await gateway.get(CURRENT))
    assert [position.ticker for position in found.positions] == [
        "AAPL",
        "BRK-A",
        "BRK.B",
        "BRKB",
        "BTC/USD",
        "b",
    ]


async def test_largest_amounts_stay_exact(database: Database, gateway: Gateway) -> None:
    await create_user(database, cash="999999999999999.99", positions={"IBM": ("3", "999999999999999.99")})
    await set_price(database, "IBM", "0.3333")
    answer = await gateway.get(CURRENT)
    assert '"total_value":1000000000000000.99,' in answer.text  # 999,999,999,999,999.99 + 1.00
    assert '"unrealized_gain_loss":-999999999999998.99,' in answer.text


async def test_a_token_sees_its_own_portfolio_only(database: Database, gateway: Gateway) -> None:
    await create_user(database, "alice", cash="1", positions={"A": ("1", "1")})
    await create_user(database, "bob", cash="2", positions={"B": ("2", "1")})
    for ticker in ("A", "B"):
        await set_price(database, ticker, "10")
    for subject, total, ticker in (("alice", "11.00", "A"), ("bob", "22.00", "B")):
        found = portfolio(await gateway.get(CURRENT, subject))
        assert (str(found.total_value), [position.ticker for position in found.positions]) == (
            total,
            [ticker],
        )


@pytest.mark.parametrize("subject", ["o'brien", '"', "名前", "a\\b", "x" * 255, "auth0|5f7c"])
async def test_any_subject_that_a_token_can_hold_is_found(
    database: Database, gateway: Gateway, subject: str
) -> None:
    await create_user(database, subject, cash="7")
    assert str(portfolio(await gateway.get(CURRENT, subject)).total_value) == "7.00"


async def test_unknown_user_is_not_found(gateway: Gateway) -> None:
    answer = await gateway.get(CURRENT, "nobody")
    assert answer.status == 404
    assert answer.problem().type == "urn:foliotick:problem:user-unknown"


async def test_deactivated_user_is_forbidden(database: Database, gateway: Gateway) -> None:
    await create_user(database, "gone", cash="7", active=False)
    for path in (CURRENT, "/api/portfolio/performance"):
        answer = await gateway.get(path, "gone")
        assert answer.status == 403
        assert answer.problem().type == "urn:foliotick:problem:user-deactivated"


async def test_answer_is_private_and_may_not_be_sniffed_or_framed(
    database: Database, gateway: Gateway
) -> None:
    await create_user(database)
    answer = await gateway.get(CURRENT)
    assert answer.headers["Cache-Control"] == "private, no-cache"
    assert answer.headers["Vary"] == "Accept-Encoding, Authorization"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert (await gateway.get(CURRENT, None)).headers["Cache-Control"] == "no-store"


async def test_unknown_query_parameter_is_refused(database: Database, gateway: Gateway) -> None:
    await create_user(database)
    answer = await gateway.get(f"{CURRENT}?user=alice")
    assert answer.status == 400
    assert answer.problem().type == "urn:foliotick:problem:unexpected-parameter"


async def test_token_in_the_query_is_no_token(gateway: Gateway) -> None:
    answer = await gateway.get(f"{CURRENT}?access_token={token()}", None)
    assert answer.status == 401


async def test_ten_thousand_positions_are_answered(database: Database, gateway: Gateway) -> None:
    user_id = await create_user(database)
    await database.fetch(
        "INSERT INTO positions SELECT $1, 'T' || n, 1, 1 FROM generate_series(1, 10000) AS n", user_id
    )
    await database.fetch(
        """
        INSERT INTO asset_prices (symbol, price, traded_at, received_at, updated_at, feed)
        SELECT 'T' || n, 1.5, now(), now(), now(), 'iex' FROM generate_series(1, 10000) AS n
        """
    )
    found = portfolio(await gateway.ask("GET", CURRENT, headers=bearer()))
    assert len(found.positions) == 10000
    assert str(found.total_value) == "15000.00"


async def test_one_user_among_ten_thousand_is_found_by_index(database: Database) -> None:
    await database.fetch(
        "INSERT INTO users (subject) SELECT 'user-' || n FROM generate_series(1, 10000) AS n", timeout=30
    )
    await database.fetch(
        """
        INSERT INTO positions
        SELECT users.id, 'T' || n, 1, 1 FROM users CROSS JOIN generate_series(1, 10) AS n
        """,
        timeout=30,
    )
    await database.fetch("ANALYZE users, positions")
    now = utc_now()
    for statement, arguments in (
        (queries.CURRENT, ("user-77", now, now, now, "{}")),
        (queries.LIVE_VALUE, ("user-77",)),
    ):
        plan = "\n".join(
            str(row[0]) for row in await database.fetch(f"EXPLAIN (ANALYZE) {statement}", *arguments)
        )
        assert "users_subject_key" in plan
        assert "Seq Scan on users" not in plan
        assert "Seq Scan on positions" not in plan
