"""Ask a running system what may be wrong with it, and say what to do: the questions of an operator's first hour."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import aiohttp

from local.terminal import say
from shared.clock import utc_now

TIMEFRAMES = ("1D", "1W", "1M", "3M", "YTD", "ALL")
TIMEOUT_SECONDS = 10.0
SNAPSHOT_AGE_MAX = timedelta(minutes=15)
EQUAL_ATTEMPTS_MAX = 5
CONFIRMED_SECONDS_MAX = 60.0
STARTED_BEFORE_SECONDS = 1e9  # a time that was never set counts from 1970

_PRICES_ADVICE = (
    "price_feeder: is it running, with PRICE_UPDATE_ENABLED=true? In its log `market_data_unauthorized` means a wrong "
    "ALPACA_API_KEY or ALPACA_SECRET_KEY, `prices_not_updated` says what else keeps Alpaca from answering (its limit "
    "of 200 requests a minute, the network)."
)
_SNAPSHOTS_ADVICE = (
    "snapshotter: is it running, is SNAPSHOT_ENABLED=true, does its log say `snapshot_postponed`? "
    "After the first start wait for one SNAPSHOT_INTERVAL_MINUTES."
)


@dataclass(frozen=True)
class Finding:
    """The answer to one question; `advice` is given when something is wrong."""

    question: str
    answer: str
    advice: str | None = None


class Unanswered(Exception):
    """A question had no answer that the next ones could build on."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.question)
        self.finding = finding


async def run(url: str, token: str, health_urls: Mapping[str, str], *, simulated: bool | None = None) -> int:
    """Ask everything, print the answers, and return 0 when nothing is wrong, else 1.

    `simulated` says whether prices should be simulated, `health_urls` where each service's readiness is, if known.
    """
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        system = _System(session, url.rstrip("/"), token)
        findings = await _findings(system, health_urls, simulated)
    for finding in findings:
        say(f"{'WRONG' if finding.advice else 'ok':<6}{finding.question}: {finding.answer}")
        if finding.advice:
            say(f"      → {finding.advice}")
    wrong = sum(finding.advice is not None for finding in findings)
    say(f"\n{len(findings) - wrong} ok, {wrong} wrong")
    return 1 if wrong else 0


async def _findings(
    system: "_System", health_urls: Mapping[str, str], simulated: bool | None
) -> list[Finding]:
    findings: list[Finding] = []
    try:
        findings.append(await _is_there(system))
        findings += await _is_ready(system)
        current = await _current(system)
        findings += _portfolio_findings(current, simulated)
        findings += await _chart_findings(system)
        findings += await _refusals(system)
    except Unanswered as error:
        findings.append(error.finding)
    for name, url in health_urls.items():
        findings.append(await _worker(system, name, url))
    if "price_feeder" in health_urls:
        findings.append(await _market_data(system, health_urls["price_feeder"]))
    return findings


class _System:
    def __init__(self, session: aiohttp.ClientSession, url: str, token: str) -> None:
        self.session = session
        self.url = url
        self._token = token

    async def get(self, path: str, *, authorized: bool = True) -> tuple[int, Any]:
        """Return status and JSON, with exact decimals; a text that is not JSON comes as it is."""
        headers = {"Authorization": f"Bearer {self._token}"} if authorized else {}
        address = path if path.startswith("http") else self.url + path
        async with self.session.get(address, headers=headers) as answer:
            text = await answer.text()
        try:
            return answer.status, json.loads(text, parse_float=Decimal)
        except ValueError:
            return answer.status, text


async def _is_there(system: _System) -> Finding:
    question = f"does the gateway answer at {system.url}"
    advice = "is api_gateway running, and is this its address and port (GATEWAY_PORT)?"
    try:
        status, _ = await system.get("/healthz", authorized=False)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise Unanswered(Finding(question, f"no: {str(error) or type(error).__name__}", advice)) from error
    if status != 200:
        raise Unanswered(Finding(question, f"with {status}, not as a gateway", advice))
    return Finding(question, "yes")


async def _is_ready(system: _System) -> list[Finding]:
    _, body = await system.get("/readyz", authorized=False)
    advice = {
        "postgres": "is PostgreSQL running and DATABASE_URL right?",
        "schema": "run `alembic upgrade head` with the same DATABASE_URL",
        "nats": "is nats-server running with JetStream (-js) and NATS_URL right?",
    }
    checks = body.get("checks", {}) if isinstance(body, dict) else {}
    return [
        Finding(
            f"does the gateway reach {name}",
            outcome,
            None if outcome == "ok" else advice.get(name, "see its log, and /readyz on its health port"),
        )
        for name, outcome in checks.items()
    ]


async def _current(system: _System) -> Any:
    status, body = await system.get("/api/portfolio/current")
    advice = {
        401: "the token is expired or signed with another secret: mint one with the gateway's JWT_SECRET",
        403: "the user is deactivated: python -m services.admin activate-user",
        404: "no such user: python -m services.admin create-user, with the token's `sub`",
        503: "PostgreSQL does not answer in time: see the gateway's log",
    }
    if status != 200:
        detail = body.get("detail", "") if isinstance(body, dict) else ""
        raise Unanswered(
            Finding(
                "is the portfolio given for this token",
                f"no, {status} {detail}",
                advice.get(status, "see its log"),
            )
        )
    return body


