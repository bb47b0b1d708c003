"""Settings of the snapshotter."""

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from shared.settings import Port, ServiceSettings

MINUTES_MIN = 0.01
MINUTES_MAX = 24 * 60


class Settings(ServiceSettings):
    health_port: Port = Field(default=8083, description="Port of `/healthz`, `/readyz` and `/metrics`.")
    snapshot_enabled: bool = Field(
        default=True, description="Whether snapshots are taken; when false the service runs and does nothing."
    )
    snapshot_interval_minutes: Annotated[float, Field(ge=MINUTES_MIN, le=MINUTES_MAX)] = Field(
        default=5, description="Minutes between two slots; a fraction is allowed."
    )
    snapshot_shards: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=1, description="Into how many units of work a slot is divided among the replicas."
    )

    @property
    def interval(self) -> timedelta:
        return timedelta(minutes=self.snapshot_interval_minutes)
