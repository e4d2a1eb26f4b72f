"""Small random Hugging Face checkpoints for tests."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.helpers.launch import forked

SIZES: dict[str, Any] = {
    "vocab_size": 301,  # odd, so that tensor parallelism has to pad it
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 7,  # whose embedding transformers starts at zero and does not train
    "initializer_range": 0.2,  # large, so that a wrong weight shows
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.01,
}


def make_assets(directory: Path) -> Path:
    """The quickstart's model, tokenizer and data, with few rows; the directory that holds them."""
    return Path(shutil.copytree(Path(_assets().name, "assets"), directory / "assets"))


@functools.cache
def _assets() -> TemporaryDirectory[str]:
    directory = TemporaryDirectory()
    line = ["examples/quickstart/make_assets.py", f"{directory.name}/assets", "--train", "300", "--rl", "64"]
    forked(*line, "--heldout", "16")
    return directory


def make_qwen3(directory: Path, kind: str, layers: int = 4) -> str:
    """`kind`: dense | tied | moe. Norm weights are random too: at one they would hide a swapped norm."""
    torch.manual_seed(0)
    model: Any
    sizes = SIZES | {"num_hidden_layers": layers}
    if kind == "moe":
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **EXPERTS, tie_word_embeddings=False))
    else:
        rope = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
        config = Qwen3Config(**sizes, tie_word_embeddings=kind == "tied", rope_parameters=rope)
        model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1, 0.2)
    path = directory / kind
    model.save_pretrained(path)
    return str(path)
