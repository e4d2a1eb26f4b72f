"""What the families share: reading a config, and the tables of Llama-like blocks."""

from collections.abc import Sequence
from typing import Any

from megatron_posttrain.errors import UserError, nearest
from megatron_posttrain.models.architecture import Architecture, HfConfig, MixtureOfExperts, Rope
from megatron_posttrain.models.disk_layout import Fusion
from megatron_posttrain.models.weights import QKV, GatedMLP, Mapping, Replicated, RowParallel, Vocabulary, on

LAYER = "decoder.layers.*."
HF_LAYER = "model.layers.*."

# Experts as most families name them, fused as transformers 5 holds them
EXPERTS = f"{HF_LAYER}mlp.experts."
EXPERT_FUSIONS = (
    Fusion(f"{EXPERTS}gate_up_proj", (f"{EXPERTS}*.gate_proj.weight", f"{EXPERTS}*.up_proj.weight")),
    Fusion(f"{EXPERTS}down_proj", (f"{EXPERTS}*.down_proj.weight",)),
)

Names = tuple[str, str, str]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# Fields of `Architecture` -> of a config
FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}

# Fields of `Rope` by `rope_type`; a config calls them the same
ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
}
ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "finetuned",
}  # fmt: skip
OLD_NAMES = {"type": "rope_type"}  # of rope_scaling -> of rope_parameters
SCORE = "score.weight"  # of a model `ForSequenceClassification`


def need(config: HfConfig, *keys: str) -> Any:
    """The value of the first of `keys` (one field, by its old and new names) that the config has."""
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    raise UserError(f"config.json lacks '{keys[0]}'{nearest(keys[0], config)}")


def require(config: HfConfig, key: str, allowed: Sequence[Any], default: Any) -> None:
    """Refuses a config whose `key` asks for something that no model of ours does."""
    if (found := config.get(key, default)) not in allowed:
        choices = " or ".join(repr(choice) for choice in allowed)
        raise UserError(f"config.json: {key} is {found!r}; supported: {choices}")


def rope(config: HfConfig, default_base: float = 10_000.0) -> Rope:
    """Either style: `rope_theta` and `rope_scaling`, or `rope_parameters` of transformers 5."""
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    if new and any(new.get(key, new.get(OLD_NAMES.get(key, ""))) != value for key, value in old.items()):
        raise UserError("config.json: rope_scaling and rope_parameters differ; keep the one that is meant")
    values = new or old
    kind = values.get("rope_type", values.get("type", "default"))
    base = float(values.get("rope_theta") or config.get("rope_theta") or default_base)
    if kind not in ROPE_SCALINGS:
        raise UserError(f"config.json: rope type {kind!r}; supported: {', '.join(ROPE_SCALINGS)}")
    if values.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("config.json: partial_rotary_factor other than 1.0 is not supported")
    known = ROPE_KEYS.union(*ROPE_SCALINGS.values())
    if unknown := [key for key in values if key not in known]:
        raise UserError(f"config.json: {unknown[0]} in the rotary section is not supported{nearest(unknown[0], known)}")
    if kind == "default":
        return Rope(base=base)
    longest = need(config, "max_position_embeddings")
    original = values.get("original_max_position_embeddings") or longest
    found = {name: values[name] for name in ROPE_SCALINGS[kind] if values.get(name) is not None}
    if not (values.get("mscale") and values.get("mscale_all_dim")):  # transformers ignores one alone
        found = {name: value for name, value in found.items() if name not in ("mscale", "mscale_all_dim")}
    if kind != "linear":
        found["original_max_position"] = original
    return Rope(base=base, scaling=kind, **{"factor": longest / original, **found})


def mixture(
    config: HfConfig, count: Sequence[str], width: str, aux_loss: float = 0.001, **fields: Any
) -> MixtureOfExperts:
    """The fields that families read alike. `count`, `width`: keys of the experts' number (by its old and new names) and
    width; `aux_loss`: the coefficient where the config has none."""
    return MixtureOfExperts(
        num_experts=need(config, *count),
        top_k=need(config, "num_experts_per_tok", "experts_per_token"),
        expert_ffn_size=need(config, width),
        aux_loss_coefficient=float(config.get("router_aux_loss_coef", aux_loss)),
        **fields,
    )


