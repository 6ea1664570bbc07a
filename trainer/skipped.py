"""Rows that training leaves out: counted over all processes, and said while there is time."""

from collections import Counter

from common.errors import UserError, list_reasons
from trainer.collate import Batch
from trainer.runtime import Runtime

# Of the rows of an epoch so far: what is said, and what ends the run.
SHARE_SAID, SHARE_FATAL = 0.05, 0.5
# By chance the first rows may be the bad ones; a handful of rows is only tried out.
LEAST_SAID, LEAST_FATAL = 10, 32


class SkippedRows:
    """Counts the rows of a run that could not be used, by reason.

    Every rank adds what it sees; `share` adds up those of all ranks, so that all of them know, and
    decide, the same.

    Args:
        runtime: its ranks.
        n_rows: of an epoch.
    """

    def __init__(self, runtime: Runtime, n_rows: int):
        self.runtime, self.n_rows = runtime, n_rows
        self.reasons: Counter[str] = Counter()  # of the run so far, on all ranks
        # by epoch: all rows, and those left out
        self._seen: Counter[int] = Counter()
        self._skipped: Counter[int] = Counter()
        self._epochs_said: set[int] = set()
        # (epoch, reason) of this rank, since the last `share`; a row that was used has reason ""
        self._unshared: Counter[tuple[int, str]] = Counter()

    def add(self, epoch: int, micro_batches: list[Batch]) -> None:
        """Count the rows of an optimizer step; nothing is asked of other ranks."""
        for batch in micro_batches:
            self._unshared[epoch, ""] += len(batch.indices)
            for reason, count in batch.skipped.items():
                self._unshared[epoch, reason] += count

    def share(self) -> list[str]:
        """Add up the counts of all ranks, which have to call this together.

        Returns a line for each epoch in which too many rows are left out, once; UserError where
        those are most of the epoch so far.
        """
        new = sum(self.runtime.gather(self._unshared), Counter())
        self._unshared = Counter()
        for (epoch, reason), count in new.items():
            self._seen[epoch] += count
            if reason:
                self._skipped[epoch] += count
                self.reasons[reason] += count
        lines = [self._judge(epoch) for epoch in sorted({epoch for epoch, _ in new})]
        return [line for line in lines if line]

    def _judge(self, epoch: int) -> str | None:
        """What has to be said of an epoch now; UserError where it has to end."""
        skipped, seen = self._skipped[epoch], self._seen[epoch]
        found = (
            f"{skipped:,} of {seen:,} rows of epoch {epoch + 1} could not be used "
            f"(in all epochs: {list_reasons(self.reasons)})"
        )
        if skipped > SHARE_FATAL * seen and skipped >= LEAST_FATAL:
            raise UserError(
                f"{found}: `python -m dataset.preview` shows what is wrong with them, "
                "or their pictures are gone"
            )
        is_much = skipped > SHARE_SAID * seen
        is_much = is_much and skipped >= min(LEAST_SAID, SHARE_SAID * self.n_rows)
        if not is_much or epoch in self._epochs_said:
            return None
        self._epochs_said.add(epoch)
        return f"warning: {found}"
