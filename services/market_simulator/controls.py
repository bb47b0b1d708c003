"""Controls for tests, under `/simulator/`: the replay's clock, pinned prices, faults. Not part of Alpaca's protocol."""

import time
from decimal import Decimal
from functools import partial
from typing import Annotated, Any, TypeVar

from aiohttp import web
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from services.market_simulator.answers import answer, error
from services.market_simulator.faults import Fault
from services.market_simulator.instants import ns_of_text, rfc3339
from services.market_simulator.market_clock import ReplayClock
from services.market_simulator.questions import CRYPTO, STOCKS
from services.market_simulator.simulator import PINS_MAX, Simulator
from services.market_simulator.wire import number

T = TypeVar("T")


def _instant(value: Any) -> int:
    if not isinstance(value, str):
        raise ValueError("must be an RFC 3339 instant")  # noqa: TRY004 - pydantic wants a ValueError
    return ns_of_text(value)


def _symbol(value: str) -> str:
    if not (STOCKS.symbol.fullmatch(value) or CRYPTO.symbol.fullmatch(value)):
        raise ValueError("is not a symbol")
    return value


Instant = Annotated[int, BeforeValidator(_instant)]
SymbolText = Annotated[str, StringConstraints(max_length=32), BeforeValidator(_symbol)]


class Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClockBody(Body):
    at: Instant | None = Field(default=None, ge=0)
    speed: float | None = Field(default=None, ge=0, le=1e6, allow_inf_nan=False)


class PinBody(Body):
    price: Decimal = Field(gt=0, max_digits=15, decimal_places=9, allow_inf_nan=False)
    at: Instant | None = Field(default=None, ge=0)


_CLOCK = TypeAdapter(ClockBody)
_PINS = TypeAdapter(Annotated[dict[SymbolText, PinBody], Field(max_length=PINS_MAX)])
_FAULT: TypeAdapter[Fault] = TypeAdapter(Fault)


def routes(simulator: Simulator) -> list[web.RouteDef]:
    """Return the routes under `/simulator/`."""
    return [
        web.get("/simulator/status", partial(_status, simulator)),
        web.put("/simulator/clock", partial(_set_clock, simulator)),
        web.put("/simulator/prices", partial(_pin_prices, simulator)),
        web.delete("/simulator/prices", partial(_unpin_prices, simulator)),
        web.post("/simulator/faults", partial(_order_fault, simulator)),
        web.delete("/simulator/faults", partial(_clear_faults, simulator)),
    ]


async def _status(simulator: Simulator, _: web.Request) -> web.Response:
    return answer(state(simulator))


async def _set_clock(simulator: Simulator, request: web.Request) -> web.Response:
    """Set a replay's instant, its speed, or both: `{"at": "2013-10-11T20:00:00Z", "speed": 0}`."""
    body = await body_of(request, _CLOCK)
    if isinstance(body, web.Response):
        return body
    if not isinstance(simulator.clock, ReplayClock):
        return error(
            409, "only a replay has a clock that can be set; the synthetic market lives in real time"
        )
    simulator.clock.set(body.at, body.speed)
    if body.at is not None:
        simulator.streams.clock_was_set()
    return answer(state(simulator))


async def _pin_prices(simulator: Simulator, request: web.Request) -> web.Response:
    """Pin the latest trade of symbols, known or not: `{"AAPL": {"price": 175.00, "at": "2026-11-20T15:00:00Z"}}`."""
    body = await body_of(request, _PINS)
    if isinstance(body, web.Response):
        return body
    if len(simulator.tape) + sum(symbol not in simulator.tape for symbol in body) > PINS_MAX:
        return error(422, f"more than {PINS_MAX} pinned prices")
    now_ns = simulator.clock.now_ns()
    simulator.pin({symbol: (pin.price, now_ns if pin.at is None else pin.at) for symbol, pin in body.items()})
    return answer(state(simulator))


async def _unpin_prices(simulator: Simulator, request: web.Request) -> web.Response:
    """Unpin the symbols of the query (`?symbols=AAPL,BTC/USD`), or all."""
    simulator.unpin(
        request.query["symbols"].split(",") if "symbols" in request.query else simulator.tape.pins
    )
    return answer(state(simulator))


async def _order_fault(simulator: Simulator, request: web.Request) -> web.Response:
    """Order a fault: `{"kind": "rate_limited", "times": 2, "retry_after_seconds": 5}`; see `faults` for the kinds."""
    body = await body_of(request, _FAULT)
    if isinstance(body, web.Response):
        return body
    try:
        simulator.faults.add(body, time.monotonic())
    except OverflowError as full:
        return error(422, str(full))
    return answer(state(simulator), status=201)


async def _clear_faults(simulator: Simulator, _: web.Request) -> web.Response:
    simulator.faults.clear()
    return answer(state(simulator))


async def body_of(request: web.Request, body_type: TypeAdapter[T]) -> T | web.Response:
    """Return the body as its type, or the 422 that says in words what is wrong with it."""
    try:
        return body_type.validate_json(await request.read())
    except ValidationError as problems:
        words = [
            ": ".join((".".join(str(part) for part in one["loc"]) or "body", one["msg"]))
            for one in problems.errors(include_url=False, include_input=False)
        ]
        return error(422, "; ".join(words))


def state(simulator: Simulator) -> dict[str, Any]:
    """Return what the simulator is doing, for people and tests."""
    clock = simulator.clock
    return {
        "simulated": True,
        "source": simulator.market.name,
        "description": simulator.source(),
        "now": rfc3339(clock.now_ns()),
        "speed": clock.speed if isinstance(clock, ReplayClock) else 1.0,
        "ends_at": rfc3339(clock.end_ns) if isinstance(clock, ReplayClock) else None,
        "symbols": simulator.market.symbols,
        "pinned": {
            symbol: {"price": number(pin.price), "at": rfc3339(pin.at_ns)}
            for symbol, pin in simulator.tape.pins.items()
        },
        "faults": simulator.faults.listed(time.monotonic()),
        "requests": simulator.requests,
        "data_requests_of_busiest_minute": simulator.busiest_minute.requests,
        "stream_attempts": [
            {"path": path, "at": rfc3339(at_ns)} for path, at_ns in simulator.streams.attempts
        ],
        "streams": [stream.listed() for stream in simulator.streams.open],
        "stream_faults": simulator.streams.faults.listed(time.monotonic()),
        "load": None if (load := simulator.tape.load) is None else load.listed(),
    }
