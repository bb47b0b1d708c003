"""The seed's tables, word for word, and those that they rest on."""

from datetime import datetime
from decimal import Decimal

from sqlalchemy import BigInteger, ForeignKey, Identity, Index, Numeric, Text, UniqueConstraint
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

Money = Numeric(18, 2)
Price = Numeric(15, 4)
Shares = Numeric(20, 9)
Instant = TIMESTAMP(timezone=True)


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    subject: Mapped[str] = mapped_column(Text, unique=True)
    cash_balance: Mapped[Decimal] = mapped_column(Money)
    is_active: Mapped[bool]


class Position(Base):
    __tablename__ = "positions"
    __table_args__ = (UniqueConstraint("user_id", "ticker"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    user_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("users.id", ondelete="CASCADE"))
    ticker: Mapped[str] = mapped_column(Text)
    shares: Mapped[Decimal] = mapped_column(Shares)
    cost_basis: Mapped[Decimal] = mapped_column(Money)


class AssetPrice(Base):
    __tablename__ = "asset_prices"
    __table_args__ = (Index("asset_prices_updated_at_idx", "updated_at"),)

    symbol: Mapped[str] = mapped_column(Text, primary_key=True)
    price: Mapped[Decimal] = mapped_column(Price)
    updated_at: Mapped[datetime] = mapped_column(Instant)


class PortfolioSnapshot(Base):
    __tablename__ = "portfolio_snapshots"
    __table_args__ = (UniqueConstraint("user_id", "timestamp"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    user_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("users.id", ondelete="CASCADE"))
    total_value: Mapped[Decimal] = mapped_column(Money)
    cash_balance: Mapped[Decimal] = mapped_column(Money)
    investment_value: Mapped[Decimal] = mapped_column(Money)
    timestamp: Mapped[datetime] = mapped_column(Instant)
    positions: Mapped[list["PositionSnapshot"]] = relationship(lazy="raise", passive_deletes=True)


class PositionSnapshot(Base):
    __tablename__ = "position_snapshots"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    portfolio_snapshot_id: Mapped[int] = mapped_column(
        BigInteger, ForeignKey("portfolio_snapshots.id", ondelete="CASCADE"), index=True
    )
    ticker: Mapped[str] = mapped_column(Text)
    shares: Mapped[Decimal] = mapped_column(Shares)
    cost_basis: Mapped[Decimal] = mapped_column(Money)
    current_value: Mapped[Decimal] = mapped_column(Money)
    price_per_share: Mapped[Decimal] = mapped_column(Price)
