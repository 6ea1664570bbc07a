"""All that a run needs to continue where it stopped, in one file.

That is weights, optimizer, position in the data, best loss, and the options. There are no random
states to keep: the order of the data follows from seed and epoch.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common.errors import UserError
from common.owner import Owner, sweep_partials
from model.model_vlm import MiniMindVLM
from model.tensor_files import check_numbers, read_tensors, refusing_damage, save_atomically
from model.weights import load_weights, read_weights, save_weights, select_weights
from trainer.config import TrainConfig
from trainer.glance import find_opening_questions
from trainer.paths import find_init_weights, list_run_states, run_paths
from trainer.runtime import Runtime
from trainer.sampler import StepSampler
from trainer.signature import describe_identity, list_changes, list_differences, name_stage

SAVE_SECONDS = 60  # between saves, by default
# of a run state
PARTS = {
    "run": dict,
    "config": dict,
    "progress": dict,
    "epoch": int,
    "samples_taken": int,
    "optimizer": dict,
    "weights": dict,
}


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # optimizer steps done
    val_loss: float | None = None  # the last one measured
    best_val_loss: float = math.inf


class RunState:
    """Starts, saves and resumes a run.

    Every save writes OUT_DIR/NAME_DIM.resume/step-N.pth, and the weights alone as
    OUT_DIR/NAME_DIM.pth with the JSON that describes them.

    Args:
        model, optimizer, sampler: what is saved, and set when a run is resumed.
        train_data: its tokenizer and its most frequent question belong to the weights.
        config: the options of the run.
        runtime: only its main process writes.
    """

    def __init__(
        self,
        model: MiniMindVLM,
        optimizer: torch.optim.Optimizer,
        sampler: StepSampler,
        train_data,
        config: TrainConfig,
        runtime: Runtime,
    ):
        self.model, self.optimizer, self.sampler = model, optimizer, sampler
        self.train_data, self.config, self.runtime = train_data, config, runtime
        self.paths = run_paths(config, model.config.dim)
        self.saved: list[Path] = []  # by this run or the one it continues
        self.saved_at = time.monotonic()
        self.progress = Progress()
        self.owner: Owner | None = None
        self.questions = find_opening_questions(train_data) if runtime.is_main else {}
        self.identity = describe_identity(model, train_data) if runtime.is_main else {}

    def start(self) -> None:
        """Resume from the newest run state if --resume asks for it; else load --init_weights.

        UserError where another run writes the same files.
        """
        self.runtime.from_main(self._take_over)
        state, found = self.runtime.from_main(self._read_newest)
        if state is not None:
            self._resume(state, found)
            return
        if self.config.resume == "yes":
            raise UserError(
                f"--resume finds no run state in {self.paths.resume}: leave it out to start a new "
                "run"
            )
        if found and not self.config.resume:
            self.runtime.print(
                f"{self.paths.resume} holds an earlier run, which --resume would continue; "
                "a new one takes its place"
            )
        path = find_init_weights(self.config)
        if path is not None:
            load_weights(self.model, read_weights(path), path, language_only=True)
        self.runtime.print(f"starts from: {path or 'the weights of the model as it is'}")

    def _take_over(self) -> None:
        """Become the owner of the run's files, and remove what killed processes left of some."""
        paths = self.paths
        self.owner = Owner(
            paths.weights.with_suffix(".lock"),
            f"{paths.weights.with_suffix('')}.*: wait for its end, or choose another --save_name",
        )
        if self.owner.is_held:
            for path in (paths.weights, paths.best):
                sweep_partials(path.parent, f"{path.stem}.")
            sweep_partials(paths.resume, "step-")

    def close(self) -> None:
        """Let another run write the files."""
        if self.owner is not None:
            self.owner.release()

    def _read_newest(self) -> tuple[dict | None, list[Path]]:
        """(the newest whole run state or None, the files up to it).

        A damaged file is passed over for the one before it. UserError where all are damaged: a run
        is never done again from its start without a word; and where the newest is of another run.
        """
        found = list_run_states(self.paths.resume)
        if not self.config.resume or not found:
            return None, found
        while found:
            try:
                state = read_run_state(found[-1])
            except UserError as error:
                self.runtime.print(f"passed over: {error}")
                found.pop()
            else:
                self._check(state, found[-1])
                return state, found
        raise UserError(
            f"no run state in {self.paths.resume} is whole: leave out --resume to start a new run"
        )

    def _check(self, state: dict, path: Path) -> None:
        """UserError unless a run state is of this run; what is another option now is said."""
        differences = list_differences(state, self.config, self.identity)
        if differences:
            raise UserError(
                f"{path} is of a run with {differences}: use the same data and flags, or leave out "
                "--resume to start a new run"
            )
        changes = list_changes(state["config"], self.config)
        if changes:
            self.runtime.print(f"changed since: {changes}")

    def _resume(self, state: dict, found: list[Path]) -> None:
        """Set model, optimizer and position to what the newest file holds."""
        path = found[-1]
        load_weights(self.model, state["weights"], path)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{path} is of a run that trained other parameters ({error}): is it of the other "
                "stage? Leave out --resume to start a new run"
            ) from error
        self.sampler.epoch = state["epoch"]
        self.sampler.samples_taken = state["samples_taken"]
        self.saved = found
        self.progress = Progress(**state["progress"])
        self.runtime.print(
            f"resumed: {path}, {self.progress.step:,} steps and "
            f"{self.sampler.samples_done:,} samples are done"
        )

    def is_save_due(self) -> bool:
        """Every --save_interval steps; else once a minute, at a step that all ranks read.

        Clocks of ranks differ: a rank that reads alone would wait for the others forever.
        """
        step, interval = self.progress.step, self.config.save_interval
        if interval is not None:
            return step % interval == 0
        return self.runtime.is_read_due(step) and time.monotonic() > self.saved_at + SAVE_SECONDS

    def describe_newest(self) -> str:
        """The end of an error message: which run state is safe."""
        if not self.saved:
            return ""
        return f"; the last run state is intact, --resume continues from it: {self.saved[-1]}"

    def save(self) -> None:
        """Write the run state and the weights, then remove older run states.

        Each file is the old or the new one, whole, whenever the process stops.
        """
        self.saved_at = time.monotonic()
        if not self.runtime.is_main:
            return
        path = self.paths.resume / f"step-{self.progress.step:08d}.pth"
        state = {
            "run": self.identity,
            "config": asdict(self.config),
            "progress": asdict(self.progress),
            "epoch": self.sampler.epoch,
            "samples_taken": self.sampler.samples_taken,
            "optimizer": self.optimizer.state_dict(),
            "weights": select_weights(self.model),
        }
        save_atomically(state, path)
        self.saved = [other for other in self.saved if other != path] + [path]
        self._save_weights(self.paths.weights)
        # Older ones, and those of an earlier run; nothing that is not ours.
        newest = self.saved[-self.config.keep_run_states :]
        for other in list_run_states(self.paths.resume):
            if other not in newest:
                other.unlink()

    def save_if_best(self, val_loss: float) -> None:
        """Remember the validation loss; write the weights if it is the lowest so far."""
        self.progress.val_loss = val_loss
        if val_loss < self.progress.best_val_loss:
            self.progress.best_val_loss = val_loss
            if self.runtime.is_main:
                self._save_weights(self.paths.best)

    def _save_weights(self, path: Path) -> None:
        """The weights and what they are, see model/weights.py."""
        save_weights(
            self.model,
            path,
            tokenizer=self.train_data.processor.tokenizer.name_or_path,
            vision_model=self.model.vision_encoder.name_or_path,
            stage=name_stage(self.model),
            data=self.config.data_path,
            **self.questions,
            step=self.progress.step,
            val_loss=self.progress.val_loss,
        )


def read_run_state(path: Path) -> dict:
    """What `RunState.save` wrote; UserError where it is damaged, holds nan, or is something else.

    Going on from nan would write weights of nan as if nothing were wrong.
    """
    state = read_tensors(path)
    if not isinstance(state, dict) or not all(
        isinstance(state.get(name), kind) for name, kind in PARTS.items()
    ):
        raise UserError(f"{path} holds weights or something else, no run state")
    with refusing_damage(path):
        Progress(**state["progress"])
        check_numbers(state["weights"], path)
        for number, averages in state["optimizer"]["state"].items():
            named = {f"{name} of parameter {number}": one for name, one in averages.items()}
            check_numbers(named, path)
    return state
