"""Files that take longest come first, so that no process is left with one of them when the others are done."""

import pytest

LONGEST_FIRST = (
    "slurm", "layouts", "grpo", "lora", "transformer_engine", "resume", "rollout", "preferences", "not_finite",
    "launch", "uneven_pipeline", "gpu_path", "tool_training", "ppo", "families_layouts", "resume_changes", "evaluate",
    "failure", "checkpoints", "toy_algorithm", "convert", "optimization", "pipeline", "heads", "held_out",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
