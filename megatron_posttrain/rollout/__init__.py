"""vLLM inside every trainer rank: generation, weight updates (refit) and their proof.

vLLM reads its environment once, when it is imported. It is set here, and only this package imports vLLM.
"""

import os

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process: no child to be orphaned
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it pins the trainer to cores of its choice
    "OMP_NUM_THREADS": "1",  # ranks share the cores: with more threads a step is up to 70 times slower
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait leave their core to the other ranks; if before torch's import
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # FlashInfer compiles these kernels with nvcc and ninja at their first call, and a failure ends the engine. NCCL
    # and vLLM's own all-reduce do the same work; requests with seeds never use its sampler.
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
# A value inherited from the shell would make the engine start processes of its own.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from megatron_posttrain.rollout.engine import Completion, RolloutEngine, Sampling  # noqa: E402
from megatron_posttrain.rollout.refit import Refit, RefitError, prove  # noqa: E402

__all__ = ["Completion", "Refit", "RefitError", "RolloutEngine", "Sampling", "prove"]
