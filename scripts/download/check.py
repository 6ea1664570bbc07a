"""Whether downloaded files are what they should be: each is opened by the code that will use it.

Packages that take seconds to import are imported by the checks that need them.
"""

from collections import Counter
from itertools import islice
from pathlib import Path

from common.errors import BadSampleError, MissingFileError, UserError, list_reasons
from scripts.download.items import ITEMS, LAYERS, describe_files, find_files

# Rows of a data set that are looked at.
N_ROWS = 1000


def check_item(name: str, root: Path) -> str:
    """What is ready, in words. MissingFileError if files are missing, UserError if one is wrong."""
    item, files = ITEMS[name], find_files(name, root)
    folder = root / item.folder
    if files is None:
        raise MissingFileError(f"{describe_files(item)} in {item.folder}/")
    if name == "clip":
        return check_clip(folder)
    if name == "tokenizer":
        return check_tokenizer(folder)
    if item.dim:
        return ", ".join(check_weights(folder / file, item.dim) for file in files)
    if len(files) == 1:
        return check_parquet(folder / files[0])
    return check_rows(folder / files[0], folder / files[1])


def check_clip(folder: Path) -> str:
    from model.vision import load_vision_encoder

    encoder, _ = load_vision_encoder(folder)
    return f"{encoder.n_patches} patches of {encoder.width} numbers for an image"


def check_tokenizer(folder: Path) -> str:
    from model.LMConfig import LMConfig
    from model.processing import load_tokenizer

    tokenizer = load_tokenizer(folder)
    expected = LMConfig().vocab_size
    if len(tokenizer) != expected:
        raise UserError(
            f"the tokenizer in {folder} knows {len(tokenizer)} tokens, not {expected}: it does not "
            "belong to the published weights; delete it and fetch it again"
        )
    return f"{len(tokenizer)} tokens"


def check_weights(path: Path, dim: int) -> str:
    """Every key and shape against the configuration, on a model without memory."""
    import torch

    from model.LMConfig import VLMConfig
    from model.model_vlm import MiniMindVLM
    from model.weights import load_weights, read_weights

    weights = read_weights(path)
    embeddings = weights.get("tok_embeddings.weight")
    if embeddings is not None and embeddings.shape[-1] != dim:
        raise UserError(
            f"{path} is {embeddings.shape[-1]} wide, not {dim}: it is another model; delete it and "
            "fetch it again"
        )
    with torch.device("meta"):
        model = MiniMindVLM(VLMConfig(dim=dim, n_layers=LAYERS[dim]))
    load_weights(model, weights, path, language_only=path.name.startswith("lm_"))
    return f"{path.name} fits dim {dim} with {LAYERS[dim]} layers"


def check_rows(path: Path, archive: Path) -> str:
    """Rows of a .jsonl, and images of its .zip or of the folder unpacked from it.

    Whether the images of a row are there is looked up for the first rows.
    """
    from dataset.images import open_images
    from dataset.json_rows import JsonLinesRows

    # the first rows
    images = open_images(archive.with_suffix(""))
    rows = JsonLinesRows(path, images)
    problems = Counter()
    for _, _, row in islice(rows.scan(), N_ROWS):
        try:
            if isinstance(row, BadSampleError):
                raise row
            rows.check_images(row)
        except BadSampleError as error:
            problems[error.args[0]] += 1

    # all
    with open(path, "rb") as file:
        n_rows = sum(bool(line.strip()) for line in file)
    n_first = min(n_rows, N_ROWS)
    if problems.total() == n_first:
        reasons = list_reasons(problems) or "it is empty"
        raise UserError(
            f"{path} has no usable row with {archive} ({reasons}): delete both and fetch them again"
        )
    notes = f"; of the first {n_first:,} rows {list_reasons(problems)}" if problems else ""
    return f"{n_rows:,} rows, {images.count():,} images{notes}"


def check_parquet(path: Path) -> str:
    from dataset.parquet_file import open_parquet, read_records

    # its columns
    file = open_parquet(path)
    n_rows, columns = file.metadata.num_rows, file.schema_arrow.names
    if not {"conversations", "image_bytes"}.issubset(columns):
        raise UserError(
            f"{path} has columns {', '.join(columns)}, not conversations and image_bytes: "
            "it is another file"
        )

    # the first rows
    first = [row for row in islice(read_records(path), N_ROWS) if isinstance(row, dict)]
    n_images = sum(bool(row["image_bytes"]) for row in first)
    if not n_images:
        raise UserError(
            f"{path} has no images in its first {N_ROWS:,} of {n_rows:,} rows: it is another file"
        )
    return f"{n_rows:,} rows, images in {n_images:,} of the first {len(first):,}"
