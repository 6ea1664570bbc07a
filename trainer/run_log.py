"""What a run leaves to read: JSON lines, a loss curve, a progress bar, dashboards if asked."""

import json
import time
import uuid
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError, list_reasons
from common.files import atomic_write, write_text
from trainer.config import TrainConfig
from trainer.dashboard import open_dashboards
from trainer.paths import RunPaths
from trainer.validation import Validation

# The curve is drawn during the run: not sooner again than this, and in at most 1 % of the time.
CURVE_SECONDS = 20
CURVE_SHARE = 0.01
LINE_WIDTH = 88  # of a printed sample answer


class RunLog:
    """Log of one run; on ranks other than 0 every method does nothing.

    SAVE_NAME_DIM.log.jsonl gets one object a line, SAVE_NAME_DIM.png the curve of what it holds. A
    resumed run goes on in both: it keeps the lines up to its first step, and counts its seconds
    from the last one.

    Args:
        paths: where they go.
        first_step: steps that are done already.
        total_steps: the end of the progress bar.
        config: written as the first line.
        is_main: whether this is rank 0.
    """

    def __init__(
        self, paths: RunPaths, first_step: int, total_steps: int, config: TrainConfig, is_main: bool
    ):
        self.paths, self.is_main, self.dashboards = paths, is_main, []
        self.train_points: list[tuple[int, float]] = []
        self.val_points: list[tuple[int, float]] = []
        self.seconds_before = 0.0  # of the run that is resumed
        self.wandb_id = uuid.uuid4().hex[:8]
        earlier = self._read_earlier_lines(first_step) if first_step and is_main else []

        # first what may fail, so that an earlier log stays as it is
        if is_main:
            Path(config.out_dir).mkdir(parents=True, exist_ok=True)
            self.dashboards = open_dashboards(config, paths.tensorboard, first_step, self.wandb_id)

        # time goes on where it stopped: the bar's rate is that of all steps
        self.start_time = time.perf_counter() - self.seconds_before
        self.curve_due = time.perf_counter() + CURVE_SECONDS
        self.bar = tqdm(
            initial=first_step,
            total=total_steps,
            desc=paths.weights.stem,
            unit="step",
            disable=not is_main,
        )
        if self.seconds_before:
            self.bar.start_t -= self.seconds_before
            self.bar.initial = 0
        if not is_main:
            return

        # the log, from its first line on
        if config.use_tensorboard:
            self.print(f"watch it: tensorboard --logdir {config.out_dir}")
        write_text(paths.log, "".join(line + "\n" for line in earlier))
        self.file = open(paths.log, "a", encoding="utf-8", buffering=1)
        values = {name: value for name, value in asdict(config).items() if value is not None}
        if config.use_wandb:
            values["wandb_id"] = self.wandb_id
        self._write(event="start", step=first_step, **values)

    def _read_earlier_lines(self, first_step: int) -> list[str]:
        """Lines of the log so far, without those of steps that are done again.

        Curve, seconds and W&B's name of the run go on from them.
        """
        lines = []
        text = self.paths.log.read_text(encoding="utf-8") if self.paths.log.is_file() else ""
        for line in text.removesuffix("\n").split("\n"):
            try:
                record = json.loads(line)
            except ValueError:
                # The line that was being written when the run was killed.
                continue
            if record.get("step", 0) > first_step:
                continue
            lines.append(line)
            self.seconds_before = record["seconds"]
            self.wandb_id = record.get("wandb_id", self.wandb_id)
            if record["event"] == "train":
                self.train_points.append((record["step"], record["loss"]))
            elif record["event"] == "validation":
                self.val_points.append((record["step"], record["val_loss"]))
        return lines

    def advance(self) -> None:
        """Move the progress bar by one optimizer step."""
        self.bar.update()

    def show(self, loss: float, n_skipped: int) -> None:
        """Numbers beside the progress bar; rows that were left out only if there are any."""
        if self.is_main:
            skipped = {"skipped": n_skipped} if n_skipped else {}
            self.bar.set_postfix(loss=f"{loss:.3f}", **skipped, refresh=False)

    def train(self, step: int, **numbers: float) -> None:
        if self.is_main:
            self.train_points.append((step, numbers["loss"]))
            self._write_numbers("train", step, numbers)

    def validation(self, step: int, validation: Validation) -> None:
        """Log and print the loss and the sample answers."""
        if not self.is_main:
            return
        self.val_points.append((step, validation.loss))
        self._write_numbers("validation", step, {"val_loss": validation.loss})
        left_out = f" (left out: {list_reasons(validation.skipped)})" if validation.skipped else ""
        self.print(f"step {step}: validation loss {validation.loss:.4f}{left_out}")
        for sample in validation.samples:
            self._write(event="sample", step=step, **sample._asdict())
            for name, text in zip(("asked", "right", "given"), sample[1:]):
                self.print(f"  {name}  {' '.join(text.split())[:LINE_WIDTH]}")
        for dashboard in self.dashboards:
            dashboard.log_samples(step, validation.samples)

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

    def _write_numbers(self, event: str, step: int, numbers: dict[str, float]) -> None:
        """Write a line, show its numbers, and draw the curve anew if the last one is old."""
        self._write(event=event, step=step, **numbers)
        for dashboard in self.dashboards:
            dashboard.log(step, numbers)
        if time.perf_counter() >= self.curve_due and self.train_points:
            self._draw_curve()

    def _draw_curve(self) -> None:
        """Draw what is known so far, and decide when to do so next."""
        # Importing takes a second, once: the end of the run needs it anyway.
        import matplotlib.figure  # noqa: F401

        start = time.perf_counter()
        draw_curve(self.paths.curve, self.train_points, self.val_points)
        end = time.perf_counter()
        self.curve_due = end + max(CURVE_SECONDS, (end - start) / CURVE_SHARE)

    def close(self) -> None:
        self.bar.close()
        if not self.is_main:
            return
        try:
            self.file.close()
            if self.train_points:
                self._draw_curve()
            for dashboard in self.dashboards:
                dashboard.close()
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
