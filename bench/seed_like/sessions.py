"""SQLAlchemy's engine and sessions."""

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine


def engine(database_url: str) -> AsyncEngine:
    """Return an engine with as many connections as the gateway has by default."""
    url = database_url.replace("postgresql://", "postgresql+asyncpg://", 1)
    return create_async_engine(url, pool_size=10, max_overflow=0)


def sessions(of: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(of, expire_on_commit=False)
