"""Clean a set: repair what can be repaired, leave out what cannot be used, account for every row.

python -m dataset.clean raw.jsonl clean/ --images raw_images      # or raw_images.zip
python -m dataset.clean captions.csv clean/ --images photos
python -m dataset.clean raw.parquet clean/ --format parquet

The folder gets train.jsonl, val.jsonl and images/ (or train-00000.parquet and so on), rejects with
the reason for each row that was left out, and report.html to read. It appears when all is done.
"""

from common.errors import run_command
from common.flags import parse_flags
from common.packages import check_packages
from dataset.clean.settings import Settings
from dataset.rows import find_data_files
from model.files import find_tokenizer


def main() -> None:
    settings = parse_flags(Settings(), __doc__)
    find_data_files(settings.data)
    # The command that is printed at the end names it.
    if settings.tokenizer:
        find_tokenizer(settings.tokenizer)
    check_packages(
        "requirements-data.txt", "ftfy", "imagehash", "faiss", "scipy", "py3langid", "pyarrow"
    )
    # This imports them, which takes a second.
    from dataset.clean.run import clean

    clean(settings)


if __name__ == "__main__":
    run_command(main)
