"""What a model is, apart from any framework: read from a Hugging Face config by a family's file. The engine, the weight
tables, the converters and the planner read this; only a family's file reads Hugging Face names."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. `scaling` is None for plain RoPE."""

    base: float = 10_000.0
    scaling: Literal["yarn", "llama3", "linear"] | None = None
    factor: float = 1.0
    original_max_position: int = 0
    # YaRN (Peng et al. 2023)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True
    # Llama 3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True)
class MultiLatentAttention:
    """DeepSeek's MLA (arXiv 2405.04434, section 2.1): low-rank query and key-value projections."""

    q_rank: int | None
    kv_rank: int
    qk_nope_dim: int
    qk_rope_dim: int
    v_dim: int


@dataclass(frozen=True)
class MixtureOfExperts:
    num_experts: int
    top_k: int
    expert_ffn_size: int
    shared_ffn_size: int = 0  # all shared experts together; 0: none
    shared_gate: bool = False  # sigmoid gate on the shared expert's output (Qwen2-MoE)
    first_dense_layers: int = 0  # leading layers with a dense MLP
    dense_layers: tuple[int, ...] = ()  # further layers with a dense MLP, numbered from 0
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalize_top_k: bool = True  # divide the chosen probabilities by their sum
    softmax_after_top_k: bool = False  # softmax over the chosen logits only (Mixtral-like, gpt-oss)
    correction_bias: bool = False  # per-expert bias that steers selection only (DeepSeek-V3)
    num_groups: int | None = None  # group-limited routing (DeepSeek-V3)
    top_k_groups: int | None = None
    scaling_factor: float = 1.0  # on the routed experts' output
    router_bias: bool = False
    aux_loss_coefficient: float = 0.0  # what the checkpoint's config asks for


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer. Sizes are global (unsharded) and in elements."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    ffn_size: int  # dense MLP; without effect where every layer is a mixture of experts
    vocab_size: int
    max_position: int
    norm_epsilon: float = 1e-6
    rope: Rope = field(default_factory=Rope)
    tied_embeddings: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_sinks: bool = False
    sliding_window: int | None = None  # tokens; None: full attention everywhere
    sliding_layers: tuple[int, ...] = ()  # layers that use the window
    activation: Literal["swiglu", "gpt_oss_glu"] = "swiglu"
    moe: MixtureOfExperts | None = None
    mla: MultiLatentAttention | None = None
    num_mtp_layers: int = 0  # multi-token-prediction layers in the checkpoint
    padding_token: int | None = None  # whose word embedding is not trained
    scalar_head: bool = False  # one value a token in place of the vocabulary's: reward models, critics

    def __hash__(self) -> int:
        """Of what tells models apart: planning looks results up by architecture a million times."""
        return hash((self.num_layers, self.hidden_size, self.vocab_size))

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) has experts."""
        moe = self.moe
        return moe is not None and layer >= moe.first_dense_layers and layer not in moe.dense_layers

    def with_scalar_head(self) -> Self:
        """The same layers under a new output layer of one column."""
        return replace(self, scalar_head=True, tied_embeddings=False)

    @property
    def outputs(self) -> int:
        """Columns of the output layer."""
        return 1 if self.scalar_head else self.vocab_size

    @property
    def context_length(self) -> int:
        """Positions that the rotary embedding covers, its scaling included; Llama 3's is part of `max_position`."""
        scaled = {"yarn": self.rope.original_max_position, "linear": self.max_position}.get(self.rope.scaling or "", 0)
        return max(self.max_position, int(scaled * self.rope.factor))

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_query_groups * self.head_dim


HfConfig = dict[str, Any]
