"""What a preview can be told. Each field is a flag, but for `data`."""

from dataclasses import dataclass

from common.flags import MOST_SEED, check_options, option
from dataset.next_command import DEMO_TOKENIZER
from model.files import TOKENIZER_PATH

MAX_SEQ_LEN = 640  # that of pretraining


@dataclass(frozen=True)
class Settings:
    """UserError for a value out of range."""

    data: list[str] = option(
        [], "data files, folders, or patterns, as for training", positional=True
    )
    images: list[str] = option(
        [],
        "folders or .zips of the images that the rows name: one for all, or one for each file",
        aliases=("--images_path",),
    )
    tokenizer: str | None = option(
        None,
        f"folder of the tokenizer; if not given, {TOKENIZER_PATH}, or {DEMO_TOKENIZER} if that is "
        "not there",
    )
    max_seq_len: int = option(MAX_SEQ_LEN, "tokens a row is cut at", least=1, most=131_072)
    n_image_tokens: int | None = option(
        None,
        "tokens of an image; if not given, as many as the published models have",
        least=1,
        most=131_072,
    )
    samples: int = option(8, "rows on the contact sheet; 0: no sheet", least=0, most=256)
    seed: int = option(0, "seed of what is drawn at random", least=0, most=MOST_SEED)
    out_dir: str = option("out", "folder of the contact sheets")

    def __post_init__(self):
        check_options(self)
