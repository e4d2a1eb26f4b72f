"""The CPU platform: megatron-core's requests for CUDA are answered inside the scope, and torch is untouched outside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_posttrain.config.algorithms import SftConfig
from megatron_posttrain.errors import UserError
from megatron_posttrain.platform import describe, platform
from megatron_posttrain.platform.cuda import CudaPlatform
from megatron_posttrain.training import prepare
from tests.helpers.models import make_assets

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: CUDA needs no stand-ins")

NAMES = ("current_device", "Stream", "synchronize", "get_rng_state", "manual_seed", "_lazy_init")


def test_requests_for_cuda_are_answered_on_cpu() -> None:
    with platform().megatron():
        assert torch.cuda.current_device() == torch.device("cpu")
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.empty(2, device=torch.device("cuda", 3), pin_memory=True).device.type == "cpu"
        assert torch.ones(2).cuda().to("cuda").device.type == "cpu"
        assert torch.ones(2).type() == "torch.cuda.FloatTensor"
        assert torch.ones(2).type(torch.float64).dtype == torch.float64
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.synchronize()


def test_everything_is_undone_also_after_an_error_and_when_nested() -> None:
    before = {name: vars(torch.cuda).get(name) for name in NAMES} | {"gather": dist.all_gather}

    def fail_inside() -> None:
        with platform().megatron(), platform().megatron():
            assert vars(torch.cuda)["current_device"] is not before["current_device"]
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert {name: vars(torch.cuda).get(name) for name in NAMES} | {"gather": dist.all_gather} == before
    assert torch.ones(2).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def test_leaving_the_scope_inside_another_keeps_it() -> None:
    with platform().megatron():
        with platform().megatron():
            pass
        assert torch.zeros(2, device="cuda").device.type == "cpu"


def test_a_gpu_that_torch_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old driver makes is_available() False; the whole job would then crawl on the CPU, without a word."""
    answers = {"name": "NVIDIA H100 80GB HBM3", "driver_version": "550.54.15"}
    monkeypatch.setattr(describe, "_nvidia_smi", answers.get)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"H100 80GB HBM3 is there, but torch .* cannot use it \(driver 550\.54\.15\)"):
        prepare.refuse_unused_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    prepare.refuse_unused_gpu()


def test_every_training_command_looks_for_an_unused_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def found() -> None:
        raise UserError("a GPU is idle")

    monkeypatch.setattr(prepare, "refuse_unused_gpu", found)
    assets = make_assets(tmp_path)
    tree = {"model": {"path": str(assets / "model")}, "data": {"train": "none"}, "output": str(tmp_path / "run")}
    with pytest.raises(UserError, match="a GPU is idle"):
        prepare.prepare(SftConfig.model_validate(tree))


def test_cudnns_masked_attention_is_off_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backward pass gives NaN for some lengths, seen on an H100."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        CudaPlatform().initialize(0)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
