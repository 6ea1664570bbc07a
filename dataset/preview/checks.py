"""What is in a data file: rows that can be used, their lengths, languages, and how they look."""

from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.errors import BadSampleError, list_reasons
from dataset.formats import Row
from dataset.images import ImageFolder
from dataset.language import UNSURE, detect_language
from dataset.mixture import Source
from dataset.page import SHOWN_SIDE
from dataset.parquet_rows import ParquetRows
from dataset.preview.contact_sheet import Sample, split_pieces, write_sheet
from dataset.preview.settings import Settings
from dataset.record_rows import RecordRows
from dataset.rows import open_rows
from dataset.tar_rows import TarRows
from dataset.vlm_dataset import check_row
from model.image import load_image
from model.processing import VLMProcessor, count_labels

MOST_COUNTED = 10_000  # rows whose tokens are counted
MOST_OPENED = 500  # rows whose pictures are opened
MOST_PLACES = 3  # of each reason that are shown
PERCENTILES = (1, 50, 90, 99, 100)
UNCUT = 2**31 - 1  # tokens


class Checked:
    """What the checks of a file found."""

    def __init__(self):
        # Of each usable row: its key, and how many images and answers it has.
        self.usable, self.n_images, self.n_answers = array("q"), array("i"), array("i")
        # Of the others: how many by reason, and (key, detail) of the first of each reason.
        self.left_out: Counter[str] = Counter()
        self.places: dict[str, list[tuple[int, str]]] = defaultdict(list)
        self.repaired: Counter[str] = Counter()
        # What tells the images of the usable rows from others.
        self.pictures = array("Q")
        self.n_opened = 0

    def leave_out(self, key: int, error: BadSampleError) -> None:
        """Count a row that cannot be used."""
        self.left_out[error.args[0]] += 1
        if len(self.places[error.args[0]]) < MOST_PLACES:
            self.places[error.args[0]].append((key, error.detail))

    @property
    def n_rows(self) -> int:
        return len(self.usable) + self.left_out.total()


class TokenCounts(NamedTuple):
    """Of each of n rows, int64[n]; and the languages of their answers."""

    tokens: np.ndarray
    labels: np.ndarray
    labels_kept: np.ndarray  # after cutting
    languages: Counter[str]


def preview(source: Source, path: Path, processor: VLMProcessor, settings: Settings) -> int:
    """Print what is in one file, and write its contact sheet.

    Args:
        source: the file and its images.
        path: of the contact sheet.
        processor: encodes the rows.
        settings: what is counted and shown.

    Returns:
        The number of usable rows.
    """
    # every row, and the pictures of some
    rng = np.random.default_rng(settings.seed)
    rows = open_rows(source.path, source.images)
    show_source(source, rows)
    checked = check_rows(rows)
    good = open_pictures(rows, checked, rng)
    show_checks(rows, checked)
    n_usable = len(checked.usable)
    if not n_usable:
        return 0

    # the tokens of some
    chosen = np.sort(rng.permutation(n_usable)[:MOST_COUNTED])
    keys = [checked.usable[index] for index in chosen]
    counts = count_tokens(rows, keys, processor, settings.max_seq_len)
    tokenizer = processor.tokenizer.name_or_path
    show_tokens(counts, n_usable, tokenizer, settings.max_seq_len)

    # the contact sheet
    good = good[: settings.samples]
    if good:
        about = (
            f"{len(good)} random rows of {n_usable:,}, seed {settings.seed}, "
            f"tokenizer {processor.tokenizer.name_or_path}"
        )
        samples = make_samples(rows, good, processor, settings.max_seq_len)
        limit = f"--max_seq_len {settings.max_seq_len}"
        write_sheet(path, rows.path.name, about, samples, limit)
        show("contact sheet", f"{path} ({len(good)} random rows)")
    return n_usable


def check_rows(rows: RecordRows) -> Checked:
    """Check every row; no picture is opened."""
    checked = Checked()
    for key, _, row in rows.scan():
        try:
            one = check_row(rows, row)
        except BadSampleError as error:
            checked.leave_out(key, error)
            continue
        checked.usable.append(key)
        checked.n_images.append(len(one.pictures))
        checked.n_answers.append(sum(role == "assistant" for role, _ in one.turns))
        checked.repaired.update(one.repairs)
        checked.pictures.extend(one.pictures)
    return checked


