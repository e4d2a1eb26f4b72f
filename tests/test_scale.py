"""Costs by the number of ranks as benchmarks/scale.py counts them: nothing grows with its square any more."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from benchmarks.scale import MODELS, costs, gloo_groups, roll_call_requests
from megatron_posttrain.parallel.layout import Layout
from tests.helpers.launch import ROOT


def test_megatron_core_makes_gloo_groups_only_where_it_is_told_to() -> None:
    layout = Layout(world_size=512, tensor=2, expert=8)
    assert gloo_groups(layout, made=True) != gloo_groups(layout, made=False) == []


def test_nodes_ask_as_often_each_however_many_they_are() -> None:
    few, many = roll_call_requests(8) / 8, roll_call_requests(64) / 64
    assert many < 1.5 * few + 5


@pytest.mark.parametrize("name", MODELS)
def test_goals(name: str) -> None:
    calls = {nodes: 30 * nodes for nodes in (64, 512)}
    at_512, at_4096 = costs(name, 512, calls), costs(name, 4096, calls)
    assert at_512.store_requests[1] * 100e-6 < 30
    assert at_512.open_files[1] < 512
    assert at_512.writers[1] == 512
    for field in ("store_requests", "failure_reads", "heartbeats"):
        assert getattr(at_4096, field)[1] <= 8 * 1.5 * getattr(at_512, field)[1]
    assert at_4096.save_gb[1] == pytest.approx(at_512.save_gb[1] / 8)
    assert at_4096.resume_tb[1] == at_512.resume_tb[1]


def test_a_rank_may_open_as_many_files_as_the_system_allows() -> None:
    code = (
        "import resource; from megatron_posttrain.parallel.network import raise_file_limit as r; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1])); r(); "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert int(done.stdout) == (65_536 if hard == resource.RLIM_INFINITY else min(65_536, hard))
