"""What a run leaves for people to read: JSON lines, a loss curve, a progress bar, Weights & Biases when asked."""

import json
import time
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from common.files import write_text


class RunLog:
    """Log of one run. On ranks other than 0 every method does nothing.

    SAVE_NAME_DIM.log.jsonl gets one object a line, SAVE_NAME_DIM.png the curve of what it holds. A run that goes on at
    `first_step` keeps the lines up to there.
    """

    def __init__(self, path: Path, first_step: int, total_steps: int, args, is_main: bool):
        self.path, self.is_main, self.wandb = path, is_main, None
        self.train_points: list[tuple[int, float]] = []
        self.val_points: list[tuple[int, float]] = []
        self.start_time = time.perf_counter()
        self.progress = tqdm(
            initial=first_step,
            total=total_steps,
            desc=path.name.removesuffix(".log.jsonl"),
            unit="step",
            disable=not is_main,
        )
        if not is_main:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = self._keep_lines(first_step) if first_step else []
        write_text(path, "".join(line + "\n" for line in kept))
        self.file = open(path, "a", encoding="utf-8", buffering=1)
        self._write(
            event="start",
            **{name: value for name, value in vars(args).items() if value is not None},
        )
        if args.use_wandb:
            self._start_wandb(args)

    def _keep_lines(self, first_step: int) -> list[str]:
        """Lines of the log so far, without those of steps that will be done again; the curve's points are read off them."""
        kept = []
        for line in (
            self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        ):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line that was being written when the run was killed
            if record.get("step", 0) <= first_step:
                kept.append(line)
                if record["event"] == "train":
                    self.train_points.append((record["step"], record["loss"]))
                elif record["event"] == "validation":
                    self.val_points.append((record["step"], record["val_loss"]))
        return kept

    def _start_wandb(self, args) -> None:
        import wandb

        try:
            name = f"{args.save_name}-epochs{args.epochs}-batch{args.batch_size}-lr{args.learning_rate}"
            self.wandb = wandb.init(
                project=args.wandb_project, name=name, config=vars(args), dir=args.out_dir
            )
        except (wandb.Error, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--use_wandb cannot start ({reason}): run `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def step(self) -> None:
        """One optimizer step is done."""
        self.progress.update()

    def show_loss(self, loss: float) -> None:
        if self.is_main:
            self.progress.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def train(self, step: int, **values: float) -> None:
        if self.is_main:
            self.train_points.append((step, values["loss"]))
            self._write(event="train", step=step, **values)

    def validation(self, step: int, loss: float) -> None:
        if self.is_main:
            self.val_points.append((step, loss))
            self._write(event="validation", step=step, val_loss=loss)
            self.say(f"step {step}: validation loss {loss:.4f}")

    def event(self, event: str, **values) -> None:
        if self.is_main:
            self._write(event=event, **values)

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        if self.is_main:
            self.progress.write(line)

    def _write(self, **record) -> None:
        record["seconds"] = round(time.perf_counter() - self.start_time, 2)
        self.file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        if self.wandb and "step" in record:
            self.wandb.log(
                {name: value for name, value in record.items() if isinstance(value, (int, float))}
            )

    def close(self) -> None:
        self.progress.close()
        if self.is_main:
            try:
                self._finish()
            except OSError as error:  # a full disk; what ended the run matters more
                print(f"the log is cut off or its curve not drawn: {error}", flush=True)

    def _finish(self) -> None:
        self.file.close()
        if self.train_points:
            draw_curve(
                self.path.with_name(self.path.name.replace(".log.jsonl", ".png")),
                self.train_points,
                self.val_points,
            )
        if self.wandb:
            self.wandb.finish()


def draw_curve(
    path: Path, train_points: list[tuple[int, float]], val_points: list[tuple[int, float]]
) -> None:
    """Write a PNG of the loss over optimizer steps."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

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
    figure.savefig(path)


def _smooth(losses: tuple[float, ...]) -> list[float]:
    """Exponential moving average, started unbiased; a short run is smoothed little."""
    weight = min(0.95, max(0.0, 1 - 8 / len(losses)))
    average, total, smoothed = 0.0, 0.0, []
    for loss in losses:
        average, total = weight * average + (1 - weight) * loss, weight * total + (1 - weight)
        smoothed.append(average / total)
    return smoothed
