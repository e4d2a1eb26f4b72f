"""lm-evaluation-harness, where it is installed: its own tasks and figures, on a directory that a run left."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.platform import platform


def evaluate_with_harness(
    model: str, tasks: list[str], directory: str | None, output: Path, dtype: Any, limit: int | None, seed: int
) -> str:
    """Its table of `tasks`, through transformers, with the model's chat template where it has one.

    Nothing is fetched: what a task reads must be local, as with `dataset_path: json` and `data_files` in a task's YAML
    of `directory`. Writes OUTPUT/lm_eval.json: figures, versions, samples.

    Raises:
        UserError: it is not installed, does not know a task, or a task's data are not there.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise UserError(f"--lm-eval: {error}; install it: pip install 'lm-eval[hf]==0.4.13'") from None
    manager = TaskManager(include_path=directory)
    for task in tasks:
        if task not in manager.all_tasks:
            raise UserError(f"--lm-eval {task}: no task of that name{nearest(task, manager.all_tasks)}")
    harness = HFLM(model, dtype=str(dtype).removeprefix("torch."), device=platform().name, batch_size=8)
    template = harness.tokenizer.chat_template is not None
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        found: Any = simple_evaluate(
            harness, tasks=list[Any](tasks), limit=limit, task_manager=manager, apply_chat_template=template, **seeds
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(f"--lm-eval {','.join(tasks)}: a task's data are not on this machine: {error}") from None
    output.mkdir(parents=True, exist_ok=True)
    (output / "lm_eval.json").write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    return str(make_table(found))
