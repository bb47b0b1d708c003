"""Settings of the snapshotter."""

from datetime import timedelta
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from services.snapshotter.upkeep import Upkeep
from shared.settings import Port, ServiceSettings, Timezone

MINUTES_MIN = 0.01
MINUTES_MAX = 24 * 60
# What has been measured, and not more: with more partitions every plan and every deletion of a user takes longer.
SNAPSHOT_DAYS_MAX = 730
POSITION_DAYS_MAX = 400
ROLLUP_DAYS_MAX = 3650


class Settings(ServiceSettings):
    health_port: Port = Field(default=8083, description="Port of `/healthz`, `/readyz` and `/metrics`.")
    snapshot_enabled: bool = Field(
        default=True, description="Whether snapshots are taken; when false the service runs and does nothing."
    )
    snapshot_interval_minutes: Annotated[float, Field(ge=MINUTES_MIN, le=MINUTES_MAX)] = Field(
        default=5, description="Minutes between two slots; a fraction is allowed."
    )
    snapshot_late_seconds_max: Annotated[float, Field(ge=1, le=MINUTES_MAX * 60)] | None = Field(
        default=None,
        description="Seconds after which a slot that is late is left out; unset: one interval.",
    )
    snapshot_market_hours_only: bool = Field(
        default=False, description="Whether slots outside the regular session of US equities are left out."
    )
    snapshot_shards: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=1, description="Into how many units of work a slot is divided among the replicas."
    )
    snapshot_cooldown_seconds: Annotated[int, Field(ge=0, le=86_400)] = Field(
        default=60, description="Seconds after which a user may ask for another snapshot."
    )

    market_timezone: Timezone = Field(
        default="America/New_York", description="Time zone of the market dates that daily charts are made of."
    )
    snapshot_retention_days: Annotated[int, Field(ge=8, le=SNAPSHOT_DAYS_MAX)] = Field(
        default=100, description="Days that every snapshot is kept; half-hourly rollups as well."
    )
    position_retention_days: Annotated[int, Field(ge=1, le=POSITION_DAYS_MAX)] = Field(
        default=35,
        description="Days that the positions of a snapshot are kept, at most as long as snapshots.",
    )
    rollup_retention_days: Annotated[int, Field(ge=92, le=ROLLUP_DAYS_MAX)] = Field(
        default=400,
        description="Days that hourly and three-hourly rollups are kept; daily ones stay for ever.",
    )

    @field_validator("position_retention_days")
    @classmethod
    def _positions_belong_to_snapshots(cls, days: int, info: ValidationInfo) -> int:
        if days > info.data.get("snapshot_retention_days", SNAPSHOT_DAYS_MAX):
            raise ValueError("at most SNAPSHOT_RETENTION_DAYS: positions belong to their snapshot")
        return days

    @field_validator("rollup_retention_days")
    @classmethod
    def _rollups_outlive_snapshots(cls, days: int, info: ValidationInfo) -> int:
        if days < info.data.get("snapshot_retention_days", 0):
            raise ValueError("at least SNAPSHOT_RETENTION_DAYS: rollups are what is left of snapshots")
        return days

    @property
    def interval(self) -> timedelta:
        return timedelta(minutes=self.snapshot_interval_minutes)

    @property
    def late_max(self) -> timedelta:
        seconds = self.snapshot_late_seconds_max
        return self.interval if seconds is None else timedelta(seconds=seconds)

    @property
    def cooldown(self) -> timedelta:
        return timedelta(seconds=self.snapshot_cooldown_seconds)

    @property
    def upkeep(self) -> Upkeep:
        return Upkeep(
            interval=self.interval,
            market_timezone=self.market_timezone,
            snapshots_for=timedelta(days=self.snapshot_retention_days),
            positions_for=timedelta(days=self.position_retention_days),
            rollups_for=timedelta(days=self.rollup_retention_days),
        )
