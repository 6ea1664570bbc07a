"""How many threads PyTorch computes with on a CPU, and how long an idle one waits awake.

OpenMP, which runs these threads, reads its environment variables once, when PyTorch is imported:
`choose_threads` sets them before. A variable that the user has set is never touched.
"""

import os
import sys
from pathlib import Path

# How often an idle thread of GNU OpenMP, which PyTorch has on Linux, looks for new work before it
# falls asleep. 5,000 looks take about 0.1 ms, as long as most pauses between two products of
# matrices; its own 300,000 take 8 ms. Where other programs run too, a thread that only waits keeps
# the CPU from one that has work. `python -m scripts.bench busy` measures it. OpenMP on a Mac and on
# Windows lets others run while it waits: nothing is set there.
SPIN_COUNT = 5000
# Ways to say how an idle thread waits.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def choose_threads() -> None:
    """Set OMP_NUM_THREADS and GOMP_SPINCOUNT, unless the user did or PyTorch is imported already.

    On other systems than Linux nothing is set.
    """
    if "torch" in sys.modules or sys.platform != "linux":
        return
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    if "OMP_NUM_THREADS" not in os.environ or _is_set_by_torchrun():
        n_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        os.environ["OMP_NUM_THREADS"] = str(max(1, count_cores() // n_ranks))


def describe_threads() -> str:
    """What PyTorch computes with, such as "2 threads, GOMP_SPINCOUNT 5000"."""
    import torch

    n_threads = torch.get_num_threads()
    waiting = [f"{name} {os.environ[name]}" for name in WAITING if name in os.environ]
    return ", ".join([f"{n_threads} thread{'s' * (n_threads > 1)}", *waiting])


def count_cores() -> int:
    """Cores that this process may use: of its CPUs (taskset), under the limit of its container.

    The two hyperthreads of a core are one: they share its arithmetic units.
    """
    cores = {
        _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or cpu
        for cpu in os.sched_getaffinity(0)
    }
    return max(1, int(min(len(cores), _read_cpu_limit())))


def _read_cpu_limit() -> float:
    """CPUs that the container may use at a time, as `docker run --cpus 1.5` sets it."""
    # cgroup version 2: "150000 100000" or "max 100000"
    limit, period = (_read("/sys/fs/cgroup/cpu.max") or "max 1").split()
    if limit == "max":
        # version 1: -1 is no limit
        limit = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") or "-1"
        period = _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us") or "1"
    return int(limit) / int(period) if int(limit) > 0 else float("inf")


def _is_set_by_torchrun() -> bool:
    """Whether OMP_NUM_THREADS is the 1 that torchrun gives to ranks if the user gives nothing.

    torchrun is the parent process; the environment that it was started with does not change.
    """
    is_rank = "TORCHELASTIC_RUN_ID" in os.environ and os.environ["OMP_NUM_THREADS"] == "1"
    variables = _read(f"/proc/{os.getppid()}/environ") if is_rank else ""
    return bool(variables) and "\0OMP_NUM_THREADS=" not in "\0" + variables


def _read(path: str) -> str:
    """Text of a file of the system, "" where there is none."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
