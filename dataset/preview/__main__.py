"""Check rows before training on them: what can be used, how long they are, which languages, how they look.

python -m dataset.preview dataset/pretrain_vlm_data.jsonl --images dataset/pretrain_images
python -m dataset.preview my.jsonl "part-*.parquet" --images my_images

Every row is checked. Of a large file, pictures are opened, and tokens and languages counted, in random rows. A sheet of random
samples goes to OUT_DIR/preview_NAME.png. Exit status 1: a file has no usable row.
"""

import argparse
import sys
from array import array
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.errors import BadSampleError, run_command
from dataset.images import ImageFolder, split_names
from dataset.language import UNSURE, detect_language
from dataset.mixture import Source, find_sources
from dataset.preview.contact_sheet import Sample, draw_sheet, load_font, split_pieces
from dataset.rows import JsonLinesRows, ParquetRows
from dataset.vlm_dataset import check_row, list_images, open_rows
from model.image import load_image
from model.LMConfig import IMAGE_TOKEN, VLMConfig
from model.processing import TOKENIZER_PATH, VLMProcessor, count_labels, load_tokenizer

MOST_MEASURED = 10_000  # rows whose tokens and languages are counted
MOST_OPENED = 500  # rows whose pictures are opened
MOST_PLACES = 3  # of each reason that are shown
PERCENTILES = (1, 50, 90, 99, 100)
UNCUT = 2**31 - 1  # tokens


class Checked:
    """What the checks of a file found. `usable` are keys of rows; `n_images` and `n_answers` belong to them."""

    def __init__(self):
        self.usable, self.n_images, self.n_answers = array("q"), array("i"), array("i")
        self.left_out: Counter[str] = Counter()  # rows by reason
        self.places: dict[str, list[tuple[int, str]]] = defaultdict(
            list
        )  # (key, detail) of the first of each reason
        self.n_repaired = self.n_opened = 0

    def leave_out(self, key: int, error: BadSampleError) -> None:
        self.left_out[error.args[0]] += 1
        if len(self.places[error.args[0]]) < MOST_PLACES:
            self.places[error.args[0]].append((key, error.detail))

    @property
    def n_rows(self) -> int:
        return len(self.usable) + self.left_out.total()


class Measured(NamedTuple):
    """Of each of n rows, int64[n]; and the languages of their answers."""

    tokens: np.ndarray
    labels: np.ndarray
    labels_kept: np.ndarray  # after cutting
    languages: Counter[str]


def check_rows(rows: JsonLinesRows | ParquetRows) -> Checked:
    """Check every row; no picture is opened."""
    checked, listed = Checked(), list_images(rows)
    for key, _, row in rows.scan():
        try:
            turns, n_images, surplus = check_row(rows, row, listed)
        except BadSampleError as error:
            checked.leave_out(key, error)
            continue
        checked.usable.append(key)
        checked.n_images.append(n_images)
        checked.n_answers.append(sum(role == "assistant" for role, _ in turns))
        checked.n_repaired += surplus > 0
    return checked


def open_pictures(
    rows: JsonLinesRows | ParquetRows, checked: Checked, rng: np.random.Generator
) -> list[int]:
    """Open the pictures of up to MOST_OPENED usable rows, leave out those where that fails. Returns the keys of the others, in
    random order."""
    order = rng.permutation(len(checked.usable))[:MOST_OPENED].tolist()
    bad: dict[int, BadSampleError] = {}
    for index in tqdm(order, desc="open pictures", unit="row", leave=False, delay=1):
        try:
            open_all(rows, rows.read(checked.usable[index]))
        except BadSampleError as error:
            bad[index] = error
    good = [checked.usable[index] for index in order if index not in bad]
    for index in sorted(bad):
        checked.leave_out(checked.usable[index], bad[index])
    for index in sorted(bad, reverse=True):
        del checked.usable[index], checked.n_images[index], checked.n_answers[index]
    checked.n_opened = len(order)
    return good


def open_all(rows: JsonLinesRows | ParquetRows, row: dict) -> list[Image.Image]:
    """The row's pictures; a BadSampleError names the one that cannot be opened."""
    names = split_names(row.get("image"))  # of a .jsonl
    pictures = []
    for number, source in enumerate(rows.images(row)):
        try:
            pictures.append(load_image(source))
        except BadSampleError as error:
            name = names[number] if names else f"picture {number}"
            detail = error.detail if name in error.detail else f"{name}: {error.detail}"
            raise BadSampleError(error.args[0], detail) from error
    return pictures