def open_pictures(rows: RecordRows, checked: Checked, rng: np.random.Generator) -> list[int]:
    """Open the pictures of up to MOST_OPENED usable rows, and leave out those where that fails.

    Returns the keys of the others, in random order.
    """
    order = rng.permutation(len(checked.usable))[:MOST_OPENED].tolist()
    bad: dict[int, BadSampleError] = {}
    for index in tqdm(order, desc="open pictures", unit="row", leave=False, delay=1):
        try:
            deque(open_all(rows, rows.read(checked.usable[index])), maxlen=0)
        except BadSampleError as error:
            bad[index] = error
    good = [checked.usable[index] for index in order if index not in bad]
    ends = np.cumsum(checked.n_images)
    for index in sorted(bad):
        checked.leave_out(checked.usable[index], bad[index])
    for index in sorted(bad, reverse=True):
        del checked.pictures[ends[index] - checked.n_images[index] : ends[index]]
        del checked.usable[index], checked.n_images[index], checked.n_answers[index]
    checked.n_opened = len(order)
    return good


def open_all(rows: RecordRows, row: Row) -> Iterator[Image.Image]:
    """The row's pictures, small; a BadSampleError names the one that cannot be opened."""
    for number, (image, source) in enumerate(zip(row.images, rows.images(row))):
        try:
            yield load_image(source, SHOWN_SIDE)
        except BadSampleError as error:
            name = image if isinstance(image, str) else f"picture {number}"
            detail = error.detail if name in error.detail else f"{name}: {error.detail}"
            raise BadSampleError(error.args[0], detail) from error


def count_tokens(
    rows: RecordRows, keys: list[int], processor: VLMProcessor, max_seq_len: int
) -> TokenCounts:
    """Count tokens and label tokens, and tell the languages of the answers.

    Args:
        rows: the file.
        keys: of the rows to count.
        processor: encodes the rows.
        max_seq_len: tokens a row is cut at.
    """
    counts, languages = [], Counter()
    for key in tqdm(keys, desc="count tokens", unit="row", leave=False, delay=1):
        row = rows.read(key)
        turns, pictures, _ = check_row(rows, row)
        whole, _, n_labels_kept = encode_and_cut(
            row.conversations, len(pictures), processor, max_seq_len
        )
        counts.append((len(whole["labels"]), count_labels(whole["labels"]), n_labels_kept))
        languages.update(detect_language(content) for role, content in turns if role == "assistant")
    return TokenCounts(*np.array(counts, np.int64).reshape(-1, 3).T, languages)


def encode_and_cut(
    turns: list[dict], n_images: int, processor: VLMProcessor, max_seq_len: int
) -> tuple[dict, int, int]:
    """Encode a row, and see what is left of it at `max_seq_len`.

    Args:
        turns: its conversation.
        n_images: how many images it has.
        processor: encodes it.
        max_seq_len: tokens it is cut at.

    Returns:
        {input_ids, labels} of the whole row; its tokens and label tokens after cutting, both 0 if
        no answer is left.
    """
    images = [None] * n_images
    whole, _ = processor.encode_text(turns, images, UNCUT)
    kept = whole
    if len(whole["labels"]) > max_seq_len:
        try:
            kept, _ = processor.encode_text(turns, images, max_seq_len)
        except BadSampleError:
            return whole, 0, 0
    return whole, len(kept["labels"]), count_labels(kept["labels"])


def make_samples(
    rows: RecordRows, keys: list[int], processor: VLMProcessor, max_seq_len: int
) -> list[Sample]:
    """The rows with these keys as the contact sheet shows them; arguments as of `count_tokens`."""
    samples = []
    for key, place in zip(keys, rows.name_places(keys)):
        row = rows.read(key)
        images = list(open_all(rows, row))
        whole, n_kept, n_labels_kept = encode_and_cut(
            row.conversations, len(images), processor, max_seq_len
        )
        n_tokens, n_labels = len(whole["labels"]), count_labels(whole["labels"])
        title = f"{place} · {n_tokens:,} tokens, {n_labels:,} of them labels"
        if n_kept < n_tokens:
            title += (
                f" · {n_tokens - n_kept:,} cut away, {n_labels - n_labels_kept:,} of them labels"
            )
            title += "" if n_kept else " · no answer is left: not trained on"
        samples.append(Sample(title, images, split_pieces(whole, n_kept, processor)))
    return samples


