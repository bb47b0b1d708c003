"""A sign counts for whom it is asked of, while it is asked for; one that never ends is told."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from local.settings import free_port
from tests.faults.parts import Service
from tests.faults.population import drawn
from tests.faults.signs import Sight, Sign, looking_out, shown
from tests.faults.system import System
from tests.faults.telemetry import log_lines, said, samples, traces

NATS = Sign("nats", "bus_problems_total", "bus_problem", words="connection lost")
SOON = 3.0


@dataclass
class Process:
    """Something that answers as a service does, and what it is to say."""

    service: Service
    checks: dict[str, str] = field(default_factory=dict)
    problems: int = 7

    async def readyz(self, _: web.Request) -> web.Response:
        status = "degraded" if self.checks else "ready"
        return web.json_response({"status": status, "checks": {"postgres": "ok", **self.checks}})

    async def metrics(self, _: web.Request) -> web.Response:
        counted = f"# TYPE bus_problems_total counter\nbus_problems_total {self.problems}\n"
        return web.Response(text=f"{counted}# TYPE bus_storing gauge\nbus_storing 1.0\n")

    def say(self, **line: str) -> None:
        with self.service.log.open("a") as log:
            log.write(f"{json.dumps(line)}\n")

    def lose_nats(self, problem: str = "connection lost") -> None:
        self.checks["nats"] = problem
        self.problems += 1
        self.say(event="bus_problem", level="warning", advice="see nats-server")

    def replace(self, problems: int) -> None:
        """Let another process take its place, whose counters stand where they are told to."""
        assert self.service.process is not None
        self.service.process.kill()
        self.service.process.wait()
        self.service.process = _sleeping()
        self.problems = problems


def _sleeping() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[list[Process]]:
    found = []
    runners = []
    async with aiohttp.ClientSession() as http:
        for name in ("one", "another"):
            port = free_port()
            service = Service(name, folder=tmp_path, health_url=f"http://127.0.0.1:{port}", http=http)
            service.process = _sleeping()
            process = Process(service)
            service.log.touch()
            app = web.Application()
            app.add_routes([web.get("/readyz", process.readyz), web.get("/metrics", process.metrics)])
            runners.append(runner := web.AppRunner(app))
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            found.append(process)
        yield found
        for process, runner in zip(found, runners, strict=True):
            assert process.service.process is not None
            process.service.process.kill()
            process.service.process.wait()
            await runner.cleanup()


@pytest.fixture
def system(processes: list[Process], tmp_path: Path) -> System:
    one, another = (process.service for process in processes)
    assert one.http is not None
    return System(tmp_path, drawn(3, 5), [], [], one, {"api_gateway": [one, another]}, one.http, {}, "")


async def test_what_one_service_shows_is_not_shown_by_another(
    processes: list[Process], system: System
) -> None:
    one, another = processes
    async with shown(system, NATS, by=[one.service], seconds_max=SOON):
        one.lose_nats()
    one.checks.clear()
    with pytest.raises(AssertionError, match="another: /readyz does not show nats") as raised:
        async with shown(system, NATS, by=[one.service, another.service], seconds_max=2):
            one.lose_nats()
    assert "one:" not in str(raised.value)
    assert "another: bus_problems_total has not moved" in str(raised.value)


async def test_what_was_shown_before_a_strike_is_not_shown_by_it(
    processes: list[Process], system: System
) -> None:
    one, _ = processes
    one.lose_nats()
    with pytest.raises(AssertionError, match="before anything was done: one goes on showing nats"):
        async with shown(system, NATS, by=[one.service], seconds_max=1.5):
            pass
    one.checks.clear()
    with pytest.raises(AssertionError) as raised:
        async with shown(system, NATS, by=[one.service], seconds_max=1.5):
            pass
    assert "/readyz does not show nats" in str(raised.value)
    assert "bus_problems_total has not moved" in str(raised.value)
    assert "the log has no bus_problem with an advice" in str(raised.value)


async def test_check_that_says_something_else_does_not_show_it(
    processes: list[Process], system: System
) -> None:
    one, _ = processes
    with pytest.raises(AssertionError, match="does not say of nats 'connection lost', but") as raised:
        async with shown(system, NATS, by=[one.service], seconds_max=2):
            one.lose_nats("no answer within 2 s")
    assert "no answer within 2 s" in str(raised.value)


async def test_line_without_advice_shows_nothing(processes: list[Process], system: System) -> None:
    one, _ = processes
    with pytest.raises(AssertionError, match="the log has no bus_problem with an advice"):
        async with shown(system, Sign(line="bus_problem"), by=[one.service], seconds_max=2):
            one.say(event="bus_problem", level="warning")


async def test_process_that_has_just_ended_has_not_moved_what_it_ever_counted(
    processes: list[Process],
) -> None:
    one, _ = processes
    sight = Sight(one.service, ["bus_problems_total", "bus_storing"])
    await sight.begin()
    one.replace(problems=0)
    await sight.look()
    assert not sight.moved
    one.problems = 1
    await sight.look()
    assert sight.moved == {"bus_problems_total"}

    sight = Sight(one.service, ["bus_problems_total"])
    await sight.begin()
    assert one.service.process is not None
    one.service.process.kill()
    one.service.process.wait()
    await sight.look()  # it answers, and is nobody's process
    assert not sight.moved


async def test_sign_that_never_ends_is_told(processes: list[Process], system: System) -> None:
    one, _ = processes
    async with looking_out(system, [NATS], well_seconds_max=2) as lookout:
        one.lose_nats()
    assert lookout.missing([NATS]) == ["one goes on showing nats"]
    async with looking_out(system, [NATS], well_seconds_max=SOON) as lookout:
        one.checks.clear()
    assert "goes on" not in str(lookout.missing([NATS]))


def test_samples_are_chosen_by_name_and_labels() -> None:
    text = (
        "# TYPE rounds_total counter\n"
        'rounds_total{outcome="failed",feed="iex"} 2.0\n'
        'rounds_total{outcome="taken",feed="iex"} 5.0\n'
        "# TYPE rounds_total_seconds gauge\n"
        "rounds_total_seconds 9.0\n"
    )
    assert [(each.value, each.kind) for each in samples(text, "rounds_total")] == [
        (2, "counter"),
        (5, "counter"),
    ]
    assert [each.value for each in samples(text, 'rounds_total{outcome="failed"}')] == [2]
    assert samples(text, 'rounds_total{outcome="failed",feed="sip"}') == []


def test_event_that_another_line_speaks_of_is_not_said(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        '{"event":"prices_not_updated","level":"warning"}\n'
        '{"event":"feed_status","advice":"see prices_not_updated"}\n'
        "prices_not_updated\n"
    )
    size = log.stat().st_size
    with log.open("a") as file:
        file.write(
            '{"event":"round_failed","exception":[{"exc_type":"KeyError"}]}\nTraceback (most recent\n{"ev'
        )
    assert said(log, "prices_not_updated") == 1
    assert [line["event"] for line in log_lines(log, size)] == ["round_failed"]
    assert traces(log) == [
        '{"event":"round_failed","exception":[{"exc_type":"KeyError"}]}',
        "Traceback (most recent",
    ]
