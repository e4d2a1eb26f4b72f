"""Run as ranks by test_preferences.py: whole training commands one after the other in one job.

preference_worker.py JOBS.json: [[command, {config}], ...]
"""

from __future__ import annotations

from typing import Any

from megatron_posttrain.config.algorithms import ALGORITHMS
from tests.helpers.jobs import run_jobs


def run(job: tuple[str, dict[str, Any]]) -> None:
    row = ALGORITHMS[job[0]]
    assert row.load()(row.config.model_validate(job[1])) == 0


if __name__ == "__main__":
    run_jobs(run)
