"""All that a run needs to go on where it stopped, in one file: weights, optimizer, position in the data, best loss.

There are no random states to keep: the order of the data follows from seed and epoch, and each step seeds itself.
"""

import math
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common.errors import UserError
from model.model_vlm import MiniMindVLM
from model.weights import load_weights, read_tensors, save_atomically, weights_path, weights_to_save
from trainer.runtime import Runtime
from trainer.sampler import StepBatches


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # optimizer steps done
    best_val_loss: float = math.inf


class Checkpoints:
    """Saves a run as OUT_DIR/NAME_DIM.resume/step-N.pth, at every save the weights alone as OUT_DIR/NAME_DIM.pth too."""

    def __init__(
        self,
        model: MiniMindVLM,
        optimizer: torch.optim.Optimizer,
        batches: StepBatches,
        args,
        runtime: Runtime,
    ):
        self.model, self.optimizer, self.batches, self.args, self.runtime = (
            model,
            optimizer,
            batches,
            args,
            runtime,
        )
        self.weights = weights_path(args.out_dir, args.save_name, args.dim)
        self.best = weights_path(args.out_dir, f"{args.save_name}_best", args.dim)
        self.folder = self.weights.with_suffix(".resume")
        self.saved: list[Path] = []  # by this run, or the one it goes on with
        self.run = {  # what has to be the same for a run to go on
            "rows": f"{len(batches.lengths)}, checksum {zlib.crc32(batches.lengths.tobytes()):08x}",
            "seed": args.seed,
            "dim": args.dim,
            "n_layers": args.n_layers,
        }

    def save(self, progress: Progress) -> None:
        """Write the weights and the checkpoint, then remove older checkpoints. Either file is the old or the new one, whole."""
        if not self.runtime.is_main:
            return
        weights = weights_to_save(self.model)
        path = self.folder / f"step-{progress.step:08d}.pth"
        state = {
            "run": self.run,
            "progress": asdict(progress),
            "epoch": self.batches.epoch,
            "samples_taken": self.batches.samples_taken,
            "optimizer": self.optimizer.state_dict(),
            "weights": weights,
        }
        save_atomically(state, path)
        self.saved = [other for other in self.saved if other != path] + [path]
        save_atomically(weights, self.weights)
        kept = self.saved[-self.args.keep_checkpoints :]
        for other in self.folder.iterdir():
            if other not in kept:
                other.unlink()

    def save_best(self) -> None:
        if self.runtime.is_main:
            save_atomically(weights_to_save(self.model), self.best)

    def describe_last(self) -> str:
        """What an error message says about what is safe."""
        return (
            f"; the last checkpoint is intact, --resume goes on with it: {self.saved[-1]}"
            if self.saved
            else ""
        )

    def resume(self) -> Progress:
        """Go on as --resume says: set model, optimizer and position to the newest checkpoint; a fresh start otherwise."""
        state, found = self.runtime.from_main(self._read_newest)
        if state is None:
            if self.args.resume == "yes":
                raise UserError(
                    f"--resume finds no checkpoint in {self.folder}: leave it out to start anew"
                )
            if found and not self.args.resume:
                self.runtime.say(
                    f"{self.folder} holds an earlier run, which --resume would go on with; starting anew in its place"
                )
            return Progress()
        for name, value in self.run.items():
            if state["run"].get(name) != value:
                raise UserError(
                    f"{found[-1]} is of a run with {name} {state['run'].get(name)}, now it is {value}: "
                    "use the same data and flags, or leave out --resume to start anew"
                )
        load_weights(self.model, state["weights"], found[-1])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.epoch, self.batches.samples_taken = state["epoch"], state["samples_taken"]
        self.saved = found
        progress = Progress(**state["progress"])
        self.runtime.say(
            f"resumed: {found[-1]}, {progress.step:,} steps and {self.batches.samples_done:,} samples are done"
        )
        return progress

    def _read_newest(self) -> tuple[dict | None, list[Path]]:
        """(state, checkpoints up to the one it is of); a damaged one is passed over for the one before. UserError where all are
        damaged: a run is not silently done again from its start."""
        found = list_checkpoints(self.args)
        if not self.args.resume or not found:
            return None, found
        while found:
            try:
                return read_tensors(found[-1]), found
            except UserError as error:
                self.runtime.say(f"passed over: {error}")
                found.pop()
        raise UserError(
            f"no checkpoint in {self.folder} is whole: leave out --resume to start anew"
        )


def list_checkpoints(args) -> list[Path]:
    """The checkpoints of the run that the flags describe, oldest first."""
    folder = weights_path(args.out_dir, args.save_name, args.dim).with_suffix(".resume")
    return sorted(
        path for path in folder.glob("step-*.pth") if re.fullmatch(r"step-\d+\.pth", path.name)
    )
