"""What a cleaning can be told. Each field is a flag, but for `data` and `out`."""

import os
import re
from dataclasses import asdict, dataclass
from typing import Literal

from common.errors import UserError
from common.flags import MOST_SEED, check_options, option
from dataset.rows import find_data_files


@dataclass(frozen=True)
class Settings:
    """UserError for a value out of range."""

    data: str = option("", "rows to clean: a data file, or a folder of one", positional=True)
    out: str = option("", "new folder for the cleaned set", positional=True)
    images: str | None = option(None, "folder or .zip of the pictures that the rows name")
    format: Literal["jsonl", "parquet"] = option("jsonl", "format of the cleaned set")
    size: int = option(
        128, "pixels a side that pictures get; 0 leaves them as they are", least=0, most=4096
    )
    min_answer: int = option(
        2, "least characters of a row's answers together", least=0, most=1_000_000
    )
    max_answer: int = option(
        4000, "most characters of a row's answers together", least=1, most=1_000_000
    )
    min_side: int = option(32, "least pixels of a picture's shorter side", least=1, most=1_000_000)
    max_aspect: float = option(
        5.0, "largest ratio of a picture's longer to shorter side", least=1, most=1_000_000
    )
    languages: list[str] = option([], "languages of the answers, such as en zh; any if not given")
    keep_duplicates: bool = option(False, "keep copies and near copies of other pictures")
    keep_repeats: bool = option(False, "keep rows whose answers repeat those of an earlier row")
    max_repeats: int = option(
        100, "rows that stay of those with the same short answer", least=1, most=1_000_000_000
    )
    val_share: float | None = option(
        None,
        "share of the rows for validation, up to 0.5; if not given, 0.01, but of a small set 0.1 "
        "up to 100 rows, and at least 10 rows up to a fifth of the set",
        least=0,
        most=0.5,
    )
    seed: int = option(0, "seed of the choice of validation rows", least=0, most=MOST_SEED)
    processes: int = option(
        os.cpu_count() or 1, "processes that work at the same time", least=1, most=1024
    )

    # What the training command that is printed at the end says; cleaning does not use it.
    tokenizer: str | None = option(
        None,
        "its folder of the tokenizer; if not given, that of the weights that it starts from",
        group="training command, printed at the end",
    )
    max_seq_len: int | None = option(
        None,
        "its tokens at which a sample is cut off; its default if not given",
        least=1,
        most=131_072,
    )

    def __post_init__(self):
        check_options(self)
        for code in self.languages:
            if not re.fullmatch("[a-z]{2,3}", code):
                raise UserError(f"--languages {code}: give codes such as en zh")

    def describe(self) -> dict:
        """All that the result depends on, the version of the data file too."""
        [file] = find_data_files(self.data)
        status, values = file.stat(), asdict(self)
        for name in ("processes", "tokenizer", "max_seq_len"):
            del values[name]
        return values | {"bytes": status.st_size, "modified": status.st_mtime_ns}