def measure_rows(
    rows: JsonLinesRows | ParquetRows, keys: list[int], processor: VLMProcessor, max_seq_len: int
) -> Measured:
    """Count tokens, label tokens, and what is left of these at `max_seq_len`; tell the languages of the answers."""
    counts, languages = [], Counter()
    for key in tqdm(keys, desc="count tokens", unit="row", leave=False, delay=1):
        row = rows.read(key)
        turns, n_images, _ = check_row(rows, row, None)
        whole, _, n_labels_kept = encode_and_cut(row, n_images, processor, max_seq_len)
        counts.append((len(whole["labels"]), count_labels(whole["labels"]), n_labels_kept))
        languages.update(detect_language(content) for role, content in turns if role == "assistant")
    return Measured(*np.array(counts, np.int64).reshape(-1, 3).T, languages)


def encode_and_cut(
    row: dict, n_images: int, processor: VLMProcessor, max_seq_len: int
) -> tuple[dict, int, int]:
    """({input_ids, labels} of the whole row, tokens and label tokens left of it at `max_seq_len`: none where no answer is)."""
    whole, _ = processor.encode_text(row["conversations"], [None] * n_images, UNCUT)
    kept = whole
    if len(whole["labels"]) > max_seq_len:
        try:
            kept, _ = processor.encode_text(row["conversations"], [None] * n_images, max_seq_len)
        except BadSampleError:
            return whole, 0, 0
    return whole, len(kept["labels"]), count_labels(kept["labels"])


def write_sheet(
    path: Path,
    rows: JsonLinesRows | ParquetRows,
    keys: list[int],
    processor: VLMProcessor,
    max_seq_len: int,
    about: str,
) -> None:
    """Draw the rows of these `keys` into a PNG."""
    samples = []
    for key, place in zip(keys, rows.name_places(keys)):
        row = rows.read(key)
        images = open_all(rows, row)
        whole, n_kept, n_labels_kept = encode_and_cut(row, len(images), processor, max_seq_len)
        n_tokens, n_labels = len(whole["labels"]), count_labels(whole["labels"])
        title = f"{place}  ·  {n_tokens:,} tokens, {n_labels:,} learned"
        if n_kept < n_tokens:
            title += f"  ·  {n_tokens - n_kept:,} cut away, {n_labels - n_labels_kept:,} of them to learn"
            title += "" if n_kept else "  ·  no answer is left: not trained on"
        samples.append(Sample(title, images, split_pieces(whole, n_kept, processor)))
    sheet = draw_sheet(samples, rows.path.name, about, processor.config.n_image_tokens, max_seq_len)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def show_source(source: Source, rows: JsonLinesRows | ParquetRows) -> None:
    line = source.path
    if isinstance(rows, JsonLinesRows):
        folder = rows.image_source
        is_there = not isinstance(folder, ImageFolder) or folder.path.is_dir()
        line += f"   images: {folder.path if folder else 'no --images given'}{'' if is_there else ', which is not there'}"
    print(
        line
        + (f"   each row {float(source.weight):g} times an epoch" if source.weight != 1 else "")
    )


def show_checks(rows: JsonLinesRows | ParquetRows, checked: Checked) -> None:
    """Print how many rows can be used, and where the others are."""
    n_rows = checked.n_rows
    show("rows", f"{n_rows:,}")
    show("usable", f"{len(checked.usable):,}{share(len(checked.usable), n_rows)}")
    n_left_out = checked.left_out.total()
    show("left out", f"{n_left_out:,}{share(n_left_out, n_rows) if n_left_out else ''}")
    for reason, count in checked.left_out.most_common():
        print(f"  {count:>7,}  {reason}")
        keys = [key for key, _ in checked.places[reason]]
        for (key, detail), place in zip(checked.places[reason], rows.name_places(keys)):
            detail = one_line(
                detail or (rows.explain(key) if reason == "not a JSON object" else "")
            )
            print(f"           {place:<12} {detail}".rstrip())
    if checked.n_repaired:
        show(
            "repaired",
            f"{checked.n_repaired:,}  (more <image> than images: the last ones are dropped)",
        )
    if checked.n_opened < len(checked.usable):
        show(
            "pictures",
            f"those of {checked.n_opened:,} random rows were opened, of the others their names looked up",
        )
    if checked.usable:
        show("images per row", list_counts(checked.n_images))
        show("answers per row", list_counts(checked.n_answers))


