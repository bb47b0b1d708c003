"""Snapshots of all users, one after the other, a commit for each."""

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from bench.seed_like.models import PortfolioSnapshot, PositionSnapshot, User
from bench.seed_like.portfolio_service import valued_portfolio


class SnapshotService:
    def __init__(self, sessions: async_sessionmaker[AsyncSession]) -> None:
        self._sessions = sessions

    async def create_portfolio_snapshot(self, session: AsyncSession, user: User, at: datetime) -> None:
        """Store the user's portfolio and its positions, and commit."""
        portfolio = await valued_portfolio(session, user)
        session.add(
            PortfolioSnapshot(
                user_id=user.id,
                total_value=portfolio.total_value,
                cash_balance=user.cash_balance,
                investment_value=portfolio.investment_value,
                timestamp=at,
                positions=[
                    PositionSnapshot(
                        ticker=valued.position.ticker,
                        shares=valued.position.shares,
                        cost_basis=valued.position.cost_basis,
                        current_value=valued.current_value,
                        price_per_share=valued.price.price,
                    )
                    for valued in portfolio.positions
                ],
            )
        )
        await session.commit()

    async def create_snapshots_for_all_users(self, at: datetime, *, users_max: int | None = None) -> int:
        """Store a snapshot of every active user, of the first `users_max` when given; return how many."""
        async with self._sessions() as session:
            users = (
                await session.scalars(select(User).where(User.is_active).order_by(User.id).limit(users_max))
            ).all()
            for user in users:
                await self.create_portfolio_snapshot(session, user, at)
            return len(users)
