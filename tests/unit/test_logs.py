"""The direct way of a frequent event beside the pipeline. Each in a process of its own: there is one configuration."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


def written(script: str) -> list[str]:
    """Run a script that logs, and return its lines."""
    done = subprocess.run(
        [sys.executable, "-c", f"import asyncio, os, sys\nfrom shared import logs\n{script}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize("level", ["info", "warning"])
def test_direct_line_is_the_pipelines_line(level: str) -> None:
    data = "dict(method='GET', route='/a\"b', status=200, duration_ms=14.47, request_id='9c', missing=None)"
    direct, piped = written(
        f"""
logs.configure("api_gateway", "INFO")
logs.write("{level}", "request_served", {data})
logs.get_logger().{level}("request_served", **{data})
"""
    )
    instant = r'"timestamp":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z"'
    assert len(re.findall(instant, direct)) == 1
    assert re.sub(instant, "", direct) == re.sub(instant, "", piped)
    assert json.loads(direct)["level"] == level


def test_what_a_server_sends_makes_no_library_print_a_traceback() -> None:
    assert not written(
        """
logs.configure("price_feeder", "INFO")
import logging
try:
    raise ValueError("[MissingHeaderBodySeparatorDefect()], unparsed data: 'Content'")
except ValueError:
    logging.getLogger("urllib3.connection").warning("Failed to parse headers", exc_info=True)
"""
    )


def test_text_outside_ascii_is_escaped_in_either_line() -> None:
    direct, piped = written(
        """
logs.configure("api_gateway", "INFO")
logs.write("info", "request_served", dict(reason="é\\n\u2028"))
logs.get_logger().info("request_served", reason="é\\n\u2028")
"""
    )
    assert direct.isascii()
    assert json.loads(direct)["reason"] == json.loads(piped)["reason"] == "é\n\u2028"


def test_text_that_is_no_unicode_is_written_all_the_same() -> None:
    (line,) = written(
        """
logs.configure("api_gateway", "INFO")
logs.write("info", "request_served", dict(reason="\\udc80"))
"""
    )
    assert json.loads(line)["reason"] == "\udc80"


def test_level_holds_for_direct_lines() -> None:
    (line,) = written(
        """
logs.configure("api_gateway", "WARNING")
logs.write("info", "request_served", {})
logs.write("warning", "request_served", {})
"""
    )
    assert json.loads(line)["level"] == "warning"


def test_order_of_lines_is_that_of_the_calls() -> None:
    lines = written(
        """
logs.configure("api_gateway", "INFO")
async def main():
    for number in range(0, 30, 3):
        logs.write("info", "direct", dict(number=number))
        logs.write("info", "direct", dict(number=number + 1))
        logs.get_logger().info("piped", number=number + 2)
        if number % 2:
            await asyncio.sleep(0)
asyncio.run(main())
"""
    )
    assert [json.loads(line)["number"] for line in lines] == list(range(30))


def test_lines_of_a_turn_are_written_at_once_when_it_ends() -> None:
    lines = written(
        """
class Counting:
    writes = 0
    def write(self, text):
        Counting.writes += 1
        return real.write(text)
    def flush(self):
        real.flush()
    def isatty(self):
        return False
real, sys.stdout = sys.stdout, Counting()
logs.configure("api_gateway", "INFO")
async def main():
    for number in range(100):
        logs.write("info", "direct", dict(number=number))
    assert Counting.writes == 0
    await asyncio.sleep(0)
    assert Counting.writes == 1, Counting.writes
asyncio.run(main())
"""
    )
    assert [json.loads(line)["number"] for line in lines] == list(range(100))


def test_no_line_is_lost_when_the_process_ends_within_the_turn() -> None:
    (line,) = written(
        """
logs.configure("api_gateway", "INFO")
async def main():
    logs.write("info", "last", {})
    sys.exit()
asyncio.new_event_loop().run_until_complete(main())
"""
    )
    assert json.loads(line)["event"] == "last"


def test_process_goes_on_when_nobody_reads_its_output() -> None:
    script = """
import asyncio, sys
from shared import logs
logs.configure("api_gateway", "INFO")
async def main():
    print("ready", file=sys.stderr, flush=True)
    sys.stdin.read()
    for _ in range(100):
        logs.write("info", "direct", dict(text="x" * 10_000))
        await asyncio.sleep(0)
    print("alive", file=sys.stderr, flush=True)
asyncio.run(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    assert process.stderr.readline() == "ready\n"
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.readline() == "alive\n"
    process.wait(10)
    process.stderr.close()


def test_reader_that_stands_still_holds_nothing_up_and_is_told_what_he_missed() -> None:
    script = """
import asyncio, os, sys, time
from shared import logs
logs.configure("tests", "INFO")
log = logs.get_logger()

async def main():
    began = time.monotonic()
    for number in range(3000):
        log.info("piped", number=number, text="x" * 100)
        logs.write("info", "direct", {"number": number, "text": "x" * 5000})
        await asyncio.sleep(0)
    assert time.monotonic() - began < 10
    sys.stderr.write("done")
    sys.stderr.flush()
    while not os.access(sys.argv[1], os.F_OK):
        await asyncio.sleep(0.01)
    log.info("read again")
    await asyncio.sleep(0.1)

asyncio.run(main())
"""
    with tempfile.TemporaryDirectory() as folder:
        sign = Path(folder) / "sign"
        with subprocess.Popen(
            [sys.executable, "-c", script, str(sign)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr
            assert process.stdout
            assert process.stderr.read(4) == "done"
            taken = os.read(process.stdout.fileno(), 1024 * 1024).decode()
            sign.touch()
            lines = (taken + process.stdout.read()).splitlines()
            assert process.wait(10) == 0
    whole = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    *kept, again, said = whole
    assert len(lines) - len(whole) <= 1  # the one that the pipe had no more room for
    assert (again["event"], said["event"]) == ("read again", "log_lines_dropped")
    numbers = [line["number"] for line in kept]
    assert numbers == sorted(numbers)
    assert len(kept) + said["lines"] == 6000
