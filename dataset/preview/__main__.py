"""Check rows before training on them: what can be used, lengths, languages, and how they look.

python -m dataset.preview dataset/pretrain_vlm_data.jsonl --images dataset/pretrain_images
python -m dataset.preview my.jsonl "part-*.parquet" captions.csv --images my_images
python -m dataset.preview photos_with_a_txt_each

Every row is checked. Of a large file, pictures are opened, and tokens and languages counted, in
random rows. A page with random rows goes to OUT_DIR/preview_NAME.html. Last comes the command that
cleans the file. Exit status 1: a file has no usable row.
"""

import sys
from pathlib import Path

from common.errors import run_command
from common.flags import parse_flags
from common.packages import check_packages
from dataset.mixture import find_sources
from dataset.next_command import choose_tokenizer, write_clean_command
from dataset.preview.settings import MAX_SEQ_LEN, Settings


def main() -> None:
    settings = parse_flags(Settings(), __doc__)
    sources = find_sources(settings.data, settings.images)
    tokenizer = choose_tokenizer(settings.tokenizer)
    check_packages("requirements-data.txt", "py3langid")
    # These import PyTorch and transformers, which takes seconds.
    from dataset.preview.checks import preview
    from model.LMConfig import IMAGE_TOKEN, VLMConfig
    from model.processing import VLMProcessor, load_tokenizer

    config = VLMConfig()
    if settings.n_image_tokens:
        config = VLMConfig(image_special_token=IMAGE_TOKEN * settings.n_image_tokens)
    processor = VLMProcessor(load_tokenizer(tokenizer), None, config)

    # one file after the other; equal names get a number
    names = [Path(source.path).stem for source in sources]
    n_usable = []
    for number, (source, name) in enumerate(zip(sources, names)):
        if number:
            print()
        name += f"_{number}" if names.count(name) > 1 else ""
        page = Path(settings.out_dir) / f"preview_{name}.html"
        n_usable.append(preview(source, page, processor, settings))
        if n_usable[-1]:
            length = None if settings.max_seq_len == MAX_SEQ_LEN else settings.max_seq_len
            flags = (source.images, settings.tokenizer, length)
            print(f"next: {write_clean_command(source.path, *flags)}")
    sys.exit(0 if all(n_usable) else 1)


if __name__ == "__main__":
    run_command(main)
