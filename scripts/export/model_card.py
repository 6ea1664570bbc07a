"""README.md of an exported directory: what a hub shows on a model's page."""

from __future__ import annotations

import json
import re
from pathlib import PureWindowsPath
from typing import TYPE_CHECKING

from inference.paths import read_scores
from model.files import is_demo_encoder, read_info
from model.weights import select_weights

if TYPE_CHECKING:
    from inference import VLM
    from scripts.export.config import ExportConfig

# Filled in by `model_card`. The header is YAML, by which hubs sort their models; Chinese and
# English are the languages of every published MiniMind, and of the demo.
CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
language: [zh, en]
tags: [minimind-v, llava]
---

# {name}

A small vision-language model: it answers questions about pictures. It was trained with
[MiniMind-V](https://github.com/jingyaogong/minimind-v), and this folder holds it as a LLaVA, which
many tools read without any code of that project.

## Use

```python
{fetch}from PIL import Image
from transformers import pipeline

ask = pipeline("image-text-to-text", model={model})
# A blue square; for your own picture: picture = Image.open("picture.jpg")
picture = Image.new("RGB", (224, 224), "white")
picture.paste("blue", (90, 90, 130, 130))
parts = [{{"type": "image", "image": picture}}, {{"type": "text", "text": {question}}}]
chat = [{{"role": "user", "content": parts}}]
answer = ask(text=chat, max_new_tokens=128, return_full_text=False)
print(answer[0]["generated_text"])
```

transformers 4.57 and 5 were tried. Load it in float32 or bfloat16: in float16 the projector, whose
numbers are made small on purpose, would be 0.
{others}
## Sizes

{sizes}

## Training

{training}

## Scores

{scores}

## What it is not good at

It is small: it makes up things that are not in the picture, counts badly, reads hardly any text in
pictures, and knows little of the world. It sees a picture in {side} x {side} pixels, so small
things are lost, and it knows the kind of pictures that it was trained with. A wrong answer sounds
as sure as a right one. Nothing was done to keep it from harmful answers. Do not let it decide
anything about people.
"""
# What else may be in the folder.
OTHERS = {
    "onnx": "`onnx/`: graphs for onnxruntime and transformers.js",
    "gguf": "`gguf/`: files for llama.cpp",
    "web": "`web/`: a page that runs the model in the browser; put it on any web server",
}
NOT_MEASURED = (
    "Not measured yet: `eval_vlm.py --data … --show_images right wrong none --save_report …` of "
    "MiniMind-V leaves them beside the weights, and another export writes them here."
)


def model_card(vlm: VLM, config: ExportConfig) -> str:
    """The Markdown text."""
    name = vlm.weights.stem if vlm.weights.is_file() else vlm.weights.resolve().name
    info = read_info(vlm.weights) if vlm.weights.is_file() else {}

    # where the snippet finds the model, and a question that it knows
    model, fetch = quote(config.push_to_hub or config.out), ""
    if config.push_to_hub and config.hub == "modelscope":
        model, fetch = f"snapshot_download({model})", "from modelscope import snapshot_download\n"
    question = info.get("question") or "What is in this picture?"
    if is_demo_encoder(vlm.model.vision_encoder.name_or_path):
        question = "What color is the square?"
    others = "".join(f"- {OTHERS[name]}\n" for name in OTHERS if name in config.formats)

    return CARD.format(
        name=escape(name),
        fetch=fetch,
        model=model,
        question=quote(question),
        others=f"\nAlso here:\n\n{others}" if others else "",
        sizes=describe_sizes(vlm),
        training=describe_training(vlm, info),
        scores=describe_scores(read_scores(vlm.weights)),
        side=vlm.processor.preprocess([]).shape[-1],
    )


def describe_sizes(vlm: VLM) -> str:
    config, encoder = vlm.model.config, vlm.model.vision_encoder
    weights = select_weights(vlm.model)
    # Input and output embeddings are one tensor.
    counts = {name: weight.numel() for name, weight in weights.items() if name != "output.weight"}
    n_projector = sum(count for name, count in counts.items() if name.startswith("vision_proj."))
    n_language = sum(counts.values()) - n_projector
    n_vision = sum(weight.numel() for weight in encoder.parameters())
    rows = [
        ("part", "parameters", "what it is"),
        ("---", "---", "---"),
        (
            "language model",
            f"{n_language:,}",
            f"Llama, width {config.dim}, {config.n_layers} layers, {config.n_heads} query and "
            f"{config.n_kv_heads} key-value heads, {config.vocab_size:,} tokens, context "
            f"{config.max_seq_len:,}",
        ),
        ("projector", f"{n_projector:,}", f"one linear layer, {config.vision_dim} to {config.dim}"),
        (
            "vision encoder",
            f"{n_vision:,}",
            f"{encoder.family.name}, frozen, {config.n_image_tokens} tokens a picture",
        ),
    ]
    return as_table(rows)


def describe_training(vlm: VLM, info: dict) -> str:
    """What the JSON beside the weights says; file names without the folders of this machine."""
    if not info:
        return "The weights came without a word on how they were trained."
    data = [file_name(path) for path in info.get("data") or [] if isinstance(path, str)]
    facts = {
        "stage": info.get("stage"),
        "data": ", ".join(data),
        "steps": info.get("step"),
        "validation loss": info.get("val_loss"),
        "vision encoder": file_name(info.get("vision_model") or ""),
    }
    if is_demo_encoder(vlm.model.vision_encoder.name_or_path):
        facts["vision encoder"] = "the demo's, which has seen drawn scenes only"
    rows = [("", ""), ("---", "---")]
    for name, fact in facts.items():
        if fact not in (None, ""):
            fact = f"{fact:.4f}" if isinstance(fact, float) else escape(str(fact))
            rows.append((name, fact))
    return as_table(rows)


def describe_scores(scores: dict) -> str:
    """Share of answers that are exactly right, by what picture the model was shown."""
    if "exact" not in scores:
        return NOT_MEASURED
    names = {"exact": "the right one", "exact_wrong_image": "another one", "exact_no_image": "none"}
    rows = [("picture shown", "exactly right"), ("---", "---")]
    rows += [
        (words, f"{100 * scores[name]:.1f} %") for name, words in names.items() if name in scores
    ]
    where = [escape(scores["data"])] if "data" in scores else []
    where += [f"{scores['questions']:,} questions"] if "questions" in scores else []
    where += [escape(scores["date"])] if "date" in scores else []
    return as_table(rows) + (f"\n\nMeasured on {', '.join(where)}." if where else "")


def as_table(rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def quote(text: str) -> str:
    """A string in Python's words."""
    return json.dumps(text, ensure_ascii=False)


def file_name(path: str) -> str:
    """The last part of a path of any system."""
    return PureWindowsPath(path).name


def escape(text: str) -> str:
    """A text of others that shows as it is in Markdown, in one line."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~$&])", r"\\\1", line)[:500]
