"""What a checkpoint is a checkpoint of, and what may differ when another attempt goes on from it."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from megatron_posttrain.checkpoint.hf_files import read_json
from megatron_posttrain.config.algorithms import ALGORITHMS
from megatron_posttrain.config.load import flat
from megatron_posttrain.config.schema import Config
from megatron_posttrain.data.template import keep_started, started
from megatron_posttrain.errors import UserError

STATE_FILE = "trainer_state.json"
ENDS = 1 << 20  # bytes of a weight file's beginning and end that its fingerprint takes
WRITTEN_BY_ANYONE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")  # of a config.json

# Keys, or sections of them, that another attempt may change. All other keys must stay.
WITHOUT_EFFECT = (
    "output", "parallel", "checkpoint", "logging", "training.micro_batch_size", "model.implementation",
    "model.recompute", "data.validation", "rollout.ranks", "rollout.tensor", "rollout.kv_cache_gib",
    "rollout.gpu_memory_fraction", "rollout.offload", "rollout.proof_tolerance", "rollout.proof_every",
    "rollout.max_num_seqs",
    "rollout.validation_samples", "teacher.offload", "teacher.cache",
    # Fingerprints tell whether other names are other weights and rows.
    "model.path", "model.tokenizer", "data.train", "data.columns", "data.cache",
)  # fmt: skip
PARAMETER_GROUPS = ("optimizer.decay", "optimizer.router_lr")  # what checkpoints hold optimizer states by
FROM_NOW_ON = (
    "optimizer", "algorithm", "critic.lr", "critic.warmup_steps", "rewards", "model.moe",
    "training.steps", "training.epochs", "training.validate_every", "training.patience", "training.skip_not_finite",
    "rollout.samples_per_prompt", "rollout.max_tokens", "rollout.temperature", "rollout.quantization",
    "rollout.repetitions", "rollout.ahead", "curriculum",
)  # fmt: skip
IN_RL = ("training.global_batch_size",)  # there it cuts a step's samples into updates, and moves no row


@dataclass(frozen=True)
class Origin:
    """What a run trains: its config, and fingerprints of its rows and of the weights that it starts from."""

    config: dict[str, Any]
    data: str
    model: str
    rows_per_step: int

    @classmethod
    def of(cls, config: Config, model: Path, data: str) -> Self:
        weights = "" if config.model.random_init else fingerprint_of_weights(model)
        plain = flat(config.model_dump(mode="json"))
        plain["command"] = config.command
        return cls(plain, data, fingerprint_of_config(model) + weights, config.rows_per_step)

    def state(self, step: int) -> dict[str, Any]:
        """What lies beside a checkpoint of step number `step`."""
        return {"step": step, "rows": step * self.rows_per_step, "started": started().isoformat()} | asdict(self)

    def changes(self, checkpoint: Path, state: dict[str, Any]) -> list[str]:
        """Settings that differ from those of `checkpoint` and hold from now on; UserError for those that may not. A
        checkpoint of a version that recorded no settings differs in nothing."""
        if "config" not in state:
            return []
        told, refused = [], []
        for key, before, now in self._differences(state["config"]):
            in_rl = key in IN_RL and ALGORITHMS[self.config["command"]].rows == "prompts"
            if (_covered(key, FROM_NOW_ON) and key not in PARAMETER_GROUPS) or in_rl:
                told.append(f"{key} {before} -> {now}")
            elif not _covered(key, WITHOUT_EFFECT):
                refused.append(f"{key}={_short(now)} differs from its {_short(before)}")
        if state["model"] != self.model:
            before = state["config"].get("model.path")
            refused.append(f"the weights or config of model.path={self.config['model.path']} differ from its {before}")
        if state["data"] != self.data and not any(part.startswith(("data.", "training.seed")) for part in refused):
            refused.append(
                f"the rows of data.train={_short(self.config['data.train'])}, as tokens, differ from its "
                f"{_short(state['config'].get('data.train'))}"
            )
        if refused:
            raise UserError(
                f"{checkpoint} cannot be gone on from, after {state['rows']} rows: {'; '.join(refused)}. "
                "Give what it was trained with, or another `output`, or checkpoint.resume=never to train anew here"
            )
        return told

    def _differences(self, config: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
        """Keys that both know: what another version's config had not, nobody can compare. A section that one of them
        has not (`lora: null`) is compared as a whole."""
        for key in dict.fromkeys([*self.config, *config]):
            before, now = _value(config, key), _value(self.config, key)
            if before != now and {} not in (before, now):
                yield key, before, now


def _value(config: dict[str, Any], key: str) -> Any:
    """A key's value, or the keys below it."""
    inside = {name: value for name, value in config.items() if name.startswith(f"{key}.")}
    return config.get(key, {name.removeprefix(f"{key}."): value for name, value in inside.items()})


def keep_date(config: Config) -> None:
    """Templates that write the date write that of the attempt which the next one goes on from; before rows are read."""
    states = sorted((config.output_dir / "checkpoints").glob(f"step_*/{STATE_FILE}"))
    for file in reversed(states if config.checkpoint.resume == "auto" else []):
        try:
            moment = json.loads(file.read_text()).get("started")
        except ValueError:  # damaged; told when it is to be loaded
            continue
        if moment is not None:
            keep_started(datetime.fromisoformat(moment))
        return


def _covered(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def fingerprint_of_config(directory: Path) -> str:
    """Of config.json without what every version of transformers writes anew."""
    config = {k: v for k, v in read_json(directory / "config.json").items() if k not in WRITTEN_BY_ANYONE}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint_of_weights(directory: Path) -> str:
    """Of name, size, beginning and end of every weight file: milliseconds a file, wherever and whenever it was copied.
    The beginning has the names, types and shapes of all tensors; training moves every tensor, those at the end too."""
    total = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        total.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            total.update(stream.read(ENDS))
            stream.seek(max(0, size - ENDS))
            total.update(stream.read(ENDS))
    return total.hexdigest()[:16]
