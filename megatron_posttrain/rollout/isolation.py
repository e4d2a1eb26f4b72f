"""Keeps the process as the trainer left it: vLLM changes global state at its start and at every step."""

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch


class Isolation:
    """`with isolation():` around every call of the engine.

    vLLM reseeds python, numpy and torch when it starts, draws from torch's global generator at every sampling
    step (also for seeded requests), replaces `torch.set_num_threads`, sets the float32 matmul precision, makes a
    CUDA stream of its own the current one, and sets environment variables (LOCAL_WORLD_SIZE, LD_PRELOAD and
    others). The trainer gets all of that back; the engine's own variables return for as long as the engine runs.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self._environment = dict(environment or {})

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        trainer = dict(os.environ)
        python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        device = torch.cuda.get_rng_state() if cuda else None
        stream = torch.cuda.current_stream() if cuda else None
        threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
        precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
        os.environ.update(self._environment)
        try:
            # vLLM has small functions compiled even where the model is not: seconds, and a C++ compiler on CPU.
            with contextlib.nullcontext() if torch.cuda.is_available() else torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._environment = {k: v for k, v in os.environ.items() if trainer.get(k) != v}
            for name in self._environment:
                if name in trainer:
                    os.environ[name] = trainer[name]
                else:
                    del os.environ[name]
            os.environ.update({k: v for k, v in trainer.items() if k not in os.environ})
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(cpu)
            if device is not None:
                torch.cuda.set_rng_state(device)
            if stream is not None:
                torch.cuda.current_stream().synchronize()  # the engine's work ends before the trainer's stream goes on
                torch.cuda.set_stream(stream)
            torch.set_num_threads = set_num_threads
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
            torch.set_default_dtype(dtype)
