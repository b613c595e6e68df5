"""Where a worker process is, and its environment variables: two of them cost a factor of six when they are missing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rayllm import faults

if TYPE_CHECKING:  # a supervisor computes nothing
    import torch

CPU_ENV = {
    "OMP_NUM_THREADS": "1",  # two OpenMP threads on two busy cores were 6 times slower than one
    "OMP_WAIT_POLICY": "PASSIVE",
    "DS_ACCELERATOR": "cpu",
    # What a step frees the next one takes again: by itself glibc gives it back, and gets it zeroed page by page.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed's import and vLLM's sampler compile: seconds, for nothing on CPU
}

COMMON_ENV = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),  # the driver has fetched what the config names
}


def worker_env(gpus: float) -> dict[str, str]:
    """Variables for a process that computes with ``gpus`` GPUs; without one it computes on a single CPU thread and
    is parallel by processes."""
    return {**COMMON_ENV, **({} if gpus else CPU_ENV), **faults.carried()}


def backend(gpus: float) -> str:
    """torch.distributed backend."""
    return "nccl" if gpus else "gloo"


def device_of() -> torch.device:
    """The GPU that Ray gave this process, or the CPU on as many threads as OMP_NUM_THREADS says."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return torch.device("cpu")


def this_node() -> str:
    """Ray's id of the node of this process."""
    import ray

    return str(ray.get_runtime_context().get_node_id())
