"""Train the demo's own tokenizer: byte-level BPE over the words of the rendered set, with the published special ids.

    python -m scripts.demo.train_tokenizer        # a second; writes model/demo/tokenizer/

It learns from the *pieces* that sentences are filled from, never from whole sentences: merges cannot cross a slot, so
"红色圆形" is always 红色 + 圆形 and every attribute is one token in every combination, the held-out ones too.
"""

import argparse
import re
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dataset.scenes.text import TEMPLATES, WORDS

SYSTEM = "MiniMind-V"
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<s>system\\n" + SYSTEM + "</s>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


def pieces() -> list[str]:
    """Every word and every stretch of template between two slots, with and without a space before it."""
    found = [
        SYSTEM,
        "system",
        "user",
        "assistant",
        *WORDS,
        *WORDS.values(),
        *string.digits,
        *"ABCDEFG",
    ]
    for languages in TEMPLATES.values():
        for texts in languages.values():
            for text in [texts] if isinstance(texts, str) else texts:
                found += [piece for piece in re.split(r"\{\w+\}", text) if piece]
    return found + [f" {piece}" for piece in found if piece.isascii() and piece[0] != " "]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out_dir",
        type=Path,
        default=Path("model/demo/tokenizer"),
        help="where the tokenizer is written",
    )
    parser.add_argument("--vocab_size", type=int, default=800, help="most tokens it may have")
    args = parser.parse_args()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(
            pre_tokenizers.ByteLevel.alphabet()
        ),  # '@' is the 34th id, as published
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces(), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", bos_token="<s>", eos_token="</s>",
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    wrapped.save_pretrained(args.out_dir)
    print(f"{len(wrapped)} tokens -> {args.out_dir}")


if __name__ == "__main__":
    main()