def show_source(source: Source, rows: RecordRows) -> None:
    """Print the name of a file, its images and its weight."""
    line = source.path
    if not isinstance(rows, ParquetRows | TarRows):
        folder = rows.image_source
        is_there = not isinstance(folder, ImageFolder) or folder.path.is_dir()
        line += f"   images: {folder.path if folder else 'no --images given'}"
        line += "" if is_there else ", which is not there"
    if source.weight != 1:
        line += f"   each row {float(source.weight):g} times an epoch"
    print(line)
    show("format", rows.format)


def show_checks(rows: RecordRows, checked: Checked) -> None:
    """Print how many rows can be used, and where the others are."""
    n_rows, n_usable = checked.n_rows, len(checked.usable)
    n_left_out = checked.left_out.total()
    show("rows", f"{n_rows:,}")
    show("usable", f"{n_usable:,}{share(n_usable, n_rows)}")
    show("left out", f"{n_left_out:,}{share(n_left_out, n_rows) if n_left_out else ''}")
    for reason, count in checked.left_out.most_common():
        print(f"  {count:>7,}  {reason}")
        keys = [key for key, _ in checked.places[reason]]
        for (_, detail), place in zip(checked.places[reason], rows.name_places(keys)):
            print(f"           {place:<12} {one_line(detail)}".rstrip())
    if checked.repaired:
        show("repaired", list_reasons(checked.repaired))
    if checked.n_opened < n_usable:
        hint = "random rows were opened, of the others their names looked up"
        show("pictures", f"those of {checked.n_opened:,} {hint}")
    if n_usable:
        show("images per row", list_counts(checked.n_images))
        show("answers per row", list_counts(checked.n_answers))
        n_pictures = len(np.unique(np.array(checked.pictures, np.uint64)))
        show("distinct images", f"{n_pictures:,} of {sum(checked.n_images):,}")
        show("text only", f"{checked.n_images.count(0):,} rows")


def show_tokens(counts: TokenCounts, n_usable: int, tokenizer: str, max_seq_len: int) -> None:
    """Print lengths, what cutting costs, and languages.

    Args:
        counts: of the rows that were counted.
        n_usable: rows of the file that can be used.
        tokenizer: its folder.
        max_seq_len: tokens a row is cut at.
    """
    # lengths
    n_rows = len(counts.tokens)
    which = f"{n_rows:,} random usable rows" if n_rows < n_usable else "all usable rows"
    print(f"\nin {which}, with the tokenizer {tokenizer}")
    show("", "".join(f"{name:>8}" for name in ("p1", "median", "p90", "p99", "longest", "mean")))
    for name, lengths in (("tokens per row", counts.tokens), ("label tokens", counts.labels)):
        numbers = [*np.percentile(lengths, PERCENTILES), lengths.mean()]
        show(name, "".join(f"{number:>8,.0f}" for number in numbers))

    # cutting
    cut = (counts.tokens > max_seq_len).mean()
    lost = 1 - counts.labels_kept.sum() / counts.labels.sum()
    cost = f"{cut:.1%} of the rows, {lost:.1%} of the label tokens (--max_seq_len)"
    show(f"cut at {max_seq_len:,}", cost)
    n_empty = int((counts.labels_kept == 0).sum())
    if n_empty:
        cost = f"{n_empty:,} rows ({n_empty / n_rows:.1%}) have no answer left"
        show("", f"{cost} and will not be trained on")

    # languages
    total = counts.languages.total()
    named = [(code, n) for code, n in counts.languages.most_common(8) if n / total >= 0.001]
    rest = total - sum(n for _, n in named)
    listed = [f"{'unsure' if code == UNSURE else code} {n / total:.1%}" for code, n in named]
    listed += [f"others {rest / total:.1%}"] * (rest > 0)
    show("languages", "   ".join(listed) + "   (of the answers)")


def show(name: str, text: str) -> None:
    """Print one line of the account."""
    print(f"{name:<17}{text}")


def share(count: int, total: int) -> str:
    """ "  (50.0%)"; nothing of nothing."""
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
