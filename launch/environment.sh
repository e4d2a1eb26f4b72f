# shellcheck shell=bash
# Environment of every worker; sourced by node.sh. Only sets what is unset, so that your own value wins.
# What each does, and which to try when a link is slow or a job hangs: the table in README.md.

# Every rank would otherwise start a thread per core.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Up to Hopper, tensor and context parallelism overlap with compute only if kernels keep their order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# A failed collective ends its process instead of leaving it to wait.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# Prints the last collectives of each rank when the NCCL watchdog ends it.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# c10d prints a C++ stack for every connection that a dead peer closes; node.py says who it was.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# Rank logs are read while the job runs.
export PYTHONUNBUFFERED=1

# Kernels compiled at run time, a node's own: on a home that nodes share, their ranks would wait for each other's locks.
caches=${TMPDIR:-/tmp}/posttrain-caches-$UID
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$caches/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$caches/inductor}
export VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$caches/vllm}
export FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$caches/flashinfer}

# Left to the cluster's defaults; uncomment or set in your cluster's YAML where the README says so.
# export NCCL_IB_HCA=mlx5                 # InfiniBand adapters to use, when some are for storage
# export NCCL_SOCKET_IFNAME=ib0           # interface of NCCL's set-up traffic, when it picks a wrong one
# export GLOO_SOCKET_IFNAME=ib0           # the same for gloo
# export NCCL_IB_TIMEOUT=22               # large fabrics: more patience before a retry
# export NCCL_NVLS_ENABLE=0               # frees the memory that NVLink SHARP takes
