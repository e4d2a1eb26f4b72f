"""Models that `plan --model` knows by name: shapes from their published configs, no weights or network needed."""

import difflib
import re
from pathlib import Path

from megatron_posttrain.errors import UserError
from megatron_posttrain.models.architecture import Architecture, MixtureOfExperts, MultiLatentAttention, Rope


def _qwen3(layers: int, hidden: int, heads: int, ffn: int, tied: bool) -> Architecture:
    return Architecture(
        "qwen3", layers, hidden, heads, 8, 128, ffn, 151936, 40960,
        rope=Rope(1e6), tied_embeddings=tied, qk_norm=True,
    )  # fmt: skip


def _qwen3_moe(layers: int, hidden: int, heads: int, expert_ffn: int) -> Architecture:
    return Architecture(
        "qwen3_moe", layers, hidden, heads, 4, 128, 0, 151936, 40960,
        rope=Rope(1e6), qk_norm=True, moe=MixtureOfExperts(128, 8, expert_ffn),
    )  # fmt: skip


def _llama3(layers: int, hidden: int, heads: int, ffn: int) -> Architecture:
    return Architecture(
        "llama", layers, hidden, heads, 8, 128, ffn, 128256, 131072, norm_epsilon=1e-5,
        rope=Rope(5e5, "llama3", 8.0, 8192),
    )  # fmt: skip


def _deepseek(heads: int, dense_layers: int, experts: int, vocab: int, groups: int) -> Architecture:
    moe = MixtureOfExperts(
        experts, 8, 2048, shared_ffn_size=2048, first_dense_layers=dense_layers, score_function="sigmoid",
        correction_bias=True, num_groups=groups, top_k_groups=4 if groups > 1 else 1, scaling_factor=2.5,
    )  # fmt: skip
    return Architecture(
        "deepseek_v3", 61, 7168, heads, heads, 128, 18432, vocab, 163840,
        rope=Rope(1e4, "yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
        moe=moe, mla=MultiLatentAttention(1536, 512, 128, 64, 128), num_mtp_layers=1,
    )  # fmt: skip


def _gpt_oss(layers: int, experts: int) -> Architecture:
    return Architecture(
        "gpt_oss", layers, 2880, 64, 8, 64, 0, 201088, 131072, norm_epsilon=1e-5,
        rope=Rope(15e4, "yarn", 32.0, 4096, truncate=False),
        qkv_bias=True, attention_output_bias=True, mlp_bias=True, attention_sinks=True,
        sliding_window=128, sliding_layers=tuple(range(0, layers, 2)), activation="gpt_oss_glu",
        moe=MixtureOfExperts(experts, 4, 2880, softmax_after_top_k=True, router_bias=True),
    )  # fmt: skip


KNOWN_MODELS: dict[str, Architecture] = {
    "Qwen3-0.6B": _qwen3(28, 1024, 16, 3072, True),
    "Qwen3-1.7B": _qwen3(28, 2048, 16, 6144, True),
    "Qwen3-4B": _qwen3(36, 2560, 32, 9728, True),
    "Qwen3-8B": _qwen3(36, 4096, 32, 12288, False),
    "Qwen3-14B": _qwen3(40, 5120, 40, 17408, False),
    "Qwen3-32B": _qwen3(64, 5120, 64, 25600, False),
    "Qwen3-30B-A3B": _qwen3_moe(48, 2048, 32, 768),
    "Qwen3-235B-A22B": _qwen3_moe(94, 4096, 64, 1536),
    "Llama-3-8B": _llama3(32, 4096, 32, 14336),
    "Llama-3-70B": _llama3(80, 8192, 64, 28672),
    "Llama-3.1-405B": _llama3(126, 16384, 128, 53248),
    "DeepSeek-V3": _deepseek(128, 3, 256, 129280, 8),
    "Kimi-K2": _deepseek(64, 1, 384, 163840, 1),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
}


# Words of published names that say how a model was trained or stored, not what it is.
VARIANTS = (
    "base instruct chat it hf thinking think preview 2507 0324 0528 0905 0711 fp8 bf16 fp16 fp4 nvfp4 mxfp4 awq gptq "
    "int4 int8 4bit 8bit bnb unsloth gguf mlx dynamic block w4a16 w8a8 g128 exp"
)
# Published names of other releases with the same shapes, by their first words.
ALIASES = {
    "qwen3 coder 30b a3b": "Qwen3-30B-A3B",
    "llama 3 1 8b": "Llama-3-8B", "llama 3 1 70b": "Llama-3-70B", "llama 3 3 70b": "Llama-3-70B",
    "llama 3 405b": "Llama-3.1-405B",
    "deepseek r1": "DeepSeek-V3", "deepseek v3 1": "DeepSeek-V3", "deepseek v3 1 terminus": "DeepSeek-V3",
    "deepseek r1 distill llama 8b": "Llama-3-8B", "deepseek r1 distill llama 70b": "Llama-3-70B",
    "deepseek r1 qwen3 8b": "Qwen3-8B",
}  # fmt: skip
ORGANISATIONS = {
    "Qwen": "Qwen", "Llama": "meta-llama", "DeepSeek": "deepseek-ai", "Kimi": "moonshotai", "gpt": "openai",
}  # fmt: skip
RELEASES = {"Llama-3-8B": "Llama-3.1-8B", "Llama-3-70B": "Llama-3.1-70B"}  # whose positions the shapes have


def canonical(name: str) -> str:
    """The words of a published name without organisation, separators and variants:
    `meta-llama/Meta-Llama-3.1-8B-Instruct` -> `llama 3 1 8b`."""
    name = name.rstrip("/").rsplit("/", 1)[-1].lower().removeprefix("meta-")
    name = re.sub(r"^llama-?(\d)", r"llama \1", name)
    return " ".join(word for word in re.split(r"[^a-z0-9]+", name) if word and word not in VARIANTS.split())


def published_name(name: str) -> str:
    """The hub id of a model that is known by `name`."""
    return f"{ORGANISATIONS[re.split('[-0-9]', name)[0]]}/{RELEASES.get(name, name)}"


def load_architecture(model: str) -> tuple[str, Architecture]:
    """(name, architecture) of a known name, or of a local Hugging Face directory or config.json.

    Raises UserError for an unknown name, with the nearest known one, and for a config that cannot be read.
    """
    path = Path(model)
    if path.exists():
        from megatron_posttrain.checkpoint.hf_files import read_json
        from megatron_posttrain.models.registry import architecture_from_hf

        if path.is_dir() and not (path / "config.json").exists():
            raise UserError(f"--model {model}: a directory without config.json")
        return str(path), architecture_from_hf(read_json(path / "config.json" if path.is_dir() else path))
    by_key = {canonical(name): name for name in KNOWN_MODELS} | ALIASES
    if (key := canonical(model)) not in by_key:
        close = difflib.get_close_matches(key, by_key, n=1, cutoff=0.6)
        hint = f"; did you mean '{by_key[close[0]]}'?" if close else ""
        raise UserError(
            f"--model {model}: neither a known name nor a path with a config.json{hint} "
            f"(known: {', '.join(KNOWN_MODELS)}, with or without organisation and -Base, -Instruct and the like)"
        )
    return by_key[key], KNOWN_MODELS[by_key[key]]
