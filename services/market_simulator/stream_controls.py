"""Controls of the streams, for tests, under `/simulator/stream/`: messages, load, faults. Not Alpaca's protocol."""

import time
from decimal import Decimal
from functools import partial
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import BeforeValidator, Field, StringConstraints, TypeAdapter

from services.market_simulator.answers import answer, error
from services.market_simulator.controls import Body, Instant, SymbolText, body_of, state
from services.market_simulator.listings import tape_of
from services.market_simulator.load import SYMBOLS_MAX, TICKS_PER_SECOND_MAX, Load
from services.market_simulator.market import Trade
from services.market_simulator.questions import CRYPTO, STOCKS
from services.market_simulator.simulator import PINS_MAX, Simulator
from services.market_simulator.stream_faults import StreamFault
from services.market_simulator.stream_messages import (
    CHANNEL_OF,
    cancel_message,
    correction_message,
    given_message,
    timestamp,
    trade_message,
    written,
)
from services.market_simulator.streams import Event
from services.market_simulator.wire import number

MESSAGES_MAX = 1000
_START_CENTS = 100_00

Price = Annotated[Decimal, Field(gt=0, max_digits=15, decimal_places=9, allow_inf_nan=False)]
Conditions = Annotated[tuple[Annotated[str, StringConstraints(max_length=4)], ...], Field(max_length=8)]
TradeId = Annotated[int, Field(ge=0, lt=2**53)]
Text = Annotated[str, StringConstraints(max_length=200)]


class _Order(Body):
    S: SymbolText
    t: Instant | None = Field(default=None, ge=0)


class TradeOrder(_Order):
    """A trade; it is the latest when its conditions let it set a price and none is newer."""

    T: Literal["t"]
    p: Price
    s: Price = Decimal(100)
    c: Conditions = ("@",)
    i: TradeId | None = None
    x: Annotated[str, StringConstraints(pattern="^[A-Z]$")] = "V"


class CorrectionOrder(_Order):
    """Corrects the trade `oi`, or the latest; what is not given stays as it was."""

    T: Literal["c"]
    cp: Price
    oi: TradeId | None = None
    ci: TradeId | None = None
    cs: Price | None = None
    cc: Conditions | None = None


class CancelOrder(_Order):
    """Cancels the trade `i`, or the latest."""

    T: Literal["x"]
    i: TradeId | None = None
    a: Literal["C", "E"] = "C"


class StatusOrder(_Order):
    T: Literal["s"]
    sc: Text = "H"
    sm: Text = "Trading Halt"
    rc: Text = "T12"
    rm: Text = "Trading Halted; For information requested by NASDAQ"


class LuldOrder(_Order):
    """Price bands: no trade above `u` or below `d`."""

    T: Literal["l"]
    u: Price
    d: Price
    i: Text = "B"


class RawOrder(Body):
    """Anything at all, sent as it is to every stream; only an RFC 3339 instant under `t` becomes a timestamp."""

    T: Literal["raw"] = "raw"
    raw: Any


def _tagged(value: Any) -> Any:
    return value | {"T": "raw"} if isinstance(value, dict) and set(value) == {"raw"} else value


Order = Annotated[
    Annotated[
        TradeOrder | CorrectionOrder | CancelOrder | StatusOrder | LuldOrder | RawOrder,
        Field(discriminator="T"),
    ],
    BeforeValidator(_tagged),
]


class MessagesBody(Body):
    messages: Annotated[tuple[Order, ...], Field(min_length=1, max_length=MESSAGES_MAX)]
    frames: Literal["one", "each"] = "one"
    path: Annotated[str, StringConstraints(max_length=200, pattern="^/v")] = "/v"


class LoadBody(Body):
    symbols: Annotated[tuple[SymbolText, ...], Field(min_length=1, max_length=SYMBOLS_MAX)]
    ticks_per_second: float = Field(gt=0, le=TICKS_PER_SECOND_MAX)


_MESSAGES = TypeAdapter(MessagesBody)
_LOAD = TypeAdapter(LoadBody)
_FAULT: TypeAdapter[StreamFault] = TypeAdapter(StreamFault)


class _Unknown(Exception):
    """A trade that is to be amended is not there."""


def routes(simulator: Simulator) -> list[web.RouteDef]:
    """Return the routes under `/simulator/stream/`."""
    return [
        web.post("/simulator/stream/messages", partial(_send_messages, simulator)),
        web.put("/simulator/stream/load", partial(_set_load, simulator)),
        web.delete("/simulator/stream/load", partial(_end_load, simulator)),
        web.post("/simulator/stream/faults", partial(_order_fault, simulator)),
        web.delete("/simulator/stream/faults", partial(_clear_faults, simulator)),
    ]


