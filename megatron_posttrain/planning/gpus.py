"""What GPUs and their links can do (data sheets), and how much of it training reaches (fitted, a handful a GPU)."""

from dataclasses import dataclass

from megatron_posttrain.errors import UserError, nearest


@dataclass(frozen=True)
class Gpu:
    """Peaks of one GPU in its usual system. Rates are per GPU and per direction, without sparsity."""

    name: str
    generation: str
    bf16_tflops: float
    fp8_tflops: float | None  # None: the device has no FP8
    has_mxfp8: bool
    memory_gib: float  # what a process can allocate
    memory_tb_per_s: float
    domain: int  # GPUs that reach each other by NVLink
    per_node: int  # GPUs of one host
    nvlink_gb_per_s: float
    network_gb_per_s: float  # one network adapter a GPU

    @property
    def group(self) -> int:
        """Largest power of two of GPUs inside one NVLink domain: jobs lay their groups out by it."""
        return 1 << (self.domain.bit_length() - 1)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", "ampere", 312, None, False, 78.0, 2.04, 8, 8, 300, 25),
        Gpu("H100", "hopper", 989, 1979, False, 78.0, 3.35, 8, 8, 450, 50),
        Gpu("H200", "hopper", 989, 1979, False, 139.0, 4.8, 8, 8, 450, 50),
        Gpu("B200", "blackwell", 2250, 4500, True, 177.0, 7.7, 8, 8, 900, 50),
        Gpu("B300", "blackwell", 2250, 4500, True, 266.0, 7.7, 8, 8, 900, 100),
        Gpu("GB200", "blackwell", 2500, 5000, True, 183.0, 8.0, 72, 4, 900, 50),
        Gpu("GB300", "blackwell", 2500, 5000, True, 275.0, 8.0, 72, 4, 900, 100),
    )
}


COMPUTE_CAPABILITIES = {"ampere": (8, 0), "hopper": (9, 0), "blackwell": (10, 0)}


@dataclass(frozen=True)
class Efficiency:
    """Time spent for one second of the hardware's ideal time, fitted by benchmarks/plan_accuracy.py --fit.

    Values above 1 are losses; `links` is below 1 where communication hides behind computation.
    """

    matmul: float
    grouped_matmul: float  # experts
    layer_ms: float  # kernel launches and synchronisation of a dense layer, forward and backward
    links: float
    attention: float = 2.0  # the same for all: FlashAttention reaches about half of the peak
    memory: float = 1.3  # streaming kernels reach about 77% of the bandwidth


EFFICIENCIES: dict[str, Efficiency] = {
    "hopper": Efficiency(matmul=1.36, grouped_matmul=2.34, layer_ms=1.58, links=0.468),
    "blackwell": Efficiency(matmul=1.57, grouped_matmul=2.71, layer_ms=0.555, links=0.332),
}
EFFICIENCIES["ampere"] = EFFICIENCIES["hopper"]  # nothing published to fit

# Power and clocks: time against the generation's, on everything but links and the fixed cost of layers. One published
# row is not enough to tell an H200 from an H100.
SUSTAINED: dict[str, float] = {"H100": 0.9, "H200": 0.9, "B200": 1.15, "B300": 1.09, "GB200": 1.03, "GB300": 0.9}


# Published / predicted throughput, 10th and 90th percentile by generation and kind of model, as benchmarks/
# plan_accuracy.py finds them. Containers of different months differ by up to 1.7 times in one configuration.
SPREADS: dict[tuple[str, bool], tuple[float, float]] = {  # (generation, mixture of experts)
    ("hopper", False): (0.85, 1.06),
    ("hopper", True): (0.54, 1.29),
    ("blackwell", False): (0.90, 1.13),
    ("blackwell", True): (0.82, 1.31),
}


def spread_of(gpu: Gpu, experts: bool) -> tuple[float, float]:
    """Lowest and highest throughput that runs of one configuration have had, against the prediction."""
    return SPREADS["hopper" if gpu.generation == "ampere" else gpu.generation, experts]


def scaled(e: Efficiency, factor: float) -> Efficiency:
    """`e` for a GPU that takes `factor` times as long for everything but links and the fixed cost of layers."""
    return Efficiency(
        e.matmul * factor, e.grouped_matmul * factor, e.layer_ms, e.links, e.attention * factor, e.memory * factor
    )


def constants_of(gpu: Gpu) -> Efficiency:
    """The generation's constants at the GPU's sustained speed."""
    return scaled(EFFICIENCIES[gpu.generation], SUSTAINED.get(gpu.name, 1.0))


def find_gpu(name: str) -> Gpu:
    """By name in any case. Raises UserError with the nearest known name."""
    gpu = GPUS.get(name.upper())
    if gpu is None:
        raise UserError(f"--gpu {name}: unknown{nearest(name.upper(), GPUS)} (one of {', '.join(GPUS)})")
    return gpu
