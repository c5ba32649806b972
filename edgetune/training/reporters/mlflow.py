"""MLflow, by default in a database of the run's own: `mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db`.

MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME name another place. Not its plain files: MLflow 3.13 refuses them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from edgetune.artifacts import Run
from edgetune.training.reporters.base import Installed

_CREATED = "edgetune.created"
"""The tag a run is found by when it is gone on with."""
_LONGEST = 500
"""Characters that every version of MLflow takes as a parameter."""


class Mlflow(Installed):
    """One MLflow run, gone on with when ours is. Uses a client of its own: no state is shared with other code."""

    name, package = "MLflow", "mlflow"

    def __init__(self, run: Run, step: int) -> None:
        mlflow: Any = import_module("mlflow")
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # its lines would cross ours
        self.entities: Any = import_module("mlflow.entities")
        place = run.path.resolve()
        own = not os.environ.get("MLFLOW_TRACKING_URI")
        self.client = mlflow.MlflowClient(
            tracking_uri=f"sqlite:///{place / 'mlflow.db'}" if own else os.environ["MLFLOW_TRACKING_URI"]
        )
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "edgetune")
        known = self.client.get_experiment_by_name(name)
        location = (place / "mlflow").as_uri() if own else None
        experiment = known.experiment_id if known else self.client.create_experiment(name, artifact_location=location)
        query = f"tags.`{_CREATED}` = '{run.created}'"
        found = self.client.search_runs([experiment], filter_string=query, max_results=1) if step else []
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        tags = {_CREATED: run.created, "edgetune.base": run.base_name, "edgetune.task": run.task}
        self.id = self.client.create_run(experiment, tags=tags, run_name=place.name).info.run_id
        params = [self.entities.Param(key, str(value)[:_LONGEST]) for key, value in run.settings.items()]
        self.client.log_batch(self.id, params=params)

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """The values at their step."""
        now = int(time.time() * 1000)
        # MLflow's names have no "@", as in recall@5.
        named = ((f"{split}/{name.replace('@', '_at_')}", float(value)) for name, value in values.items())
        self.client.log_batch(self.id, metrics=[self.entities.Metric(name, value, now, step) for name, value in named])

    def end(self, finished: bool) -> None:
        """Close it, as killed where it was stopped."""
        self.client.set_terminated(self.id, status="FINISHED" if finished else "KILLED")
