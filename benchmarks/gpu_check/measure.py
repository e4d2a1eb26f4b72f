"""How fast the parts are: matrix products, one layer, cross-entropy, the optimizer, refit."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check import subjects
from benchmarks.gpu_check.harness import Check, Facts, Setting, Skip, seconds_of
from megatron_posttrain.checkpoint.hf import HfReader, check_directory
from megatron_posttrain.checkpoint.load import load_hf
from megatron_posttrain.config.schema import OptimizerConfig
from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.models.build import build_model
from megatron_posttrain.models.sharded import Exporter
from megatron_posttrain.planning.flops import attention_dims, attention_pairs, layer_weights
from megatron_posttrain.planning.known_models import KNOWN_MODELS
from megatron_posttrain.platform import platform
from megatron_posttrain.platform.cuda import fp8_recipes
from megatron_posttrain.training.optimizer import make_optimizer, overlaps, wrap_for_data_parallel
from megatron_posttrain.training.token_logprobs import token_logprobs

# Read and written a parameter by AdamW with fp32 main weights: main weight, two moments (read and written),
# gradient (read), bf16 weight (written).
OPTIMIZER_BYTES = 3 * 8 + 4 + 2
MODELS = ("Qwen3-8B", "Qwen3-32B", "Qwen3-30B-A3B")
LENGTHS = (4096, 8192)


@functools.cache
def matmul_tflops(toy: bool) -> float:
    """bf16, square, measured here: what the shares below are of."""
    n = 128 if toy else 8192
    a, b = (torch.randn(n, n, device=platform().device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / seconds_of(lambda: a @ b, toy) / 1e12


@functools.cache
def copy_gb_per_second(toy: bool) -> float:
    """Device memory to device memory, bytes read plus bytes written."""
    a = torch.zeros((1 << 20) if toy else (1 << 32), dtype=torch.uint8, device=platform().device)
    b = torch.empty_like(a)
    return 2 * a.numel() / seconds_of(lambda: b.copy_(a), toy) / 1e9


def peaks(setting: Setting) -> Facts:
    return {"matmul_tflops": matmul_tflops(setting.toy), "copy_gb_per_second": copy_gb_per_second(setting.toy)}


@dataclass
class Layer:
    """One transformer layer in the data parallel wrapper, so that gradients end in fp32 as in training."""

    chunk: Any
    wrapped: Any
    config: Any

    @classmethod
    def make(cls, arch: Architecture, implementation: str, fp8: str | None) -> Layer:
        of = subjects.config(implementation, fp8=fp8)
        modules, model_config = build_model(arch, subjects.groups().layout, of.model, of.precision)
        with platform().megatron():
            wrapped = wrap_for_data_parallel(modules, model_config, overlap=overlaps(None))[0]
        wrapped.zero_grad_buffer()
        return cls(modules[0], wrapped, model_config)

    def step(self, length: int) -> Callable[[], None]:
        """Forward and backward of one sequence."""
        from megatron.core.packed_seq_params import PackedSeqParams

        device = platform().device
        bounds = torch.tensor([0, length], dtype=torch.int32, device=device)
        packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=length, max_seqlen_kv=length)
        hidden = self.config.hidden_size
        x = torch.randn(length, 1, hidden, device=device, dtype=torch.bfloat16).requires_grad_()
        gradient = torch.randn_like(x)
        with platform().megatron():
            rotary = self.chunk.rotary_pos_emb(length, packed_seq=True)

        def work() -> None:
            x.grad = None
            self.chunk.set_is_first_microbatch()  # FP8 weights are made anew, as in every step
            with platform().megatron(), self.wrapped.no_sync():
                out = self.chunk.decoder(x, None, rotary_pos_emb=rotary, packed_seq_params=packed)
                torch.autograd.backward(out[0] if isinstance(out, tuple) else out, gradient)

        return work


def single_layer(name: str, toy: bool) -> Architecture:
    if toy:
        return subjects.shrunk(name, 64, layers=1)
    return replace(KNOWN_MODELS[name], num_layers=1, vocab_size=1024)


def layer_measure(name: str, length: int, implementation: str, fp8: str | None) -> Check:
    def measure(setting: Setting) -> Facts:
        if implementation == "transformer_engine":
            subjects.need_transformer_engine()
        if fp8 is not None and fp8 not in fp8_recipes(capability := torch.cuda.get_device_capability()):
            raise Skip(f"{fp8} does not run on compute capability {capability[0]}.{capability[1]}")
        arch, n = single_layer(name, setting.toy), 64 if setting.toy else length
        subjects.groups()
        seconds = seconds_of(Layer.make(arch, implementation, fp8).step(n), setting.toy)
        attention = 2 * attention_pairs([n]) * sum(attention_dims(arch))
        tflops = 3 * (2 * n * layer_weights(arch, 0) + attention) / seconds / 1e12
        share = tflops / matmul_tflops(setting.toy)
        return {"milliseconds": 1e3 * seconds, "tflops": tflops, "share_of_bf16_matmul": share, "tokens": n}

    return measure


def cross_entropy(setting: Setting) -> Facts:
    """Log-probs of labels and their gradient; three passes over the logits are the least that has to move."""
    tokens, vocabulary = (64, 512) if setting.toy else (8192, 151936)
    device, group = platform().device, subjects.groups().tensor
    logits = torch.randn(tokens, vocabulary, device=device, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device=device)

    def work() -> None:
        logits.grad = None
        token_logprobs(logits, labels, vocabulary, group)[0].sum().backward()

    seconds = seconds_of(work, setting.toy)
    rate = 3 * 2 * tokens * vocabulary / seconds / 1e9
    share = rate / copy_gb_per_second(setting.toy)
    return {"milliseconds": 1e3 * seconds, "gb_per_second": rate, "share_of_copy": share}


def optimizer_step(setting: Setting) -> Facts:
    """One AdamW step, gradient norm included, of a layer of Qwen3-8B."""
    subjects.groups()
    layer = Layer.make(single_layer("Qwen3-8B", setting.toy), "auto", None)
    with platform().megatron():
        optimizer = make_optimizer([layer.wrapped], layer.config, OptimizerConfig(), overlap=overlaps(None))

        def work() -> None:
            for parameter in layer.chunk.parameters():
                parameter.main_grad.fill_(1e-3)
            optimizer.step()

        seconds = seconds_of(work, setting.toy)
    count = sum(p.numel() for p in layer.chunk.parameters())
    rate = (OPTIMIZER_BYTES + 4) * count / seconds / 1e9  # plus the gradients' filling
    share = rate / copy_gb_per_second(setting.toy)
    return {"milliseconds": 1e3 * seconds, "parameters": count, "gb_per_second": rate, "share_of_copy": share}


def export_stream(setting: Setting) -> Facts:
    """The trainer's side of a refit: all tensors in Hugging Face's form, copied once, without an engine."""
    arch = single_layer("Qwen3-30B-A3B", setting.toy)
    of, found = subjects.config("auto"), subjects.groups()
    modules, _ = build_model(arch, found.layout, of.model, of.precision)
    exporter = Exporter(modules, arch, found)
    count = sum(p.numel() * p.element_size() for p in modules[0].parameters())

    def work() -> None:
        for _, tensor in exporter.hf_tensors():
            tensor.clone()

    return _rate(2 * count, seconds_of(work, setting.toy), setting)


def refit(setting: Setting) -> Facts:
    """Trainer to vLLM in the same process, weights of the directory given with --model."""
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vLLM is not installed")
    if setting.model is None:
        raise Skip("no --model DIR: a Hugging Face directory that fits twice on the device")
    from megatron_posttrain.rollout.engine import RolloutEngine
    from megatron_posttrain.rollout.refit import Refit

    arch = check_directory(setting.model)[1]
    of, found = subjects.config("auto"), subjects.groups()
    modules, _ = build_model(arch, found.layout, of.model, of.precision)
    load_hf(modules, arch, HfReader(setting.model), found)
    exporter = Exporter(modules, arch, found)
    engine = RolloutEngine(setting.model, dtype=torch.bfloat16, max_model_len=512, gpu_memory_utilization=0.45)
    update = Refit(engine)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from exporter.hf_tensors()

    versions = iter(range(1, 1000))
    seconds = seconds_of(lambda: update.update(tensors(), next(versions)), setting.toy)
    engine.close()
    return _rate(2 * sum(p.numel() * p.element_size() for p in modules[0].parameters()), seconds, setting)


def _rate(moved: int, seconds: float, setting: Setting) -> Facts:
    rate = moved / seconds / 1e9
    return {"seconds": seconds, "gb_per_second": rate, "share_of_copy": rate / copy_gb_per_second(setting.toy)}


def _layers() -> Iterator[tuple[str, Check]]:
    kinds = (("torch", None), ("transformer_engine", None), ("transformer_engine", "tensorwise"))
    for name in MODELS:
        for length in LENGTHS:
            for implementation, fp8 in (*kinds, ("transformer_engine", "blockwise")):
                label = f"layer {name} {length} {implementation} {fp8 or 'bf16'}"
                yield label, layer_measure(name, length, implementation, fp8)


MEASURES: list[tuple[str, Check]] = [
    ("peaks", peaks),
    *_layers(),
    ("cross-entropy 8k x 151,936", cross_entropy),
    ("optimizer step", optimizer_step),
    ("export for refit", export_stream),
    ("refit into vLLM", refit),
]
