"""The [track] table: which trackers show the run. It is no part of the experiment, whose digest does not depend on it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any

from pydantic import Field, field_validator

from fedmllm.config.base import FolderName, Table
from fedmllm.errors import ConfigError
from fedmllm.kinds import TrackerName


class TrackTable(Table):
    trackers: Annotated[tuple[TrackerName, ...], Field(alias="with", strict=False)] = ()
    """The trackers of Accelerate that show the run, one or several. TensorBoard comes with the extra `track`; the others are
    installed by their own names, and read addresses and keys from their own environment variables and files."""
    project: FolderName | None = None
    """The project, which MLflow and Aim call the experiment; by default `name`. The run is named after its directory."""
    folder: str | None = None
    """Where trackers that write files do so; by default the run's directory. TensorBoard's are in `RUN/tensorboard`, or with
    `folder` in `FOLDER/RUN`."""
    options: dict[TrackerName, dict[str, Any]] = Field(default_factory=dict)
    """For each tracker, further arguments of the function that begins a run: `{ wandb = { mode = "offline" } }` is for
    `wandb.init`."""

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, names: tuple[TrackerName, ...]) -> tuple[TrackerName, ...]:
        if len(set(names)) < len(names):
            raise ValueError("must name each tracker once")
        return names

    def check(self) -> None:
        """Raises ConfigError if a tracker, or Accelerate, is not installed."""
        for name in self.trackers:
            missing = next((module for module in ("accelerate", name) if find_spec(module) is None), None)
            if missing is not None:
                package = '"fedmllm[track]"' if missing in ("accelerate", "tensorboard") else missing.replace("_", "-")
                raise ConfigError(f"track.with: {name!r} needs {missing}, which is not installed; run pip install {package}.")
