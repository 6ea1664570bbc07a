"""Numbers and sample answers of a run in a browser: Weights & Biases, TensorBoard."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from common.errors import UserError
from trainer.config import TrainConfig
from trainer.validation import SampleAnswer


class Dashboard(Protocol):
    """What a run shows its numbers on, besides its own log."""

    def log(self, step: int, numbers: dict[str, float]) -> None: ...

    def log_samples(self, step: int, samples: list[SampleAnswer]) -> None: ...

    def close(self) -> None: ...


def open_dashboards(
    config: TrainConfig, folder: Path, first_step: int, run_id: str
) -> list[Dashboard]:
    """Those that --use_wandb and --use_tensorboard ask for.

    Args:
        config: of the run.
        folder: of TensorBoard's files.
        first_step: steps that are done already; a resumed run has some.
        run_id: the run's name within W&B, the same for a resumed run.

    UserError where a package is missing or cannot start.
    """
    dashboards: list[Dashboard] = []
    if config.use_tensorboard:
        hint = "choose another --out_dir, or leave the flag out"
        with _starting("--use_tensorboard", "tensorboard", hint):
            dashboards.append(TensorBoardDashboard(folder, first_step))
    if config.use_wandb:
        hint = "run `wandb login`, or set WANDB_MODE=offline"
        with _starting("--use_wandb", "wandb", hint):
            dashboards.append(WandbDashboard(config, run_id))
    return dashboards


@contextmanager
def _starting(flag: str, package: str, hint: str) -> Iterator[None]:
    """Make one line of whatever goes wrong in a library that starts."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{flag} needs {package} ({error}): pip install {package}") from error
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{flag} cannot start ({reason}): {hint}") from error


class WandbDashboard:
    """Weights & Biases; WANDB_MODE=offline leaves the run in OUT_DIR/wandb."""

    def __init__(self, config: TrainConfig, run_id: str):
        import wandb

        self.make_table = wandb.Table
        name = (
            f"{config.save_name}-epochs{config.epochs}-batch{config.batch_size}"
            f"-lr{config.learning_rate}"
        )
        self.run = wandb.init(
            project=config.wandb_project,
            name=name,
            id=run_id,
            resume="allow",
            config=asdict(config),
            dir=config.out_dir,
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        # Steps that a resumed run does again are there already, and W&B takes no step twice.
        if step >= self.run.step:
            self.run.log(numbers, step=step)

    def log_samples(self, step: int, samples: list[SampleAnswer]) -> None:
        table = self.make_table(columns=list(SampleAnswer._fields), data=[*map(list, samples)])
        self.log(step, {"samples": table})

    def close(self) -> None:
        self.run.finish()


class TensorBoardDashboard:
    """Event files, which `tensorboard --logdir OUT_DIR` shows.

    A new run takes the place of an earlier one. A resumed run goes on: what the earlier one logged
    after `first_step` is done again, so TensorBoard is told to forget it.
    """

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        if not first_step:
            for earlier in folder.glob("events.out.tfevents.*"):
                earlier.unlink()
        self.writer = SummaryWriter(folder, purge_step=first_step + 1 if first_step else None)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)
        # A killed run leaves all that it has logged.
        self.writer.flush()

    def log_samples(self, step: int, samples: list[SampleAnswer]) -> None:
        for row, *texts in samples:
            question, answer, given = (" ".join(text.split()) for text in texts)
            # Markdown: two spaces end a line.
            text = f"**{question}**  \nright: {answer}  \ngiven: {given}"
            self.writer.add_text(f"samples/row_{row}", text, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