def _portfolio_findings(current: Any, simulated: bool | None) -> Iterator[Finding]:
    positions, unpriced = current["positions"], current["unpriced"]
    yield Finding("is the portfolio given for this token", f"yes, worth {current['total_value']}")
    total = current["cash_balance"] + sum(position["current_value"] for position in positions)
    yield Finding(
        "do cash and positions add up to the total",
        "yes" if total == current["total_value"] else f"no, to {total}",
        None
        if total == current["total_value"]
        else "this must not happen: report it with the answer of /current",
    )
    held = len(positions) + len(unpriced)
    yield Finding(
        "are there positions with shares",
        f"yes, {held}" if held else "no",
        None if held else "python -m services.admin import-positions, else there is nothing to price",
    )
    names = ", ".join(position["ticker"] for position in unpriced)
    yield Finding(
        "has every position a price",
        f"no: {names}" if unpriced else "yes",
        f"a symbol that Alpaca does not know stays without; otherwise {_PRICES_ADVICE}" if unpriced else None,
    )
    stale = ", ".join(position["ticker"] for position in positions if position["price_status"] == "stale")
    is_over = any(position["price_status"] == "closed" for position in positions)
    resting = f", those of equities rest until {current['market']['next_open']}" if is_over else ""
    yield Finding(
        "are the prices updating",
        f"no, last at {current['last_updated']}, stale: {stale}"
        if stale
        else f"yes, at {current['last_updated']}{resting}",
        _PRICES_ADVICE if stale else None,
    )
    left_over = current["simulated"] and simulated is False
    yield Finding(
        "are the prices real",
        "no, they are simulated" if current["simulated"] else "yes",
        f"they were left by the simulated market, Alpaca has given none yet. {_PRICES_ADVICE}"
        if left_over
        else None,
    )


async def _chart_findings(system: _System) -> list[Finding]:
    findings = []
    for timeframe in TIMEFRAMES:
        status, body = await system.get(f"/api/portfolio/performance?timeframe={timeframe}")
        question = f"has the {timeframe} chart data"
        if status != 200:
            findings.append(Finding(question, f"it answers {status}", "see the gateway's log"))
        elif not body["data_available"]:
            findings.append(Finding(question, "no", _SNAPSHOTS_ADVICE))
        else:
            findings.append(Finding(question, f"yes, {len(body['data_points'])} points"))
        if timeframe == "1D" and status == 200 and body["data_available"]:
            newest = datetime.fromisoformat(body["data_points"][-1]["timestamp"])
            age = utc_now() - newest
            recent = age < SNAPSHOT_AGE_MAX
            findings.append(
                Finding(
                    "are snapshots being taken",
                    f"the newest is of {newest:%H:%M} UTC",
                    None if recent else _SNAPSHOTS_ADVICE,
                )
            )
    findings.append(await _agreement(system))
    return findings


async def _agreement(system: _System) -> Finding:
    """Prices may move between two answers, so equality is looked for a few times."""
    question = "does the chart's current value equal the portfolio's"
    for _ in range(EQUAL_ATTEMPTS_MAX):
        _, chart = await system.get("/api/portfolio/performance?timeframe=1D")
        _, current = await system.get("/api/portfolio/current")
        if chart["current_value"] == current["total_value"]:
            return Finding(question, "yes")
    answer = f"no, {chart['current_value']} and {current['total_value']}"
    return Finding(question, answer, "this must not happen: report it with both answers")


async def _refusals(system: _System) -> list[Finding]:
    open_status, _ = await system.get("/api/portfolio/current", authorized=False)
    wrong_status, _ = await system.get("/api/portfolio/performance?timeframe=2D")
    return [
        Finding(
            "is a request without a token refused",
            f"with {open_status}",
            None
            if open_status == 401
            else "something between here and the gateway adds a token: take it away",
        ),
        Finding(
            "is an unknown timeframe refused",
            f"with {wrong_status}",
            None if wrong_status == 400 else "is this the gateway of this project?",
        ),
    ]


async def _worker(system: _System, name: str, url: str) -> Finding:
    question = f"is {name} well"
    try:
        status, body = await system.get(url, authorized=False)
    except (aiohttp.ClientError, TimeoutError) as error:
        return Finding(question, f"it does not answer at {url}: {error}", f"is {name} running? See its log")
    if status == 200:
        return Finding(question, "yes")
    checks = body.get("checks", {}) if isinstance(body, dict) else {}
    wrong = "; ".join(f"{check}: {outcome}" for check, outcome in checks.items() if outcome != "ok")
    return Finding(question, f"no, {wrong or status}", f"see the log of {name}")


async def _market_data(system: _System, readiness_url: str) -> Finding:
    """The feeder is well also while Alpaca is not; its metrics tell when a price was last confirmed."""
    question = "does Alpaca (or the simulator) give prices"
    try:
        _, metrics = await system.get(readiness_url.replace("/readyz", "/metrics"), authorized=False)
    except (aiohttp.ClientError, TimeoutError):
        return Finding(question, "unknown, the price feeder does not answer", "see its log")
    values = dict(re.findall(r"^(price_feeder_\w+)(?:\{\})? (\S+)$", str(metrics), flags=re.MULTILINE))
    if float(values.get("price_feeder_held_symbols", "0")) == 0:
        return Finding(question, "nobody holds anything to be priced")
    age = utc_now().timestamp() - float(values.get("price_feeder_last_success_timestamp_seconds", "0"))
    if age < CONFIRMED_SECONDS_MAX:
        return Finding(question, f"yes, {max(age, 0):.0f} s ago")
    since = f"not for {age:.0f} s" if age < STARTED_BEFORE_SECONDS else "not since the price feeder started"
    return Finding(question, since, _PRICES_ADVICE)
