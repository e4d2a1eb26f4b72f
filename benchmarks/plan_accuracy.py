"""How well `plan` predicts published throughput: every row, then the error by model with that model left out.

    python benchmarks/plan_accuracy.py            # the table with the constants in planning/gpus.py
    python benchmarks/plan_accuracy.py --fit      # and constants fitted anew, to copy there

Rows: published_throughput.csv beside this file, each with its source. Left out: models that are no plain
transformers (Nemotron-3's state-space layers, DeepSeek-V4), NVFP4, reinforcement learning, and rows without a
batch size; LoRA is reported apart. FSDP rows are predicted as data parallel ones. The error is predicted /
published throughput - 1. Where a source rounds tokens/s to a multiple of 16 or more (containers 26.04.01,
26.06.01, 26.08), throughput is taken from its TFLOP/s, unless that uses another FLOP formula.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_posttrain.models.architecture import Architecture
from megatron_posttrain.parallel.layout import Layout
from megatron_posttrain.planning import step_time as st
from megatron_posttrain.planning.flops import flops_per_token
from megatron_posttrain.planning.gpus import EFFICIENCIES, GPUS, SUSTAINED, Efficiency, Gpu, scaled
from megatron_posttrain.planning.known_models import KNOWN_MODELS
from megatron_posttrain.planning.layouts import make_layout
from megatron_posttrain.planning.parameters import trained_elements
from megatron_posttrain.planning.workload import Workload

ROWS = Path(__file__).parent / "published_throughput.csv"
NAMES = {
    "llama38b": "Llama-3-8B", "llama370b": "Llama-3-70B", "llama31405b": "Llama-3.1-405B",
    "llama3405b": "Llama-3.1-405B", "gptoss120b": "gpt-oss-120b", "qwen330ba3b": "Qwen3-30B-A3B",
    "qwen3235ba22b": "Qwen3-235B-A22B", "qwen38b": "Qwen3-8B", "deepseekv3": "DeepSeek-V3", "kimik2": "Kimi-K2",
}  # fmt: skip
ROUNDED = ("26.04.01", "26.06.01", "26.08")
# What is fitted, with its prior: a typical value, and how far from it in ln. Attention and memory stay fixed.
FITTED = {"matmul": (1.45, 0.1), "grouped_matmul": (2.2, 0.3), "layer_ms": (1.0, 0.7), "links": (0.7, 0.5)}
SUSTAINED_PRIOR = 0.12
NOISE, FLOOR = 0.15, 0.05  # of ln(time); errors below the floor weigh alike


@dataclass(frozen=True)
class Row:
    id: str
    task: str
    model: str
    arch: Architecture
    gpu: Gpu
    layout: Layout
    job: Workload
    seconds: float  # published
    work: np.ndarray  # ideal seconds by resource
    container: str

    @property
    def label(self) -> str:
        names = zip(("TP", "PP", "VP", "CP", "EP", "ETP"), self.layout.sizes.values(), strict=True)
        sizes = " ".join([f"{self.layout.world_size:4} GPUs", *(f"{name}{n}" for name, n in names if n > 1)])
        return f"{self.model:16} {self.gpu.name:6} {self.job.precision:6} {sizes:36} mbs{self.job.micro_batch}"


def _number(text: str, default: int = 1) -> int:
    return int(text) if text.isdigit() else default


def read_rows(tasks: Sequence[str] = ("pretrain", "sft")) -> list[Row]:
    with ROWS.open() as file:
        return [row for raw in csv.DictReader(file) if (row := _row(raw, tasks)) is not None]


def _row(raw: dict[str, str], tasks: Sequence[str]) -> Row | None:
    model = NAMES.get("".join(c for c in raw["model"].split(" (")[0].lower() if c.isalnum()))
    precision = _precision(raw["precision"])
    if model is None or precision is None or not raw["task"].startswith(tuple(tasks)):
        return None
    if not (raw["num_gpus"] and raw["gbs"] and raw["seq_len"]):
        return None
    arch, gpus, length = KNOWN_MODELS[model], int(raw["num_gpus"]), int(raw["seq_len"])
    layout = make_layout(
        gpus, tensor=_number(raw["tp"]), pipeline=_number(raw["pp"]), virtual_pipeline=_number(raw["vp"]),
        context=_number(raw["cp"]), expert=_number(raw["ep"]),
    )  # fmt: skip
    job = Workload(
        "lora" if raw["task"].startswith("lora") else "pretrain", length, int(raw["gbs"]), precision,
        _number(raw["mbs"]), "none", "natural" if raw["routing"] == "natural" else "balanced",
    )  # fmt: skip
    gpu = GPUS[raw["gpu"].removeprefix("DGX-").replace("H800", "H100")]
    _, work = st.step_time(arch, layout, job, gpu, trained_elements(arch, layout))
    seconds = job.global_batch * length / _throughput(raw, arch, length) / gpus
    return Row(raw["id"], raw["task"], model, arch, gpu, layout, job, seconds, work, raw["container"])


def _precision(text: str) -> str | None:
    text = text.upper()
    if "NVFP4" in text:
        return None
    return "mxfp8" if "MX" in text and "CS" not in text else "fp8" if "FP8" in text else "bf16"


def _throughput(raw: dict[str, str], arch: Architecture, length: int) -> float:
    """Tokens/s/GPU."""
    flops = flops_per_token(arch, length)
    tokens = float(raw["tokens_per_s_per_gpu"] or 0)
    from_flops = float(raw["model_tflops_per_s_per_gpu"] or 0) * 1e12 / flops
    if tokens and not (raw["container"] in ROUNDED and abs(from_flops / tokens - 1) < 0.05):
        return tokens
    return from_flops or int(raw["gbs"]) * length / float(raw["step_time_s"]) / int(raw["num_gpus"])


def fit(rows: Sequence[Row]) -> tuple[dict[str, Efficiency], dict[str, float]]:
    """Maximum a posteriori constants: Gauss-Newton on ln(time), reweighted towards absolute errors."""
    generations = sorted({row.gpu.generation for row in rows})
    gpus = sorted({row.gpu.name for row in rows})
    names, count = list(FITTED), len(FITTED) * len(generations)
    column = {"matmul": st.MATMUL, "grouped_matmul": st.GROUPED, "layer_ms": st.LAYERS}
    prior = np.array([np.log(FITTED[n][0]) for _ in generations for n in names] + [0.0] * len(gpus))
    spread = np.array([FITTED[n][1] for _ in generations for n in names] + [SUSTAINED_PRIOR] * len(gpus))
    target = np.log([row.seconds for row in rows])
    p = prior.copy()
    for _ in range(60):
        seconds = np.zeros(len(rows))
        slope = np.zeros((len(rows), len(p)))
        for i, row in enumerate(rows):
            first = generations.index(row.gpu.generation) * len(names)
            at = count + gpus.index(row.gpu.name)
            fixed = Efficiency(1, 1, 1, 1)
            compute = 0.0
            for k, name in enumerate(names):
                ideal = row.work[column[name]] if name in column else row.work[[st.NVLINK, st.NETWORK]].sum()
                sustained = np.exp(p[at]) if name in ("matmul", "grouped_matmul") else 1.0
                slope[i, first + k] = ideal * np.exp(p[first + k]) * sustained
                compute += slope[i, first + k] if name in ("matmul", "grouped_matmul") else 0.0
            streams = row.work[st.ATTENTION] * fixed.attention + row.work[st.MEMORY] * fixed.memory
            compute += streams * np.exp(p[at])
            slope[i, at] = compute
            data = row.work[st.DATA] * st.COLLECTIVE_LOSS
            seconds[i] = slope[i, first : first + len(names)].sum() + streams * np.exp(p[at]) + data
        slope /= seconds[:, None]
        error = target - np.log(seconds)
        weight = NOISE / np.maximum(abs(error), FLOOR) / NOISE**2
        hessian = (slope * weight[:, None]).T @ slope + np.diag(1 / spread**2)
        gradient = (slope * weight[:, None]).T @ error - (p - prior) / spread**2
        p += np.clip(np.linalg.solve(hessian, gradient), -0.3, 0.3)
    values = np.exp(p)
    found = {
        g: Efficiency(**dict(zip(names, values[i * len(names) :], strict=False))) for i, g in enumerate(generations)
    }
    return found, dict(zip(gpus, values[count:], strict=True))


def predicted(row: Row, efficiencies: dict[str, Efficiency], sustained: dict[str, float]) -> float:
    """Seconds of a step."""
    defaults = {name: value[0] for name, value in FITTED.items()}
    e = efficiencies.get(row.gpu.generation, Efficiency(**defaults))
    return float(st.multipliers(scaled(e, sustained.get(row.gpu.name, 1.0))) @ row.work)


def errors(rows: Iterable[Row], constants: tuple[dict[str, Efficiency], dict[str, float]]) -> np.ndarray:
    return np.array([row.seconds / predicted(row, *constants) - 1 for row in rows])


def summary(label: str, error: np.ndarray) -> str:
    a = abs(error)
    return (
        f"{label:24} {len(a):4} rows  median {np.median(a):6.1%}  90th percentile {np.percentile(a, 90):6.1%}"
        f"  mean signed {error.mean():+6.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the constants and print them")
    args = parser.parse_args()
    rows = read_rows()
    constants = fit(rows) if args.fit else (EFFICIENCIES, SUSTAINED)
    if args.fit:
        for name, e in constants[0].items():
            print(f"{name}: {', '.join(f'{n}={getattr(e, n):.3g}' for n in FITTED)}")
        print("sustained:", {k: round(float(v), 2) for k, v in constants[1].items()}, "\n")
    everything = errors(rows, constants)
    left_out = np.zeros(len(rows))
    models = sorted({row.model for row in rows})
    for model in models:
        mine = np.array([row.model == model for row in rows])
        others = fit([row for row in rows if row.model != model])
        left_out[mine] = errors([row for row in rows if row.model == model], others)
    order = sorted(range(len(rows)), key=lambda i: (rows[i].label, rows[i].id))
    print(f"{'id':>4} {'row':82} {'published':>10} {'predicted':>10} {'error':>7} {'left out':>8}   tokens/s/GPU")
    for i in order:
        row = rows[i]
        tokens = row.job.global_batch * row.job.sequence_length / row.layout.world_size
        guess = tokens / predicted(row, *constants)
        print(
            f"{row.id:>4} {row.label:82} {tokens / row.seconds:10.0f} {guess:10.0f} {everything[i]:+7.1%}"
            f" {left_out[i]:+8.1%}"
        )
    print()
    for model in models:
        mine = np.array([row.model == model for row in rows])
        print(summary(model, everything[mine]), "| left out:", summary("", left_out[mine]).split("rows  ")[1])
    print(summary("all", everything))
    print(summary("all, own model left out", left_out))
    lora = read_rows(("lora",))
    print(summary("LoRA (not fitted)", errors(lora, constants)))


if __name__ == "__main__":
    main()
