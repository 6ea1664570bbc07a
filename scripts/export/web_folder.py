"""A web page on which the model answers in the visitor's browser; any static server serves it.

web/    index.html page.css page.js    what is seen
        worker.js prompt.js picture.js the model's loop, and what goes into it
        lib/                           onnxruntime-web and a tokenizer, see web_library.py
        model/                         model.json (sizes, format of a prompt), tokenizer, graphs
        examples/                      pictures to begin with
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.files import write_text
from inference.chat import MAX_QUESTION
from inference.config import AskConfig
from inference.onnx_files import DECODER_NAMES, EMBEDDINGS_NAME, VISION_NAME
from inference.web.page_words import PAGE_WORDS
from model.files import ROOT, is_demo_encoder, read_info
from model.image_processor import picture_side, pixel_statistics
from model.LMConfig import IMAGE_TOKEN
from scripts.export.onnx_graphs import write_graphs
from scripts.export.web_library import copy_library, find_library

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

    from inference import VLM
    from model.processing import VLMProcessor
    from scripts.export.config import ExportConfig

PAGE = Path(__file__).with_name("web")
EXAMPLES = sorted((ROOT / "dataset/eval_images").glob("scene-*.png"))
# Where the JSON beside the weights names no question that opens most rows of the training data.
QUESTION, QUESTION_FOR_SEVERAL = "What is in this picture?", "What is different in these pictures?"
BICUBIC = 3


def write(vlm: VLM, folder: Path, config: ExportConfig) -> None:
    """Write the page, its library, the model and some examples into folder/web."""
    # the page and its library
    library, web = find_library(config.web_library), folder / "web"
    shutil.copytree(PAGE, web)
    copy_library(library, web / "lib")

    # the model; its graphs are there already where they were asked for too
    facts, model = describe(vlm), web / "model"
    if (graphs := folder / "onnx").is_dir():
        model.mkdir()
        for name in (VISION_NAME, EMBEDDINGS_NAME, DECODER_NAMES["float32"]):
            shutil.copy(graphs / name, model)
    else:
        write_graphs(vlm, model, ("float32",))
    write_text(model / "tokenizer.json", json.dumps(plain_tokenizer(vlm.processor)))
    facts["files"] = {path.name: path.stat().st_size for path in sorted(model.iterdir())}
    write_text(model / "model.json", json.dumps(facts, indent=1, ensure_ascii=False))

    # examples
    examples = web / "examples"
    examples.mkdir()
    for path in EXAMPLES:
        shutil.copy(path, examples)
    write_text(examples / "list.json", json.dumps([path.name for path in EXAMPLES]))


def plain_tokenizer(processor: VLMProcessor) -> dict:
    """The tokenizer without special tokens, as tokenizer.json: what people type is text to it."""
    facts = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    facts["added_tokens"] = [one for one in facts["added_tokens"] if not one["special"]]
    return facts


def describe(vlm: VLM) -> dict:
    """model.json: all that the page has to know of the model, but the sizes of its files."""
    config, processor, info = vlm.model.config, vlm.processor, read_info(vlm.weights)
    encoder_path = vlm.model.vision_encoder.name_or_path
    knows_scenes = encoder_path and is_demo_encoder(encoder_path)

    # the format of a prompt: whatever comes before a question, and after it
    ids = processor.encode_prompt([{"role": "user", "content": IMAGE_TOKEN}], 0)[0].tolist()
    place = len(ids) - 1 - ids[::-1].index(config.image_token_id)
    prompt = {
        "before": ids[:place],
        "after": ids[place + 1 :],
        "lineBreak": processor.encode_content("\n"),
        "imageId": config.image_token_id,
        "nImageTokens": config.n_image_tokens,
        "endId": processor.tokenizer.eos_token_id,
        "specialIds": processor.tokenizer.all_special_ids,
        "maxTokens": config.max_seq_len,
        "maxCharacters": MAX_QUESTION,
    }

    # the whole
    return {
        "name": vlm.weights.stem,
        "nParameters": sum(weight.numel() for weight in vlm.model.parameters()),
        "knows": PAGE_WORDS["knows_scenes"]["en"] if knows_scenes else "",
        "question": info.get("question") or QUESTION,
        "questionForSeveral": info.get("question_for_several") or QUESTION_FOR_SEVERAL,
        "maxNewTokens": AskConfig.max_new_tokens,
        "prompt": prompt,
        "picture": describe_pictures(processor.image_processor),
        "decoder": {"nKvHeads": config.n_kv_heads, "headDim": config.head_dim},
    }


def describe_pictures(image_processor: BaseImageProcessor) -> dict:
    """How pictures become numbers: picture.js does the same. UserError if it does not."""
    if image_processor.resample != BICUBIC:
        raise UserError(
            f"the vision encoder's pictures are resized with resample {image_processor.resample}: "
            f"the web page knows bicubic ({BICUBIC}) only"
        )
    mean, std = pixel_statistics(image_processor)
    size = image_processor.size
    return {
        # one of them, or the other two
        "shortestEdge": size.shortest_edge,
        "width": size.width,
        "height": size.height,
        "side": picture_side(image_processor),
        "mean": mean.flatten().tolist(),
        "std": std.flatten().tolist(),
    }
