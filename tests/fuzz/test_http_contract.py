"""The HTTP API against its own document: whatever is sent, the answer is one that docs/openapi.json has."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any, TypeAlias

import pytest
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks

from shared.bus import Bus
from shared.clock import utc_now
from shared.database import Database
from tests.conftest import ROOT
from tests.factories import add_snapshot, create_user, set_price
from tests.fuzz.trying import nothing_unexpected_logged, try_each_in_thread
from tests.gateway import Gateway, running, token
from tests.integration.fake_alpaca import running_fake, trade
from tests.integration.leases import held_lease
from tests.integration.responders import feeder, snapshotter

SCHEMA = schemathesis.openapi.from_dict(json.loads((ROOT / "docs" / "openapi.json").read_text()))
OPERATIONS = {found.ok().label: found.ok() for found in SCHEMA.get_all_operations() if isinstance(found, Ok)}
AnyCase: TypeAlias = "Case[Any]"
STREAM, CHART = "GET /api/portfolio/stream", "GET /api/portfolio/performance"
OPEN = {"GET /api/openapi.json", "GET /healthz", "GET /readyz"}
"""What needs no token, and has nothing that could be wrong."""
SECONDS_MAX = 20.0
STATUSES = {"demo": {200}, "poor": {200}, "deactivated": {403}, "stranger": {404}}
"""What the users' good tokens get, besides 201 for what is made and 400 for what is wrong."""


@pytest.fixture
async def gateway(database: Database, database_url: str, bus: Bus) -> AsyncIterator[Gateway]:
    """A gateway whose users have all that an answer can be made of, and whose requests are answered."""
    await set_price(database, "AAPL", "175.00")
    await set_price(database, "BTC/USD", "30000.5", feed="simulated")
    positions = {"AAPL": ("100", "15000"), "BTC/USD": ("0.000000001", "0"), "NONE": ("3", "1")}
    demo = await create_user(database, cash="-5000.50", positions=positions)
    await create_user(database, "poor")
    await create_user(database, "deactivated", active=False)
    for hours, unpriced in ((1, 0), (30, 1), (24 * 20, 0), (24 * 80, 0)):
        await add_snapshot(database, demo, utc_now() - timedelta(hours=hours), "12000.25", unpriced=unpriced)
    async with AsyncExitStack() as stack:
        alpaca = await stack.enter_async_context(running_fake())
        alpaca.trades = {"AAPL": trade("175.5", utc_now().isoformat())}
        lease = await stack.enter_async_context(held_lease(database))
        await stack.enter_async_context(feeder(database, bus, alpaca, lease, cooldown=timedelta(0)))
        await stack.enter_async_context(snapshotter(database_url, bus, cooldown=timedelta(0)))
        yield await stack.enter_async_context(running(database_url, bus=bus))


def cases(label: str, mode: GenerationMode, **given: Any) -> st.SearchStrategy[AnyCase]:
    strategy: st.SearchStrategy[AnyCase] = OPERATIONS[label].as_strategy(generation_mode=mode, **given)
    return strategy


async def try_cases(
    gateway: Gateway, strategy: st.SearchStrategy[AnyCase], *, count: int, excluded: tuple[Any, ...] = ()
) -> list[int]:
    """Send `count` cases, whose answers must pass all checks but the excluded ones; return the statuses."""
    statuses: list[int] = []

    def check(case: AnyCase) -> None:
        response = case.call_and_validate(
            base_url=f"http://127.0.0.1:{gateway.port}",
            session=session,
            timeout=SECONDS_MAX,
            excluded_checks=list(excluded),
        )
        assert response.headers["x-request-id"]
        statuses.append(response.status_code)

    with requests.Session() as session:
        session.trust_env = False
        await try_each_in_thread(check, strategy, count=count)
    return statuses


async def test_with_a_good_token_every_answer_is_documented(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    with nothing_unexpected_logged(caplog):
        for label in sorted(OPERATIONS.keys() - OPEN - {STREAM}):
            for subject, expected in STATUSES.items():
                bearer = {"Authorization": f"Bearer {token(subject)}"}
                seen = await try_cases(
                    gateway,
                    cases(label, GenerationMode.POSITIVE, headers=bearer),
                    count=2,
                    # That `until` must be of the past is said in words alone.
                    excluded=(checks.positive_data_acceptance,) if label == CHART else (),
                )
                assert set(seen) <= expected | {201} | ({400} if label == CHART else set())


async def test_a_wrong_parameter_is_refused_as_documented(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    bearer = {"Authorization": f"Bearer {token()}"}
    with nothing_unexpected_logged(caplog):
        await try_cases(gateway, cases(CHART, GenerationMode.NEGATIVE, headers=bearer), count=20)


async def test_without_a_good_token_every_answer_is_documented_and_none_is_good(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    with nothing_unexpected_logged(caplog):
        for label in sorted(OPERATIONS.keys() - OPEN):
            for mode in GenerationMode:
                seen = await try_cases(gateway, cases(label, mode), count=3)
                assert set(seen) <= {400, 401, 403}


async def test_what_is_open_answers_as_documented(gateway: Gateway) -> None:
    for label in sorted(OPEN):
        assert set(await try_cases(gateway, cases(label, GenerationMode.POSITIVE), count=1)) == {200}
