"""Where a run takes place: device, dtype, processes, seed, and how it is asked to stop."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from common.device import choose_device
from common.errors import UserError
from common.owner import follow_parent
from common.threads import describe_threads
from trainer.config import TrainConfig
from trainer.paths import find_dim
from trainer.stop import StopSignal

# Steps that a GPU may be ahead of the host: reading a loss makes the host wait for the device.
GPU_STEPS_UNREAD = 16
# Widest product that is timed to tell whether bfloat16 is faster.
MEASURED_DIM = 2048


@dataclass
class Runtime:
    """The device of this process, and the other processes of the run."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    stop: StopSignal = field(default_factory=StopSignal)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_gpu(self) -> bool:
        return self.device.type != "cpu"

    @property
    def has_own_memory(self) -> bool:
        """Not so on a CPU, nor on a Mac, whose GPU shares the memory of the CPU."""
        return self.device.type not in ("cpu", "mps")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def print(self, line: str) -> None:
        """Print in the main process only."""
        if self.is_main:
            print(line, flush=True)

    def autocast(self) -> AbstractContextManager:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_on_device(self, value: float | torch.Tensor) -> torch.Tensor:
        """float[] on the device, summed over all processes; the host does not wait for it.

        A tensor is summed in place.
        """
        if not torch.is_tensor(value):
            # torch.tensor(value, device=...) would copy, and the host would wait for the copy.
            value = torch.full((), float(value), device=self.device)
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: object) -> list:
        """What each process has, in all of them; they have to call this together."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def any_rank(self, flag: bool) -> bool:
        return self.sum_over_ranks(flag)[0] > 0

    def is_read_due(self, step: int) -> bool:
        """Whether losses and signals are read after this step: on a GPU only now and then."""
        return not self.is_gpu or step % GPU_STEPS_UNREAD == 0

    def from_main(self, make: Callable[[], object]) -> object:
        """What `make` returns in the main process, given to every process; its error as well."""
        result: list = [None, None]
        if self.is_main:
            try:
                result[0] = make()
            except Exception as error:
                result[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(result, device=self.device)
        if result[1] is not None:
            raise result[1]
        return result[0]

    def count_workers(self, wanted: int | None) -> int:
        """Loader processes: 8 beside a GPU; none on a CPU, whose cores train, unless asked for."""
        if wanted is not None:
            return wanted
        return min(8, os.cpu_count() or 1) if self.is_gpu else 0

    def peak_memory(self) -> int:
        """Largest memory so far, in bytes: of the GPU, or of this process without one."""
        if self.has_own_memory:
            return torch.accelerator.max_memory_allocated(self.device)
        return peak_process_memory()

    def free_memory(self) -> float:
        """Bytes that this process may use: what it holds, and its share of what is free."""
        if self.has_own_memory:
            free, _ = torch.accelerator.get_memory_info(self.device)
            return free + torch.accelerator.memory_reserved(self.device)
        import psutil

        return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def close(self) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def peak_process_memory() -> int:
    """Largest memory of this process so far, in bytes; 0 on a system that does not tell."""
    try:
        import resource
    except ImportError:
        # Windows.
        return _peak_by_psutil()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak_by_psutil() -> int:
    try:
        import psutil
    except ImportError:
        return 0
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


def start_runtime(config: TrainConfig) -> Runtime:
    """Join the processes that torchrun started, choose device and dtype, seed everything."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if config.ddp and "RANK" not in os.environ:
        raise UserError("--ddp needs torchrun: torchrun --nproc_per_node N train_….py …")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A rank whose torchrun was killed would train on, beside the run that takes its place.
        follow_parent()
    device = _choose_device(config.device)
    if world_size > 1 and not dist.is_initialized():
        if device.type != "cpu":
            torch.accelerator.set_device_index(device.index or 0)
        backends = {"cuda": "nccl", "xpu": "xccl"}
        dist.init_process_group(backends.get(device.type, "gloo"), timeout=timedelta(minutes=30))
    runtime = Runtime(device, torch.float32, rank, world_size)
    runtime.dtype, reason = _choose_dtype(config, runtime)
    threads = "" if runtime.is_gpu else f" with {describe_threads()}"
    runtime.print(
        f"device: {device} x {world_size}{threads}; dtype: {runtime.dtype_name} ({reason}); "
        f"seed: {config.seed}"
    )
    torch.manual_seed(config.seed)
    return runtime


def _choose_device(wanted: str | None) -> torch.device:
    """See `choose_device`; under torchrun each process of a machine has a GPU of its own."""
    device = choose_device(wanted)
    if device.type == "cuda" and (device.index is None or "LOCAL_RANK" in os.environ):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def _choose_dtype(config: TrainConfig, runtime: Runtime) -> tuple[torch.dtype, str]:
    """(dtype of matrix products, why)."""
    if config.dtype == "float32":
        return torch.float32, "asked for"
    # A wider model's product takes minutes, and is no different.
    is_good = _is_bfloat16_worth_it(runtime.device, min(find_dim(config), MEASURED_DIM))
    # One choice for all ranks.
    if runtime.sum_over_ranks(is_good)[0] == runtime.world_size:
        return torch.bfloat16, "weights stay float32"
    return torch.float32, "bfloat16 is not faster here"


def _is_bfloat16_worth_it(device: torch.device, dim: int) -> bool:
    """Whether bfloat16 is worth it for a model that is `dim` wide.

    Some CPUs have instructions for it that are slower, or slower for a narrow model.
    """
    if device.type == "cpu":
        # Without instructions for it a large product takes many seconds: a small one tells first.
        return all(
            _product_seconds(n_rows, dim, torch.bfloat16)
            < _product_seconds(n_rows, dim, torch.float32)
            for n_rows in (32, 1024)
        )
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        ones = torch.ones(8, 8, device=device, dtype=torch.bfloat16)
        return bool((ones @ ones).isfinite().all())
    except (RuntimeError, TypeError):
        return False


def _product_seconds(n_rows: int, dim: int, dtype: torch.dtype) -> float:
    """Least time of up to five products (n_rows, dim) @ (dim, 3 * dim), in seconds."""
    x, weight = torch.ones(n_rows, dim, dtype=dtype), torch.ones(dim, 3 * dim, dtype=dtype)
    seconds = []
    while len(seconds) < 5 and sum(seconds) < 0.1:
        start = time.perf_counter()
        x @ weight
        seconds.append(time.perf_counter() - start)
    return min(seconds)