async def _send_messages(simulator: Simulator, request: web.Request) -> web.Response:
    """Send messages in order: `{"messages": [{"T": "t", "S": "AAPL", "p": 175.25, "c": ["I"]}]}`.

    All in one frame for each stream, or each in its own (`"frames": "each"`). The answer has the messages as they
    were sent (with the ids and instants that were not given) and how many of them went out, summed over the streams.
    """
    body = await body_of(request, _MESSAGES)
    if isinstance(body, web.Response):
        return body
    named = {order.S for order in body.messages if not isinstance(order, RawOrder)}
    if len(simulator.tape) + sum(symbol not in simulator.tape for symbol in named) > PINS_MAX:
        return error(422, f"trades of more than {PINS_MAX} symbols")
    simulator.streams.turn()
    events: list[Event] = []
    sent: list[Any] = []
    problem: str | None = None
    for order in body.messages:
        try:
            event, message = _done(simulator, order)
        except _Unknown as unknown:
            problem = str(unknown)
            break
        events.append(event)
        sent.append(message)
    frames = [events] if body.frames == "one" else [[event] for event in events]
    delivered = sum(simulator.streams.publish(frame, body.path) for frame in frames)
    if problem is not None:
        return error(422, f"{problem}; the {len(sent)} messages before it are sent")
    return web.Response(
        body=written([{"messages": sent, "delivered": delivered}], "json")[1:-1],
        content_type="application/json",
    )


def _done(simulator: Simulator, order: Any) -> tuple[Event, Any]:
    """Do to the tape what a message says; return what to send, and the message for the answer."""
    if isinstance(order, RawOrder):
        raw = given_message(order.raw) if isinstance(order.raw, dict) else order.raw
        return (None, None, raw), raw
    now_ns = simulator.clock.now_ns()
    at_ns = now_ns if order.t is None else order.t
    tape, symbol, channel = simulator.tape, order.S, CHANNEL_OF[order.T]
    match order:
        case TradeOrder():
            trade = Trade(
                at_ns=at_ns,
                price=order.p,
                size=order.s,
                id=simulator.new_trade_id() if order.i is None else order.i,
                exchange=order.x,
                conditions=order.c,
            )
            tape.report(symbol, trade)
            venue = CRYPTO if "/" in symbol else STOCKS
            return (channel, symbol, trade), trade_message(venue, symbol, trade, "")
        case CorrectionOrder():
            original = _amendable(simulator, symbol, order.oi, now_ns)
            corrected = Trade(
                at_ns=original.at_ns,
                price=order.cp,
                size=original.size if order.cs is None else order.cs,
                id=simulator.new_trade_id() if order.ci is None else order.ci,
                exchange=original.exchange,
                conditions=original.conditions if order.cc is None else order.cc,
            )
            tape.correct(symbol, original, corrected)
            message = correction_message(symbol, original, corrected, at_ns)
        case CancelOrder():
            cancelled = _amendable(simulator, symbol, order.i, now_ns)
            tape.cancel(symbol, cancelled)
            message = cancel_message(symbol, cancelled, order.a, at_ns)
        case StatusOrder():
            words = {"sc": order.sc, "sm": order.sm, "rc": order.rc, "rm": order.rm}
            message = {"T": "s", "S": symbol, **words, "t": timestamp(at_ns), "z": tape_of(symbol)}
        case LuldOrder():
            bands = {"u": number(order.u), "d": number(order.d), "i": order.i}
            message = {"T": "l", "S": symbol, **bands, "t": timestamp(at_ns), "z": tape_of(symbol)}
        case _:
            raise AssertionError(order)
    return (channel, symbol, message), message


def _amendable(simulator: Simulator, symbol: str, trade_id: int | None, now_ns: int) -> Trade:
    trade = simulator.tape.find(symbol, trade_id, now_ns)
    if trade is None:
        raise _Unknown(f"no trade {'' if trade_id is None else f'{trade_id} '}of {symbol} is known")
    load = simulator.tape.load
    if load is not None and load.latest(symbol) == trade:
        raise _Unknown(f"the load's trades of {symbol} cannot be amended")
    return trade


async def _set_load(simulator: Simulator, request: web.Request) -> web.Response:
    """Trade symbols evenly, known or not: `{"symbols": ["AAPL", "L001"], "ticks_per_second": 5000}`."""
    body = await body_of(request, _LOAD)
    if isinstance(body, web.Response):
        return body
    now_ns = simulator.clock.now_ns()
    latest = {symbol: simulator.tape.latest(symbol, now_ns) for symbol in body.symbols}
    cents = {
        symbol: _START_CENTS if trade is None else max(1, int(trade.price * 100))
        for symbol, trade in latest.items()
    }
    simulator.streams.set_load(Load(cents, body.ticks_per_second, time.time_ns()))
    return answer(state(simulator))


async def _end_load(simulator: Simulator, _: web.Request) -> web.Response:
    simulator.streams.set_load(None)
    return answer(state(simulator))


async def _order_fault(simulator: Simulator, request: web.Request) -> web.Response:
    """Order a fault: `{"kind": "refuse_auth", "code": 406, "times": 2}`; see `stream_faults` for the kinds."""
    body = await body_of(request, _FAULT)
    if isinstance(body, web.Response):
        return body
    try:
        simulator.streams.order(body)
    except OverflowError as full:
        return error(422, str(full))
    return answer(state(simulator), status=201)


async def _clear_faults(simulator: Simulator, _: web.Request) -> web.Response:
    simulator.streams.faults.clear()
    return answer(state(simulator))
