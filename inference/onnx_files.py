"""The graphs in the onnx/ folder of an exported model, under the names that transformers.js has."""

from pathlib import Path

from common.errors import MissingFileError
from common.packages import check_packages

VISION_NAME, EMBEDDINGS_NAME = "vision_encoder.onnx", "embed_tokens.onnx"
# Of the decoder, by the dtype of its weights.
DECODER_NAMES = {
    "float32": "decoder_model_merged.onnx",
    "int8": "decoder_model_merged_quantized.onnx",
    "int4": "decoder_model_merged_q4.onnx",
}
# What the decoder's cache has of each layer.
KINDS = ("key", "value")


def find_graphs(folder: Path, dtype: str) -> Path:
    """The folder of the graphs of an exported model, which are all there in that dtype.

    MissingFileError where one is missing, UserError where onnxruntime is.
    """
    check_packages("requirements-export.txt", "onnxruntime")
    graphs = folder / "onnx"
    if not graphs.is_dir():
        raise MissingFileError(
            f"--backend onnx needs an exported model, but {folder} has no folder onnx/: make one "
            f"with `python -m scripts.export {folder} --to onnx` and name its folder"
        )
    missing = [name for name in (VISION_NAME, EMBEDDINGS_NAME) if not (graphs / name).is_file()]
    if missing:
        raise MissingFileError(f"{graphs} has no {missing[0]}: export the model again")
    there = [name for name, file in DECODER_NAMES.items() if (graphs / file).is_file()]
    if dtype not in there:
        raise MissingFileError(
            f"{graphs} has no {DECODER_NAMES[dtype]} for --dtype {dtype}: it has "
            f"{', '.join(there) or 'no decoder at all'}"
        )
    return graphs
