"""SFT steps of this trainer, TRL's SFTTrainer and a bare transformers loop, in turns, in CPU seconds of one thread.

Same model, rows of 256 tokens (1,024 tokens a step, documents apart on every side, half of each a prompt that no loss
counts), fp32. TRL's trainer leads: the others take their turns when one of its steps has ended. Prints the median of
each side and the median and quartiles of its ratio to ours; losses differ by the shuffling of TRL only.

    python -m benchmarks.peers [--steps 8] [--dense] [--trl-batch 1]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.sft_vs_transformers import SIZES, bare, make_model, ours
from megatron_posttrain.training.process import quiet_libraries

ROW = 256
ROWS = 4
PARTS = ([96, 160], [64, 192], [256], [40, 216])  # each fills a row, so that any packer needs as many rows
WARM_UP = 2


def make_documents(steps: int) -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(1)
    draw = [PARTS[i % len(PARTS)] for i in range(steps * ROWS)]
    return [[torch.randint(0, SIZES["vocab_size"], (n,), generator=generator).tolist() for n in row] for row in draw]


def trl(directory: Path, rows: list[list[list[int]]], batch: int, turn: Callable[[int, float], None]) -> None:
    """Trains TRL's trainer, calling `turn(step, its CPU seconds)` after every step of it."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    started = [time.process_time()]

    class Turns(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            turn(state.global_step - 1, time.process_time() - started[0])
            started[0] = time.process_time()

    documents = [ids for row in rows for ids in row]
    masks = [prompt_mask(ids) for ids in documents]
    config = SFTConfig(
        output_dir=str(directory / "trl"), use_cpu=True, bf16=False, fp16=False, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, learning_rate=1e-4, adam_beta2=0.95, weight_decay=0.1,
        max_length=ROW, packing=True, packing_strategy="bfd", per_device_train_batch_size=batch,
        gradient_accumulation_steps=ROWS // batch, max_steps=len(rows) // ROWS, gradient_checkpointing=False,
        completion_only_loss=True, dataloader_num_workers=0, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": documents, "completion_mask": masks}),
        processing_class=make_tokenizer(PreTrainedTokenizerFast),
        callbacks=[Turns()],
    )
    torch.set_num_threads(1)
    started[0] = time.process_time()
    trainer.train()


def make_tokenizer(kind: Any) -> Any:
    """Words by number; the trainer asks for one, the rows are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({str(n): n for n in range(SIZES["vocab_size"])}, unk_token="0"))
    return kind(tokenizer_object=words, eos_token="1", pad_token="0")


def prompt_mask(ids: list[int]) -> list[int]:
    """1 for the second half, which counts."""
    return [int(i >= len(ids) // 2) for i in range(len(ids))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each side (default: 8)")
    parser.add_argument("--dense", action="store_true", help="a dense model instead of a mixture of experts")
    parser.add_argument("--trl-batch", type=int, default=1, choices=(1, 2, 4), help="rows of its micro-batch")
    args = parser.parse_args()
    quiet_libraries()
    rows = make_documents(args.steps + WARM_UP)
    seconds: dict[str, list[float]] = {"ours": [], "trl": [], "bare": []}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make_model(directory, args.dense)
        others = {"ours": ours(directory, prompt_mask), "bare": bare(directory, prompt_mask)}

        def turn(number: int, spent: float) -> None:
            seconds["trl"].append(spent)
            for name, step in others.items():
                started = time.process_time()
                step(rows[number * ROWS : (number + 1) * ROWS])
                seconds[name].append(time.process_time() - started)

        trl(directory, rows, args.trl_batch, turn)
    for name, values in seconds.items():
        timed = values[WARM_UP:]
        low, middle, high = statistics.quantiles(
            [x / own for x, own in zip(timed, seconds["ours"][WARM_UP:], strict=True)], n=4
        )
        print(f"{name:5} {statistics.median(timed):.3f} CPU s a step, {middle:.2f} of ours ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
