"""What a run leaves to read: JSON lines, a loss curve, a progress bar, W&B if asked."""

import json
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from common.files import atomic_write, write_text
from trainer.config import TrainConfig
from trainer.paths import RunPaths


class RunLog:
    """Log of one run; on ranks other than 0 every method does nothing.

    SAVE_NAME_DIM.log.jsonl gets one object a line, SAVE_NAME_DIM.png the curve of what it holds.

    Args:
        paths: where they go.
        first_step: a resumed run keeps the lines up to this step.
        total_steps: the end of the progress bar.
        config: written as the first line.
        is_main: whether this is rank 0.
    """

    def __init__(
        self, paths: RunPaths, first_step: int, total_steps: int, config: TrainConfig, is_main: bool
    ):
        self.paths, self.is_main, self.wandb = paths, is_main, None
        self.train_points: list[tuple[int, float]] = []
        self.val_points: list[tuple[int, float]] = []
        self.start_time = time.perf_counter()
        self.bar = tqdm(
            initial=first_step,
            total=total_steps,
            desc=paths.weights.stem,
            unit="step",
            disable=not is_main,
        )
        if not is_main:
            return
        earlier = self._read_earlier_lines(first_step) if first_step else []
        write_text(paths.log, "".join(line + "\n" for line in earlier))
        self.file = open(paths.log, "a", encoding="utf-8", buffering=1)
        values = {name: value for name, value in asdict(config).items() if value is not None}
        self._write(event="start", **values)
        if config.use_wandb:
            self._start_wandb(config)

    def _read_earlier_lines(self, first_step: int) -> list[str]:
        """Lines of the log so far, without those of steps that are done again; fills the curve."""
        lines = []
        text = self.paths.log.read_text(encoding="utf-8") if self.paths.log.is_file() else ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                # The line that was being written when the run was killed.
                continue
            if record.get("step", 0) > first_step:
                continue
            lines.append(line)
            if record["event"] == "train":
                self.train_points.append((record["step"], record["loss"]))
            elif record["event"] == "validation":
                self.val_points.append((record["step"], record["val_loss"]))
        return lines

    def _start_wandb(self, config: TrainConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--use_wandb needs wandb: pip install wandb") from error
        name = (
            f"{config.save_name}-epochs{config.epochs}-batch{config.batch_size}"
            f"-lr{config.learning_rate}"
        )
        try:
            self.wandb = wandb.init(
                project=config.wandb_project, name=name, config=asdict(config), dir=config.out_dir
            )
        except (wandb.Error, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--use_wandb cannot start ({reason}): run `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def advance(self) -> None:
        """Move the progress bar by one optimizer step."""
        self.bar.update()

    def show_loss(self, loss: float) -> None:
        if self.is_main:
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def train(self, step: int, **values: float) -> None:
        if self.is_main:
            self.train_points.append((step, values["loss"]))
            self._write(event="train", step=step, **values)

    def validation(self, step: int, loss: float) -> None:
        if self.is_main:
            self.val_points.append((step, loss))
            self._write(event="validation", step=step, val_loss=loss)
            self.print(f"step {step}: validation loss {loss:.4f}")

    def event(self, event: str, **values) -> None:
        if self.is_main:
            self._write(event=event, **values)

    def print(self, line: str) -> None:
        """Print a line above the progress bar."""
        if self.is_main:
            self.bar.write(line)

    def _write(self, **record) -> None:
        record["seconds"] = round(time.perf_counter() - self.start_time, 2)
        self.file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        if self.wandb and "step" in record:
            numbers = {k: value for k, value in record.items() if isinstance(value, int | float)}
            self.wandb.log(numbers)

    def close(self) -> None:
        self.bar.close()
        if not self.is_main:
            return
        try:
            self.file.close()
            if self.train_points:
                draw_curve(self.paths.curve, self.train_points, self.val_points)
            if self.wandb:
                self.wandb.finish()
        except (OSError, UserError) as error:
            # A full disk: what ended the run matters more.
            print(f"the log is cut off or its curve not drawn: {error}", flush=True)


def draw_curve(
    path: Path, train_points: list[tuple[int, float]], val_points: list[tuple[int, float]]
) -> None:
    """Write a PNG of the loss over optimizer steps; points are (step, loss)."""
    # Without pyplot: no window system and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    steps, losses = zip(*train_points)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, as logged")
    axes.plot(steps, _smooth(losses), color="tab:blue", linewidth=2, label="training, smoothed")
    if val_points:
        axes.plot(*zip(*val_points), "o-", color="tab:orange", label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats a label token)", title=path.stem)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _smooth(losses: tuple[float, ...]) -> list[float]:
    """Exponential moving average without a bias at its start; a short run is smoothed little."""
    weight = min(0.95, max(0.0, 1 - 8 / len(losses)))
    average, total, smoothed = 0.0, 0.0, []
    for loss in losses:
        average = weight * average + (1 - weight) * loss
        total = weight * total + (1 - weight)
        smoothed.append(average / total)
    return smoothed
