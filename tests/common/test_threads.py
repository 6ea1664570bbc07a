"""PyTorch's threads: what is chosen is in force, what the user chose stays."""

import os
import re
import subprocess
import sys

import pytest

from common import threads
from tests.helpers import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing is chosen elsewhere")

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", *threads.WAITING)
REPORT = """
import os, torch
print(os.environ["OMP_NUM_THREADS"], torch.get_num_threads())
"""
CHOOSE = "import os; from common.threads import choose_threads; choose_threads(); "


def run(code: str, *command: str, **env: str) -> str:
    """What a fresh Python prints, errors too; no variable of threads is set but those of `env`."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, *command, *(["-c", code] if code else [])],
        cwd=ROOT,
        env=kept | {"PYTHONPATH": str(ROOT)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        timeout=240,
    ).stdout


def read_openmp(printed: str) -> dict[str, str]:
    """The variables as OpenMP has them: it prints them when OMP_DISPLAY_ENV is set."""
    return dict(re.findall(r"(\w+) = '(\w+)'", printed))


def test_what_run_command_chooses_is_in_force():
    code = f"from common.errors import run_command; run_command(lambda: exec({REPORT!r}))"
    printed = run(code, OMP_DISPLAY_ENV="VERBOSE")
    assert read_openmp(printed)["GOMP_SPINCOUNT"] == str(threads.SPIN_COUNT)
    n = threads.count_cores()
    assert f"{n} {n}" in printed.splitlines()


def test_loading_a_model_chooses_too():
    printed = run("from inference import load_vlm" + REPORT, OMP_DISPLAY_ENV="VERBOSE")
    assert read_openmp(printed)["GOMP_SPINCOUNT"] == str(threads.SPIN_COUNT)


def test_the_users_variables_win():
    chosen = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "ACTIVE"}
    report = f"{REPORT}from common.threads import describe_threads; print(describe_threads())"
    printed = run(CHOOSE + report, OMP_DISPLAY_ENV="VERBOSE", **chosen)
    assert read_openmp(printed)["OMP_WAIT_POLICY"] == "ACTIVE"
    # The count of that policy.
    assert read_openmp(printed)["GOMP_SPINCOUNT"] == "30000000000"
    assert "1 1" in printed.splitlines()
    assert "1 thread, OMP_WAIT_POLICY ACTIVE" in printed.splitlines()


@pytest.mark.parametrize("name", threads.WAITING)
def test_one_way_of_waiting_is_enough(name):
    printed = run(CHOOSE + "print(os.environ.get('GOMP_SPINCOUNT'))", **{name: "7"})
    assert printed == ("7\n" if name == "GOMP_SPINCOUNT" else "None\n")


def test_one_cpu_gives_one_thread():
    one = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); "
    assert run(one + CHOOSE + "print(os.environ['OMP_NUM_THREADS'])") == "1\n"


def test_nothing_changes_once_pytorch_is_imported(monkeypatch):
    """As in a notebook whose first cell imports PyTorch."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    threads.choose_threads()
    assert not set(VARIABLES) & set(os.environ)


# of torchrun's ranks
RANK = """
import os, sys
from common import threads
threads.count_cores = lambda: 6
threads.choose_threads()
# in one piece: ranks share the output
sys.stdout.write(f"threads: {os.environ['OMP_NUM_THREADS']}\\n")
"""


def test_ranks_share_the_cores(tmp_path):
    """torchrun itself gives each rank one thread."""
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    printed = run("", *torchrun, str(tmp_path / "rank.py"))
    assert printed.count("threads: 3\n") == 2


@pytest.mark.parametrize("wanted", [None, "1", "2"])
def test_ranks_keep_what_the_user_gave_to_torchrun(wanted):
    """A light stand-in for torchrun: it changes its own environment, then starts a rank."""
    torchrun = f"""
import os, subprocess, sys
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(LOCAL_WORLD_SIZE="2", TORCHELASTIC_RUN_ID="none")
subprocess.run([sys.executable, "-c", {RANK!r}], check=True)
"""
    env = {} if wanted is None else {"OMP_NUM_THREADS": wanted}
    assert run(torchrun, **env) == f"threads: {wanted or 3}\n"


# of containers and hyperthreads
@pytest.mark.parametrize(
    ("files", "n_cores"),
    [
        ({}, 4),
        ({"cpu.max": "max 100000"}, 4),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "900000 100000"}, 4),
        ({"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"}, 3),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 4),
        ({f"cpu{n}/topology/thread_siblings_list": f"{n % 2},{n % 2 + 2}" for n in range(4)}, 2),
    ],
)
def test_cores(files, n_cores, monkeypatch):
    """Four CPUs: in a container with a limit, or two cores with two hyperthreads each."""

    def read(path: str) -> str:
        return next((text for end, text in files.items() if path.endswith("/" + end)), "")

    monkeypatch.setattr(threads, "_read", read)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    assert threads.count_cores() == n_cores
