"""Lightning's metrics in Trackio, which has no Lightning logger of its own."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only


class TrackioLogger(Logger):
    """Metrics, images and captions of a run in Trackio: on this machine, or in a Space of Hugging Face.

    ``trackio show`` opens what is on this machine.

    Args:
        project: that the run belongs to.
        name: of the run. A run of this name in the project goes on; None makes up a new name.
        space_id: of the Space, such as ``user/space``; None keeps everything on this machine.
        options: further arguments of ``trackio.init``.

    Raises:
        ModuleNotFoundError: trackio is not installed.
    """

    def __init__(
        self,
        project: str = "balcap",
        name: str | None = None,
        space_id: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if find_spec("trackio") is None:
            raise ModuleNotFoundError("trackio is not installed: pip install trackio")
        self.project, self.space_id, self.options = project, space_id, options or {}
        self._name = name
        self._run: Any = None

    @property
    def name(self) -> str:
        """The project."""
        return self.project

    @property
    def version(self) -> str | None:
        """The run's name; None before the first metric where trackio makes it up."""
        return self._name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The ``trackio.Run``; a stand-in on other ranks. After `finalize` the same run goes on."""
        if self._run is None:
            import trackio

            options = {"resume": "allow", "embed": False, **self.options}
            self._run = trackio.init(self.project, name=self._name, space_id=self.space_id, **options)
            self._name = self._run.name
        return self._run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers at a step."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Add settings to the run's config."""
        self.experiment.config.update(vars(params) if isinstance(params, Namespace) else params or {})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send what waits, and end the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None
