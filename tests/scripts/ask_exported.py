"""Ask an exported directory as its users do, with transformers alone: nothing of ours is imported.

`python ask_exported.py DIRECTORY QUESTIONS.json ANSWERS.pt` lets a test do so in another version.
"""

import json
import sys

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

MAX_NEW_TOKENS = 24


def as_conversation(question: dict) -> list[dict]:
    parts = [{"type": "image", "image": Image.open(path)} for path in question["images"]]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question["text"]}]}]


@torch.no_grad()
def ask_exported(folder: str, questions: list[dict]) -> dict:
    """What transformers says of these {"images": paths, "text": ...}.

    Returns version, missing (weights that it made up), for each question its input_ids, logits
    float[T, vocab_size], answer; batched, the answer that it gets together with the others; and
    piped, that of a pipeline.
    """
    # load
    processor = AutoProcessor.from_pretrained(folder)
    model, found = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    said = {"version": transformers.__version__, "missing": sorted(found["missing_keys"])}
    said |= {"input_ids": [], "logits": [], "answer": []}
    how = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")

    def generate(inputs) -> list[str]:
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(new_tokens, skip_special_tokens=True)

    # one by one
    conversations = [as_conversation(question) for question in questions]
    for conversation in conversations:
        inputs = processor.apply_chat_template(conversation, **how)
        said["input_ids"].append(inputs["input_ids"][0])
        said["logits"].append(model(**inputs).logits[0])
        said["answer"] += generate(inputs)

    # together, and by the shortest way
    prompts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    pictures = [Image.open(path) for question in questions for path in question["images"]]
    inputs = processor(text=prompts, images=pictures or None, padding=True, return_tensors="pt")
    said["batched"] = generate(inputs)
    pipe = pipeline("image-text-to-text", model=folder)
    how = dict(max_new_tokens=MAX_NEW_TOKENS, return_full_text=False, do_sample=False)
    said["piped"] = [
        pipe(text=conversation, **how)[0]["generated_text"] for conversation in conversations
    ]
    return said


if __name__ == "__main__":
    folder, questions, answers = sys.argv[1:]
    with open(questions, encoding="utf-8") as file:
        torch.save(ask_exported(folder, json.load(file)), answers)