def base_architecture(config: HfConfig, **fields: Any) -> Architecture:
    """The fields that all families read alike; `fields` are those that the family reads itself."""
    require(config, "hidden_act", ("silu", "swish"), "silu")
    heads = need(config, "num_attention_heads")
    given = {
        "num_key_value_heads": heads,
        "head_dim": need(config, "hidden_size") // heads,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    } | {key: value for key, value in config.items() if value is not None}
    values = {ours: need(given, theirs) for ours, theirs in FIELDS.items()}
    return Architecture(**({"family": config["model_type"], "rope": rope(config)} | values | fields))


def sliding_layers(config: HfConfig, window: int | None, first: int) -> dict[str, Any]:
    """Fields of the architecture for a window of `window` tokens (None: none) in the layers from `first` on,
    or in those that `layer_types` names."""
    if not window:
        return {}
    count = need(config, "num_hidden_layers")
    kinds = config.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * count
    layers = tuple(layer for layer in range(count) if kinds[layer] == "sliding_attention")
    return {"sliding_window": window, "sliding_layers": layers} if layers else {}


def embeddings(arch: Architecture, copies: tuple[str, ...] = ()) -> list[Mapping]:
    shape = (arch.vocab_size, arch.hidden_size)
    name = "embedding.word_embeddings.weight"
    return [Vocabulary(name, ("model.embed_tokens.weight",), (shape,), copies=copies)]


def output(arch: Architecture, copies: tuple[str, ...] = ()) -> list[Mapping]:
    """Final norm and, when it is a tensor of its own, the output layer."""
    norm = Replicated("decoder.final_layernorm.weight", ("model.norm.weight",), ((arch.hidden_size,),))
    if arch.scalar_head:
        return [norm, Replicated("output_layer.weight", (SCORE,), ((1, arch.hidden_size),))]
    if arch.tied_embeddings:
        return [norm]
    shape = (arch.vocab_size, arch.hidden_size)
    return [norm, Vocabulary("output_layer.weight", ("lm_head.weight",), (shape,), copies=copies)]


def layer_norms(arch: Architecture, layer: str = LAYER) -> list[Mapping]:
    shape = ((arch.hidden_size,),)
    return [
        Replicated(f"{layer}input_layernorm.weight", (f"{HF_LAYER}input_layernorm.weight",), shape),
        Replicated(f"{layer}pre_mlp_layernorm.weight", (f"{HF_LAYER}post_attention_layernorm.weight",), shape),
    ]


def attention(arch: Architecture, layer: str = LAYER) -> list[Mapping]:
    """Grouped-query attention, with biases and query-key norms where the architecture has them."""
    ours, theirs = f"{layer}self_attention.", f"{HF_LAYER}self_attn."
    widths = (arch.query_size, arch.key_value_size, arch.key_value_size)
    projections = tuple(f"{theirs}{letter}_proj." for letter in "qkv")

    def qkv(kind: str, rest: tuple[int, ...]) -> Mapping:
        names = tuple(name + kind for name in projections)
        shapes = tuple((width, *rest) for width in widths)
        return QKV(f"{ours}linear_qkv.{kind}", names, shapes, groups=arch.num_query_groups)

    table = [qkv("weight", (arch.hidden_size,)), *([qkv("bias", ())] if arch.qkv_bias else [])]
    shape = (arch.hidden_size, arch.query_size)
    table.append(RowParallel(f"{ours}linear_proj.weight", (f"{theirs}o_proj.weight",), (shape,)))
    if arch.attention_output_bias:
        table.append(Replicated(f"{ours}linear_proj.bias", (f"{theirs}o_proj.bias",), ((arch.hidden_size,),)))
    if arch.qk_norm:
        norm = ((arch.head_dim,),)
        table += [Replicated(f"{ours}{x}_layernorm.weight", (f"{theirs}{x}_norm.weight",), norm) for x in "qk"]
    return table


def gated_mlp(
    ours: str, theirs: str, hidden: int, ffn: int, names: Names = PROJECTIONS, bias: bool = False
) -> list[Mapping]:
    """A gated MLP whose modules are called `ours` + linear_fc1 and `theirs` + `names` (gate, up, down)."""
    gate, up, down = (f"{theirs}{name}." for name in names)
    table: list[Mapping] = [
        GatedMLP(f"{ours}linear_fc1.weight", (f"{gate}weight", f"{up}weight"), ((ffn, hidden),) * 2),
        RowParallel(f"{ours}linear_fc2.weight", (f"{down}weight",), ((hidden, ffn),)),
    ]
    if bias:
        table += [
            GatedMLP(f"{ours}linear_fc1.bias", (f"{gate}bias", f"{up}bias"), ((ffn,),) * 2),
            Replicated(f"{ours}linear_fc2.bias", (f"{down}bias",), ((hidden,),)),
        ]
    return table


def dense_mlp(arch: Architecture) -> list[Mapping]:
    return gated_mlp(f"{LAYER}mlp.", f"{HF_LAYER}mlp.", arch.hidden_size, arch.ffn_size, bias=arch.mlp_bias)


def router(arch: Architecture, name: str = "mlp.gate", layer: str = LAYER) -> list[Mapping]:
    assert arch.moe is not None
    count = arch.moe.num_experts
    ours, theirs = f"{layer}mlp.router.", f"{HF_LAYER}{name}."
    weight = Replicated(f"{ours}weight", (f"{theirs}weight",), ((count, arch.hidden_size),))
    return [weight, *([Replicated(f"{ours}bias", (f"{theirs}bias",), ((count,),))] if arch.moe.router_bias else [])]


def experts(
    arch: Architecture, theirs: str = "mlp.experts.*.", names: Names = PROJECTIONS, layer: str = LAYER
) -> list[Mapping]:
    """One expert of a layer; for `on(layers, ..., experts=arch.moe.num_experts)`."""
    assert arch.moe is not None
    ours, width = f"{layer}mlp.experts.local_experts.*.", arch.moe.expert_ffn_size
    return gated_mlp(ours, HF_LAYER + theirs, arch.hidden_size, width, names, arch.mlp_bias)


def layers(arch: Architecture, moe: bool) -> list[int]:
    """Numbers of the layers with experts, or of those with a dense MLP."""
    return [layer for layer in range(arch.num_layers) if arch.is_moe_layer(layer) == moe]


def table(arch: Architecture, moe_block: Sequence[Mapping] = (), expert: Sequence[Mapping] = ()) -> list[Mapping]:
    """A Llama-like model; `moe_block`: what a layer with experts has once, `expert`: and once per expert."""
    rows = embeddings(arch) + on(range(arch.num_layers), [*layer_norms(arch), *attention(arch)])
    rows += on(layers(arch, moe=False), dense_mlp(arch))
    if arch.moe is not None:
        rows += on(layers(arch, moe=True), moe_block)
        rows += on(layers(arch, moe=True), expert, experts=arch.moe.num_experts)
    return rows + output(arch)
