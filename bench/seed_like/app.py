"""The seed's API: `python -m bench.seed_like.app PORT`, with DATABASE_URL and JWT_SECRET in the environment."""

import os
import sys
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Literal

import jwt
import uvicorn
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from bench.seed_like.models import User
from bench.seed_like.performance_service import data_points
from bench.seed_like.portfolio_service import ValuedPosition, valued_portfolio
from bench.seed_like.price_service import PriceService
from bench.seed_like.sessions import engine, sessions
from shared.clock import utc_now

_SECRET = os.environ.get("JWT_SECRET", "")
_SESSIONS = sessions(engine(os.environ.get("DATABASE_URL", "postgresql://")))

app = FastAPI()


class PositionAnswer(BaseModel):
    ticker: str
    shares: float
    cost_basis: float
    current_value: float
    price_per_share: float
    unrealized_gain_loss: float
    unrealized_gain_loss_percent: float


class CurrentAnswer(BaseModel):
    total_value: float
    investment_value: float
    cash_balance: float
    positions: list[PositionAnswer]
    last_updated: datetime
    price_fresh: bool


class DataPoint(BaseModel):
    timestamp: datetime
    value: float


class PerformanceAnswer(BaseModel):
    timeframe: str
    data_points: list[DataPoint]
    start_value: float
    current_value: float
    profit_loss: float
    profit_loss_percent: float
    data_available: bool


async def _session() -> AsyncIterator[AsyncSession]:
    async with _SESSIONS() as session:
        yield session


Session = Annotated[AsyncSession, Depends(_session)]


async def _current_user(
    session: Session, bearer: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]
) -> User:
    try:
        claims = jwt.decode(
            bearer.credentials, _SECRET, algorithms=["HS256"], options={"require": ["exp", "sub"]}
        )
    except jwt.InvalidTokenError as error:
        raise HTTPException(401, "invalid token") from error
    user = await session.scalar(select(User).where(User.subject == claims["sub"], User.is_active))
    if user is None:
        raise HTTPException(404, "unknown user")
    return user


CurrentUser = Annotated[User, Depends(_current_user)]


@app.get("/constant")
async def constant() -> dict[str, str]:
    return {"answer": "constant"}


@app.get("/api/portfolio/current")
async def current(session: Session, user: CurrentUser) -> CurrentAnswer:
    portfolio = await valued_portfolio(session, user)
    return CurrentAnswer(
        total_value=float(portfolio.total_value),
        investment_value=float(portfolio.investment_value),
        cash_balance=float(user.cash_balance),
        positions=[_position(valued) for valued in portfolio.positions],
        last_updated=max((valued.price.updated_at for valued in portfolio.positions), default=utc_now()),
        price_fresh=all(PriceService.is_price_fresh(valued.price) for valued in portfolio.positions),
    )


def _position(valued: ValuedPosition) -> PositionAnswer:
    cost_basis, value = valued.position.cost_basis, valued.current_value
    gain = value - cost_basis
    return PositionAnswer(
        ticker=valued.position.ticker,
        shares=float(valued.position.shares),
        cost_basis=float(cost_basis),
        current_value=float(value),
        price_per_share=float(valued.price.price),
        unrealized_gain_loss=float(gain),
        unrealized_gain_loss_percent=round(float(gain / cost_basis * 100), 2) if cost_basis else 0.0,
    )


@app.get("/api/portfolio/performance")
async def performance(
    session: Session, user: CurrentUser, timeframe: Literal["1D", "1W", "1M", "3M", "YTD", "ALL"] = "1D"
) -> PerformanceAnswer:
    points = await data_points(session, user.id, timeframe, utc_now())
    portfolio = await valued_portfolio(session, user)
    current_value = float(portfolio.total_value)
    start_value = points[0][1] if points else 0.0
    profit_loss = current_value - start_value
    return PerformanceAnswer(
        timeframe=timeframe,
        data_points=[DataPoint(timestamp=timestamp, value=value) for timestamp, value in points],
        start_value=start_value,
        current_value=current_value,
        profit_loss=round(profit_loss, 2),
        profit_loss_percent=round(profit_loss / start_value * 100, 2) if start_value else 0.0,
        data_available=bool(points),
    )


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
