"""What the server that forks test scripts imports once, and what a forked script does first."""

import os
import runpy
import signal
import sys
from pathlib import Path

import torch
import torch._dynamo
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPVisionModel

PRELOADED = (
    torch,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    CLIPImageProcessorPil,
    CLIPVisionModel,
)


def run_forked(command: list[str], env: dict[str, str], stdin: str, printed: str) -> None:
    """Be `python COMMAND` with that environment, input and output.

    Args:
        command: a script and its arguments, or "-m", a module and its arguments.
        env: what is added to the environment.
        stdin: path of a file that is read as standard input.
        printed: path of a file that gets standard output and errors.
    """
    os.dup2(os.open(stdin, os.O_RDONLY), 0)
    descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        # By lines, as Python does it for a terminal: the two outputs keep their order.
        setattr(sys, name, open(number, mode, 1, encoding="utf-8", closefd=False))
    os.environ.update(env)
    os.chdir(Path(__file__).parents[1])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    signal.signal(signal.SIGINT, signal.default_int_handler)

    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
