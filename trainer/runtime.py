"""Where a run takes place: device, number format, processes, seed, and how it is asked to stop."""

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from common.errors import UserError

GPU_STEPS_UNREAD = 16  # steps that a GPU may be ahead of the host


@dataclass
class StopSignal:
    """Turns Ctrl-C and SIGTERM into a question asked after each step; a second Ctrl-C stops at once."""

    number: int = signal.SIGTERM  # the last that came, or another rank's
    is_requested: bool = False

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        self.number, self.is_requested = number, True
        signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass
class Runtime:
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    stop: StopSignal = field(default_factory=StopSignal)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, line: str) -> None:
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
        """float[] on the device, summed over all processes; the host does not wait for it."""
        total = (
            value if torch.is_tensor(value) else torch.full((), float(value), device=self.device)
        )  # no copy to wait for
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def any_rank(self, flag: bool) -> bool:
        return self.sum_over_ranks(flag)[0] > 0

    def reads_every_step(self, step: int) -> bool:
        """Whether losses and signals are read now: always on a CPU, every few steps on a GPU, lest it idle."""
        return self.device.type != "cuda" or step % GPU_STEPS_UNREAD == 0

    def from_main(self, make: Callable[[], object]) -> object:
        """What `make` returns in the main process, in every process; an error of it is raised in every process."""
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

    def peak_memory(self) -> int:
        """Bytes of the GPU, or of this process without one, in use at their height."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )

    def close(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def start_runtime(args) -> Runtime:
    """Join the other processes where torchrun started us, choose device and number format once, and seed everything."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if args.ddp and "RANK" not in os.environ:
        raise UserError("--ddp needs torchrun: torchrun --nproc_per_node N train_….py …")
    device = _choose_device(args.device)
    if world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30)
        )
    runtime = Runtime(device, torch.float32, rank, world_size)
    runtime.dtype, reason = _choose_dtype(args.dtype, runtime)
    runtime.say(
        f"device: {device} x {world_size}; numbers: {str(runtime.dtype).removeprefix('torch.')} ({reason}); seed: {args.seed}"
    )
    seed_everything(args.seed)
    return runtime


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # every device


def _choose_device(wanted: str | None) -> torch.device:
    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"--device {wanted} but PyTorch sees no GPU here: pass --device cpu, or install a CUDA build of PyTorch"
        )
    if wanted == "cuda" or (wanted.startswith("cuda") and "LOCAL_RANK" in os.environ):
        wanted = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"--device {wanted} is no device: pass cpu, cuda or cuda:0") from error


def _choose_dtype(wanted: str, runtime: Runtime) -> tuple[torch.dtype, str]:
    if wanted == "float32":
        return torch.float32, "asked for"
    if runtime.device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_faster = runtime.device.type == "cpu" and _product_seconds(
            torch.bfloat16
        ) < _product_seconds(torch.float32)
        has_bfloat16 = (
            runtime.sum_over_ranks(is_faster)[0] == runtime.world_size
        )  # one choice for all ranks
    if has_bfloat16:
        return torch.bfloat16, "weights stay float32"
    return torch.float32, "bfloat16 is not faster here"


def _product_seconds(dtype: torch.dtype) -> float:
    """Least time for a matrix product of the model's size: some CPUs have bf16 instructions that are slower than float32."""
    x, weight = torch.ones(1024, 768, dtype=dtype), torch.ones(768, 2048, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        x @ weight
        seconds.append(time.perf_counter() - start)
    return min(seconds)
