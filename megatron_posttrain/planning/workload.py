"""What is to be trained, apart from where."""

from dataclasses import dataclass

from megatron_posttrain.models.architecture import Architecture

MEAN_SHARE = 0.75  # of the longest: mean length of a sample, when it is not given


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens, batches in sequences (GRPO: samples; DPO: pairs, each two sequences)."""

    task: str  # pretrain | sft | lora | dpo | distill | grpo
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
    offload: bool | None = None  # grpo: optimizer states and gradients, while vLLM is awake; None: the better
    gpu_memory_fraction: float | None = None  # grpo: of a GPU, for vLLM; None: what its cache needs
    kv_cache_gib: float | None = None  # grpo: of an engine's rank; None: by the fraction
    teacher: Architecture | None = None  # distill: a frozen model in the same layout
    teacher_path: str = ""

    @property
    def lora(self) -> bool:
        return self.task == "lora" or self.lora_rank is not None

    @property
    def rank(self) -> int:
        """Of adapters, where there are any."""
        return self.lora_rank or 16

    @property
    def balanced(self) -> bool:
        """Post-training routes tokens as the model likes; pre-training is measured with balanced experts."""
        return self.routing == "balanced" or (self.routing == "auto" and self.task == "pretrain")

    @property
    def row_length(self) -> int:
        """Tokens of a trained row: GRPO packs samples of their mean length."""
        if self.task != "grpo":
            return self.sequence_length
        return self.mean_length or round(MEAN_SHARE * self.sequence_length)
