"""What a run leaves in its output directory, and the line that a person reads."""

import json
import math
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from megatron_posttrain.config.load import to_yaml
from megatron_posttrain.config.schema import Config
from megatron_posttrain.platform.describe import describe_environment
from megatron_posttrain.training.finite import anywhere
from megatron_posttrain.training.heartbeat import Heartbeat, last_words
from megatron_posttrain.training.process import say
from megatron_posttrain.training.trackers import open_trackers

STOP_FILE = ".stop"


def beats_of(config: Config, rank: int, trainers: int) -> tuple[Path, int, int]:
    """Where a job's heartbeats are, this rank's number among all, and how many there are."""
    return config.output_dir / "heartbeats", rank, trainers + config.rollout_ranks


class Record:
    """Metrics, progress lines, and requests to stop. Rank 0 writes; every rank may call. A stop is requested by SIGTERM
    or SIGUSR1 to any rank, or by a file `.stop` in the output directory."""

    def __init__(self, config: Config, total_steps: int, first_step: int) -> None:
        self.config, self.total_steps = config, total_steps
        self.directory = config.output_dir
        self.is_main = dist.get_rank() == 0
        self._stop = False
        self._started = time.perf_counter()
        self._first_step = first_step
        self.current_step = first_step + 1  # in work, from 1
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        self._metrics: Any = None
        self._trackers: list[Any] = []
        if self.is_main:
            self._open(first_step)
        self._beats = beats_of(config, dist.get_rank(), dist.get_world_size())
        self._heartbeat = Heartbeat(*self._beats, first_step + 1, hang_seconds=config.logging.hang_seconds)
        dist.barrier()
        self._heartbeat.start()
        if first_step:
            say(f"resumed after step {first_step}")

    def _open(self, first_step: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / STOP_FILE).unlink(missing_ok=True)
        (self.directory / "config.yaml").write_text(to_yaml(self.config))
        path = self.directory / "metrics.jsonl"
        # Steps after the checkpoint that is resumed from are run again: their lines go.
        lines = path.read_text().splitlines() if first_step and path.exists() else []
        kept = [f"{line}\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= first_step]
        path.write_text("".join(kept))
        self._metrics = path.open("a", buffering=1)
        self._trackers = open_trackers(self.config, first_step)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def describe(self, **facts: str) -> None:
        """Into `environment.json`: these, and what this attempt runs on; `report` shows it."""
        if self.is_main:
            ranks = dist.get_world_size() + self.config.rollout_ranks
            found = {"command": self.config.command} | facts | {"ranks": ranks} | describe_environment()
            (self.directory / "environment.json").write_text(json.dumps(found, indent=1) + "\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One object a step; a progress line every `logging.every` steps."""
        self.current_step = step + 1
        self._heartbeat.step(min(step + 1, self.total_steps))
        if not self.is_main:
            return
        # JSON has no NaN: a figure that is not finite is null.
        kept = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._metrics.write(json.dumps({"step": step} | kept) + "\n")
        for tracker in self._trackers:
            tracker.log(step, {name: value for name, value in kept.items() if value is not None})
        if step % self.config.logging.every == 0 or step == self.total_steps:
            say(self._line(step, metrics))

    def _line(self, step: int, metrics: dict[str, float]) -> str:
        done = step - self._first_step
        left = (time.perf_counter() - self._started) / max(1, done) * (self.total_steps - step)
        names = {"reward": ".3f", "loss": ".4f", "validation_loss": ".4f", "validation_accuracy": ".3f"}
        names |= {"grad_norm": ".3f", "response_length": ".1f", "truncated_fraction": ".0%", "equal_fraction": ".0%"}
        shown = [f"{n.replace('_', ' ')} {metrics[n]:{f}}" for n, f in names.items() if n in metrics]
        if "learning_rate" in metrics:
            shown.append(f"lr {metrics['learning_rate']:.2e}")
        if "tokens_per_second" in metrics:
            shown.append(f"{metrics['tokens_per_second']:,.0f} tok/s")
        shown.append(f"{metrics['step_seconds']:.2f} s")
        line = f"step {step}/{self.total_steps}  " + "  ".join(shown) + f"  left {timedelta(seconds=round(left))}"
        # The gradient itself may have a router's balancing loss
        if "reward" not in metrics or metrics.get("loss") != 0:
            return line
        if metrics.get("masked_fraction") == 1:
            return f"{line}  (nothing to learn: every sample is masked)"
        equal = metrics.get("grad_norm") == 0 or metrics.get("equal_fraction") == 1
        return line + ("  (nothing to learn: equal rewards within each prompt)" if equal else "")

    def stop_requested(self, *, also: bool = False) -> bool:
        """Collective: whether any rank was asked to stop, or has a reason of its own: `also`."""
        return anywhere(also or self._stop or (self.is_main and (self.directory / STOP_FILE).exists()))

    def close(self, error: BaseException | None = None) -> None:
        """`error`: why the run ends before its time."""
        if isinstance(error, RuntimeError) and self._beats[2] > 1:
            print(last_words(*self._beats), flush=True)
        self._heartbeat.stop()
        if self._metrics is not None:
            self._metrics.close()
        for tracker in self._trackers:
            tracker.close(error is not None)