def show_measures(measured: Measured, n_usable: int, tokenizer: str, max_seq_len: int) -> None:
    """Print lengths, what cutting costs, languages."""
    n_rows, tokens, labels = len(measured.tokens), measured.tokens, measured.labels
    which = f"{n_rows:,} random usable rows" if n_rows < n_usable else "all usable rows"
    print(f"\nin {which}, with the tokenizer {tokenizer}")
    show("", "".join(f"{name:>8}" for name in ("p1", "median", "p90", "p99", "longest", "mean")))
    for name, lengths in (("tokens per row", tokens), ("learned of them", labels)):
        numbers = [*np.percentile(lengths, PERCENTILES), lengths.mean()]
        show(name, "".join(f"{number:>8,.0f}" for number in numbers))
    n_cut, lost = int((tokens > max_seq_len).sum()), 1 - measured.labels_kept.sum() / labels.sum()
    show(
        f"cut at {max_seq_len:,}",
        f"{n_cut / n_rows:.1%} of the rows, {lost:.1%} of what is to be learned (--max_seq_len)",
    )
    n_empty = int((measured.labels_kept == 0).sum())
    if n_empty:
        show(
            "",
            f"{n_empty:,} rows ({n_empty / n_rows:.1%}) have no answer left and will not be trained on",
        )
    total = measured.languages.total()
    named = [(code, n) for code, n in measured.languages.most_common(8) if n / total >= 0.001]
    rest = total - sum(n for _, n in named)
    listed = [f"{'unsure' if code == UNSURE else code} {n / total:.1%}" for code, n in named]
    show(
        "languages",
        "   ".join(listed + [f"others {rest / total:.1%}"] * (rest > 0)) + "   (of the answers)",
    )


def show(name: str, text: str) -> None:
    print(f"{name:<17}{text}")


def share(count: int, total: int) -> str:
    return f"  ({count / total:.1%})" if total else ""


def list_counts(values: array) -> str:
    """ "0: 12   1: 300   5 or more: 7": how many rows have which value."""
    counts = sorted(Counter(values).items())
    shown = [f"{value}: {count:,}" for value, count in counts[:7]]
    if len(counts) > 7:
        shown.append(f"{counts[7][0]} or more: {sum(count for _, count in counts[7:]):,}")
    return "   ".join(shown)


def one_line(text: str) -> str:
    """At most 100 characters that any terminal can print."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)
    return text if len(text) <= 100 else text[:99] + "…"


def preview(source: Source, path: Path, processor: VLMProcessor, args: argparse.Namespace) -> int:
    """Print what is in one file and draw its sheet to `path`. Returns the number of usable rows."""
    rng = np.random.default_rng(args.seed)
    rows = open_rows(source.path, source.images)
    show_source(source, rows)
    checked = check_rows(rows)
    good = open_pictures(rows, checked, rng)
    show_checks(rows, checked)
    if not checked.usable:
        return 0
    chosen = rng.permutation(len(checked.usable))[:MOST_MEASURED]
    measured = measure_rows(
        rows, [checked.usable[index] for index in np.sort(chosen)], processor, args.max_seq_len
    )
    show_measures(measured, len(checked.usable), args.tokenizer, args.max_seq_len)
    good = good[: max(args.samples, 0)]
    if good:
        about = f"{len(good)} random rows of {len(checked.usable):,}, seed {args.seed}, tokenizer {args.tokenizer}"
        write_sheet(path, rows, good, processor, args.max_seq_len, about)
        show("contact sheet", f"{path} ({len(good)} random rows)")
    return len(checked.usable)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "data", nargs="+", metavar="FILE", help=".jsonl or .parquet, or a pattern, as for training"
    )
    parser.add_argument(
        "--images", "--images_path", nargs="+", metavar="FOLDER",
        help="folder or .zip of the images that a .jsonl names; one for all, or one for each FILE",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", default=TOKENIZER_PATH, help="tokenizer folder (%(default)s)"
    )
    parser.add_argument(
        "--max_seq_len", type=int, default=640, help="tokens a sample is cut at (%(default)s)"
    )
    parser.add_argument(
        "--n_image_tokens",
        type=int,
        default=VLMConfig().n_image_tokens,
        help="tokens of one image (%(default)s)",
    )
    parser.add_argument(
        "--samples", type=int, default=8, help="rows on the contact sheet; 0: none (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of what is drawn at random (%(default)s)"
    )
    parser.add_argument(
        "--out_dir",
        type=Path,
        default=Path("out"),
        help="folder of the contact sheets (%(default)s)",
    )
    args = parser.parse_args()
    config = VLMConfig(image_special_token=IMAGE_TOKEN * args.n_image_tokens)
    processor = VLMProcessor(load_tokenizer(args.tokenizer), None, config)
    if args.samples:
        load_font(1)  # said at once where there is none
    sources = find_sources(args.data, args.images)
    names = [Path(source.path).stem for source in sources]
    n_usable = []
    for number, (source, name) in enumerate(zip(sources, names)):
        if number:
            print()
        name += f"_{number}" if names.count(name) > 1 else ""
        n_usable.append(preview(source, args.out_dir / f"preview_{name}.png", processor, args))
    sys.exit(0 if all(n_usable) else 1)


if __name__ == "__main__":
    run_command(main)
