"""What CUDA does otherwise computes the same: overlapped communication, grouped experts, rows padded for FP8, offload.

Run here on CPU, over gloo.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.family_checks import saved_tensors
from tests.helpers.launch import ranks
from tests.helpers.layouts import reference
from tests.helpers.models import make_qwen3

STEPS = 3
# Experts as on CUDA, whose forward pass calls no module that owns a weight; buckets of a layer or less.
KINDS: dict[str, dict[str, Any]] = {"dense": {}, "moe": {"grouped": True}}
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [{}],
    4: [{"pipeline": 2, "virtual_pipeline": 2}],
}


@pytest.mark.timeout(900)
def test_trains_the_same_model(tmp_path: Path) -> None:
    models = {kind: make_qwen3(tmp_path, kind) for kind in KINDS}
    expected = {kind: reference.train(path, STEPS) for kind, path in models.items()}
    for processes, layouts in LAYOUTS.items():
        jobs = [
            {
                "model": models[kind], "layout": layout | {"overlap": overlap}, "steps": STEPS, "bucket": 20_000,
                "row_multiple": 64, "offload": overlap, "trained": True,
                "out": f"{tmp_path}/{kind}-{processes}-{number}-{overlap}", **options,
            }
            for kind, options in KINDS.items() for number, layout in enumerate(layouts) for overlap in (False, True)
        ]  # fmt: skip
        file = tmp_path / f"jobs{processes}.json"
        file.write_text(json.dumps(jobs))
        ranks(processes, "-m", "tests.helpers.layouts.worker", str(file))
        for plain, overlapped in zip(jobs[::2], jobs[1::2], strict=True):
            found = json.loads((Path(overlapped["out"]) / "facts.json").read_text())
            losses, norms = expected[Path(plain["model"]).name]
            torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(losses), rtol=1e-4, atol=0)
            torch.testing.assert_close(torch.tensor(found["grad_norms"]), torch.tensor(norms), rtol=1e-4, atol=0)
            # The export follows the last step, whose weights no forward pass has gathered yet.
            one, two = (saved_tensors(Path(job["out"]) / "trained") for job in (plain, overlapped))
            assert one.keys() == two.keys()
            for name in one:
                torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6, msg=name)
