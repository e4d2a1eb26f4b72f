"""What is to be trained, apart from where."""

from dataclasses import dataclass

from megatron_posttrain.models.architecture import Architecture

MEAN_SHARE = 0.75  # of the longest: mean length of a sample, when it is not given


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens, batches in sequences (RL: samples; pairs count two)."""

    task: str  # pretrain | sft | lora | dpo | reward-model | distill | grpo | ppo
    sequence_length: int
    global_batch: int
    precision: str = "bf16"  # bf16 | fp8 | mxfp8
    micro_batch: int = 0  # 0: the best
    recompute: str = "auto"  # auto | none | selective | full
    routing: str = "auto"  # auto | balanced | natural
    lora_rank: int | None = None  # of adapters; None: 16 for lora, and no adapters for other tasks
    quantization: str | None = None  # of the frozen base beside adapters: nf4
    mean_length: int | None = None
    rollout_tensor: int | None = None  # GPUs of a vLLM engine; None: the best
    offload: bool | None = None  # RL: optimizer states and gradients, while vLLM is awake; None: the better
    gpu_memory_fraction: float | None = None  # RL: of a GPU, for vLLM; None: what its cache needs
    kv_cache_gib: float | None = None  # RL: of an engine's rank; None: by the fraction
    beside: Architecture | None = None  # in the same layout; distill: the teacher; ppo: the critic, None: as the policy
    beside_path: str = ""

    @property
    def lora(self) -> bool:
        return self.task == "lora" or self.lora_rank is not None

    @property
    def rank(self) -> int:
        """Of adapters, where there are any."""
        return self.lora_rank or 16

    @property
    def rollouts(self) -> bool:
        return self.task in ("grpo", "ppo")

    @property
    def sequences(self) -> int:
        """Of a row."""
        return 2 if self.task in ("dpo", "reward-model") else 1

    def trained(self, arch: Architecture) -> Architecture:
        """`arch` with the output layer that the task trains."""
        return arch.with_scalar_head() if self.task == "reward-model" else arch

    def critic(self, policy: Architecture) -> Architecture | None:
        return (self.beside or policy).with_scalar_head() if self.task == "ppo" else None

    @property
    def balanced(self) -> bool:
        """Post-training routes tokens as the model likes; pre-training is measured with balanced experts."""
        return self.routing == "balanced" or (self.routing == "auto" and self.task == "pretrain")

    @property
    def row_length(self) -> int:
        """Tokens of a trained row: RL packs samples of their mean length."""
        if not self.rollouts:
            return self.sequence_length
        return self.mean_length or round(MEAN_SHARE * self.sequence_length)
