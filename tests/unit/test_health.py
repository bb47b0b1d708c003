"""What `/readyz`, `/metrics` and the log say of the same checks."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from shared import health
from shared.vitals import LAG_LOOK_SECONDS
from tests.waiting import eventually

Check = Callable[[], Any]


@asynccontextmanager
async def served(port: int, **results: str | None) -> AsyncIterator[aiohttp.ClientSession]:
    """Serve checks that return these results."""

    def returning(result: str | None) -> health.Check:
        async def check() -> str | None:
            return result

        return check

    checks = {name: returning(result) for name, result in results.items()}
    async with (
        health.serving("tests", "127.0.0.1", port, checks, schema="0009"),
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client,
    ):
        yield client


async def metrics(client: aiohttp.ClientSession) -> dict[str, float]:
    """Return every sample by its name with labels."""
    async with client.get("/metrics") as answer:
        lines = (await answer.text()).splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


@pytest.mark.parametrize(
    ("results", "status", "code"),
    [
        ({"postgres": None}, "ready", 200),
        ({"postgres": None, "lease": health.Note("standby")}, "ready", 200),
        ({"postgres": None, "streams": health.Degraded("refused")}, "degraded", 200),
        ({"postgres": "away", "streams": health.Degraded("refused")}, "not ready", 503),
    ],
)
async def test_worst_check_is_the_status(
    unused_tcp_port: int, results: dict[str, str | None], status: str, code: int
) -> None:
    async with served(unused_tcp_port, **results) as client, client.get("/readyz") as answer:
        assert answer.status == code
        expected = {name: result or "ok" for name, result in results.items()}
        assert await answer.json() == {"service": "tests", "status": status, "checks": expected}


async def test_metrics_say_what_readyz_says_without_being_asked_first(unused_tcp_port: int) -> None:
    results = {"nats": "away", "budget": health.Degraded("spent"), "lease": health.Note("standby")}
    async with served(unused_tcp_port, **results) as client:
        found = await metrics(client)
    for check, state in (("nats", "failed"), ("budget", "degraded"), ("lease", "ok")):
        for each in ("ok", "degraded", "failed"):
            assert found[f'foliotick_check_state{{check="{check}",state="{each}"}}'] == (each == state)


async def test_failure_is_logged_once_with_advice_and_its_end_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reporting = health.Reporting()
    for result in ("away", "still away", "ok", "ok"):
        reporting.hear({"postgres": result, "streams": health.Degraded("refused")})
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "check_failed" in line] == [lines[0]]
    assert "PostgreSQL" in lines[0]
    assert "away" in lines[0]
    assert [line for line in lines if "check_recovered" in line] == [lines[1]]
    assert len(lines) == 2


async def test_what_fails_and_recovers_is_logged_although_nobody_asks(
    unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(health, "REMEMBERED_SECONDS", 0.01)
    problem, leaving, asked = "", "", 0

    async def check() -> str | None:
        nonlocal asked
        asked += 1
        return problem or None

    async def is_said(*events: str) -> bool:
        return [line["event"] for line in logs] == list(events)

    with capture_logs() as logs:
        async with health.serving(
            "tests",
            "127.0.0.1",
            unused_tcp_port,
            {"postgres": check},
            schema="0009",
            leaving=lambda: leaving or None,
        ):
            problem = "away"
            await eventually(lambda: is_said("check_failed"))
            problem = ""
            await eventually(lambda: is_said("check_failed", "check_recovered"))
            leaving, problem = "it is to stop", "away"  # what goes away now is no fault
            asked_before = asked
            await asyncio.sleep(0.2)
            assert asked <= asked_before + 1  # the look that was under way
    assert await is_said("check_failed", "check_recovered")


async def test_check_that_breaks_ends_the_service_at_the_latest_when_it_stops(
    unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "LOOK_SECONDS", 0.01)
    broke = asyncio.Event()

    async def breaks() -> str | None:
        broke.set()
        raise KeyError("a bug")

    async def serve() -> None:
        async with health.serving("tests", "127.0.0.1", unused_tcp_port, {"postgres": breaks}, schema="0009"):
            await asyncio.wait_for(broke.wait(), 10)
            await asyncio.sleep(0)

    with pytest.raises(KeyError, match="a bug"):
        await serve()


async def test_check_that_hangs_holds_up_neither_readyz_nor_metrics(unused_tcp_port: int) -> None:
    async def hangs() -> str | None:
        await asyncio.Event().wait()
        return None

    async with (
        health.serving("tests", "127.0.0.1", unused_tcp_port, {"postgres": hangs}, schema="0009"),
        aiohttp.ClientSession(f"http://127.0.0.1:{unused_tcp_port}") as client,
    ):
        started = time.monotonic()
        found = await metrics(client)
        assert time.monotonic() - started < health.CHECK_TIMEOUT_SECONDS + 3
        assert found['foliotick_check_state{check="postgres",state="failed"}'] == 1


async def test_vitals_count_tasks_threads_files_and_lag(unused_tcp_port: int) -> None:
    async with served(unused_tcp_port) as client:
        before = await metrics(client)
        assert before["process_open_fds"] >= len(os.listdir("/proc/self/fd")) - 5
        assert before["process_resident_memory_bytes"] > 1e6
        ended, waiting = threading.Event(), [asyncio.create_task(asyncio.sleep(60)) for _ in range(7)]
        threads = [threading.Thread(target=ended.wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(LAG_LOOK_SECONDS + 0.4)  # noqa: ASYNC251  # nothing else of this loop runs meanwhile
        await asyncio.sleep(0)
        after = await metrics(client)
        ended.set()
        for task in waiting:
            task.cancel()
    assert after["foliotick_tasks"] - before["foliotick_tasks"] == 7
    assert after["foliotick_threads"] - before["foliotick_threads"] == 3
    assert after["foliotick_event_loop_lag_seconds"] >= 0.39
    build = [name for name in after if name.startswith("foliotick_build_info")]
    assert any('service="tests"' in name and 'schema="0009"' in name for name in build)
