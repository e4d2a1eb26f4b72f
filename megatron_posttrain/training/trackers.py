"""Where figures go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow. One process of a job has them."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_posttrain.config.schema import Config
from megatron_posttrain.errors import UserError

RUNS = "trackers.json"  # in the output directory: what services call this run, so that another attempt goes on with it


class TensorBoard:
    def __init__(self, config: Config, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(config.output_dir / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Takes no second value of a step: of steps that are run again, the first attempt's stay."""

    def __init__(self, config: Config, runs: dict[str, str]) -> None:
        import wandb

        options: dict[str, Any] = {"name": config.output_dir.name, "dir": config.output, "resume": "allow"}
        options |= {"project": config.logging.wandb, "id": runs.get("wandb")}
        self._run = wandb.init(config=config.model_dump(mode="json"), **options)
        runs["wandb"] = self._run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """The config is an artifact: parameters could not change with another attempt."""

    def __init__(self, config: Config, runs: dict[str, str]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(config.logging.mlflow)
        run = mlflow.start_run(run_id=runs.get("mlflow"), run_name=config.output_dir.name)
        runs["mlflow"] = run.info.run_id
        mlflow.log_dict(config.model_dump(mode="json"), "config.json")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


SERVICES: dict[str, Callable[[Config, dict[str, str]], Any]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}


def tracker_problems(config: Config) -> Iterator[str]:
    """Services that the config names and this Python has no package for."""
    for name in SERVICES:
        value = getattr(config.logging, name)
        if value is not None and name not in sys.modules and importlib.util.find_spec(name) is None:
            yield f"logging.{name}={value} needs the package {name}: pip install {name}, or remove the key"


def open_trackers(config: Config, first_step: int) -> list[Any]:
    """Those that the config names. Raises UserError with what a service says against it."""
    file = config.output_dir / RUNS
    runs = json.loads(file.read_text()) if first_step and file.exists() else {}
    found: list[Any] = [TensorBoard(config, first_step)] if config.logging.tensorboard else []
    for name, service in SERVICES.items():
        if getattr(config.logging, name) is not None:
            try:
                found.append(service(config, runs))
            except Exception as error:  # of any kind: no account, no server, no such run
                raise UserError(f"logging.{name}={getattr(config.logging, name)}: {error}") from None
            file.write_text(json.dumps(runs))
    return found
