"""Ways round defects of vLLM that need no engine to be shown; those that do are in rollout_checks.py."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_posttrain.rollout import vllm_fixes

NODES, ON_NODE = 8, 4


def test_nodes_are_counted_without_asking_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed import parallel_state

    asked: list[int] = []

    def in_the_same_node_as(group: Any, source: int) -> list[bool]:  # three collectives over all ranks
        asked.append(source)
        return [rank // ON_NODE == source // ON_NODE for rank in range(NODES * ON_NODE)]

    monkeypatch.setattr(parallel_state, "in_the_same_node_as", in_the_same_node_as)
    monkeypatch.setattr(torch.distributed, "get_process_group_ranks", lambda group: list(range(NODES * ON_NODE)))
    group = SimpleNamespace(world_size=NODES * ON_NODE)
    assert parallel_state._node_count(group) == NODES
    assert len(asked) == NODES, "vLLM no longer asks once a node: counted_nodes may go"
    with vllm_fixes.counted_nodes(ON_NODE):
        assert parallel_state._node_count(group) == NODES
    assert len(asked) == NODES


def test_shared_memory_of_two_jobs_has_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    # CPUWorker makes its name of this address, which is the same for any two jobs.
    assert '"env://"' in inspect.getsource(ExecutorWithExternalLauncher), "see private_shared_memory"
    monkeypatch.setenv("VLLM_DIST_IDENT", "//")
    communicator: Any = SimpleNamespace(unique_name="tp:0", ranks=[0, 1])

    def name(token: str) -> str:
        with vllm_fixes.private_shared_memory(token):
            return _CPUSHMDistributed.make_group_name(communicator)

    assert name("a") != name("b")
    assert _CPUSHMDistributed.make_group_name(communicator) == "//-tp:0-[0-1]-cpushm"


def test_experts_kernel_of_cpu_knows_nothing_of_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    stock = CPUUnquantizedExperts.apply
    stock = getattr(stock, "__wrapped__", stock)
    tree = ast.parse(textwrap.dedent(inspect.getsource(stock)))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert "expert_map" not in used, "vLLM's kernel looks at the map: map_experts may go"

    given: dict[str, Any] = {}
    monkeypatch.setattr(CPUUnquantizedExperts, "apply", lambda self, **arguments: given.update(arguments))
    vllm_fixes.map_experts()
    topk_ids = torch.tensor([[0, 5], [3, 6]], dtype=torch.int32)
    topk_weights = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    expert_map = torch.tensor([-1, -1, -1, -1, 0, 1, 2, 3])  # this rank has the last four of eight
    CPUUnquantizedExperts.apply(object(), topk_ids=topk_ids, topk_weights=topk_weights, expert_map=expert_map)
    assert given["topk_ids"].tolist() == [[0, 1], [0, 2]]  # all within this rank's
    assert given["topk_weights"].tolist() == [[0.0, 0.75], [0.0, 0.5]]
    assert given["expert_map"] is None
