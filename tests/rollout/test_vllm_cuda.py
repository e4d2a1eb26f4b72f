"""What only vLLM on CUDA does, sleep above all: options and what is done about its defects, with stand-ins."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_posttrain import rollout
from megatron_posttrain.rollout import vllm_fixes
from megatron_posttrain.rollout.engine import CUDA, RolloutEngine, Sampling
from megatron_posttrain.rollout.isolation import Isolation


class Driver:
    """cuMemMap and cuMemUnmap of one address each: unmapping what is not mapped is an invalid argument."""

    def __init__(self, room: int) -> None:
        self.mapped: set[int] = set()
        self.room, self.errors = room, 0

    def create_and_map(self, handle: tuple[int, int]) -> None:
        if len(self.mapped) == self.room:
            raise RuntimeError("out of memory")
        self.mapped.add(handle[1])

    def unmap_and_release(self, handle: tuple[int, int]) -> None:
        self.errors += handle[1] not in self.mapped
        self.mapped.discard(handle[1])


class Allocator:
    """CuMemAllocator as far as freeing goes: the callback looks the allocation up with pop, C++ then unmaps it."""

    def __init__(self, driver: Driver, asleep: bool) -> None:
        self.driver = driver
        self.pointer_to_data = {p: SimpleNamespace(handle=(0, p), is_asleep=asleep) for p in range(3)}
        if not asleep:
            driver.mapped |= set(self.pointer_to_data)

    def free_all(self) -> None:
        for pointer in list(self.pointer_to_data):
            self.driver.unmap_and_release(self.pointer_to_data.pop(pointer).handle)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver(room=1)
    module: Any = ModuleType("vllm.device_allocator.cumem")
    module.create_and_map = made.create_and_map
    module.CuMemAllocator = SimpleNamespace(get_instance=lambda: None)
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", module)
    return made


def test_what_sleeps_is_mapped_when_it_is_freed(driver: Driver) -> None:
    allocator = Allocator(driver, asleep=True)
    allocator.free_all()
    assert driver.errors == 3, "vLLM no longer needs the fix"
    allocator = Allocator(driver, asleep=True)
    driver.errors = 0
    vllm_fixes.map_when_freed(allocator)
    allocator.free_all()  # with room for one at a time
    assert (driver.errors, driver.mapped, allocator.pointer_to_data) == (0, set(), {})


def test_what_is_awake_is_freed_as_ever(driver: Driver) -> None:
    allocator = Allocator(driver, asleep=False)
    vllm_fixes.map_when_freed(allocator)
    allocator.free_all()
    assert (driver.errors, driver.mapped) == (0, set())


@pytest.mark.parametrize("sleeping", [True, False])
def test_closing_prepares_for_it(driver: Driver, monkeypatch: pytest.MonkeyPatch, sleeping: bool) -> None:
    calls: list[str] = []

    def record(name: str) -> Any:
        return lambda *unused: calls.append(name)

    monkeypatch.setattr(vllm_fixes, "map_when_freed", record("map"))
    core = SimpleNamespace(
        structured_output_manager=SimpleNamespace(clear_backend=record("clear")),
        model_executor=SimpleNamespace(shutdown=record("free")),
        scheduler=SimpleNamespace(shutdown=record("scheduler")),
    )
    engine = object.__new__(RolloutEngine)
    engine._cpu, engine._isolated = False, contextlib.nullcontext  # type: ignore[assignment]
    engine._llm = SimpleNamespace(
        llm_engine=SimpleNamespace(engine_core=SimpleNamespace(engine_core=core), is_sleeping=lambda: sleeping)
    )
    state: Any = ModuleType("vllm.distributed.parallel_state")
    state._WORLD, state.destroy_model_parallel = None, record("groups")
    distributed: Any = ModuleType("vllm.distributed")
    distributed.parallel_state = state
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", state)
    engine.close()
    assert calls == [*(["map"] if sleeping else []), "clear", "free", "scheduler", "groups"]


def test_sampling_needs_nothing_that_sleep_discards() -> None:
    """Penalties, thinking budgets and their like have state beside a request's own; a field is added after a look."""
    fields = {field.name for field in dataclasses.fields(Sampling)}
    known = {"n", "max_tokens", "temperature", "top_p", "top_k", "presence_penalty", "stop_token_ids"}
    assert fields == known | {"repetitions"}  # looked for by the scheduler, in a request's token ids
    with pytest.raises(TypeError, match="repetition_penalty"):
        Sampling(repetition_penalty=1.1)  # type: ignore[call-arg]


def test_flashinfer_compiles_nothing_at_its_first_call() -> None:
    """Its all-reduce, which vLLM prefers between tensor ranks, is made by nvcc and ninja outside of any try."""
    from vllm.config import CompilationConfig
    from vllm.engine.arg_utils import EngineArgs

    assert rollout._ENVIRONMENT["VLLM_ALLREDUCE_USE_FLASHINFER"] == "0"
    assert CUDA.keys() <= {field.name for field in dataclasses.fields(EngineArgs)}
    assert CompilationConfig(**CUDA["compilation_config"]).pass_config.fuse_allreduce_rms is False


def test_the_trainers_stream_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM makes one of its own the current one; its work ends before the trainer's goes on."""
    calls: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def synchronize(self) -> None:
            calls.append(f"wait for {self.name}")

    current = [Stream("trainer")]
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "get_rng_state": lambda: None,
        "current_stream": lambda: current[0],
        "set_stream": lambda stream: calls.append(f"set {stream.name}"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with Isolation()():
        current[0] = Stream("vllm")
    assert calls == ["wait for vllm", "set trainer"]
