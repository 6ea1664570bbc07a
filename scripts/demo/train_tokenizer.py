"""Train the demo's tokenizer: byte-level BPE over the words of the scenes, published special ids.

    python -m scripts.demo.train_tokenizer        # a second; writes model/demo/tokenizer/

It learns from the *pieces* that sentences are filled from, never from whole sentences: merges
cannot cross a slot. So "红色圆形" is always 红色 + 圆形, and every attribute is one token in every
combination, in those that are held out too.
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
    "{% if messages[0]['role'] != 'system' %}"
    f"{{{{ '<s>system\\n{SYSTEM}</s>\\n' }}}}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


def list_pieces() -> list[str]:
    """Words, and stretches of template between two slots, with and without a space before them."""
    pieces = [SYSTEM, "system", "user", "assistant", *WORDS, *WORDS.values()]
    pieces += [*string.digits, *"ABCDEFG"]
    for languages in TEMPLATES.values():
        for texts in languages.values():
            for text in [texts] if isinstance(texts, str) else texts:
                pieces += [piece for piece in re.split(r"\{\w+\}", text) if piece]
    return pieces + [f" {piece}" for piece in pieces if piece.isascii() and piece[0] != " "]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = Path("model/demo/tokenizer")
    parser.add_argument(
        "--out_dir", type=Path, default=folder, help=f"where it is written (default: {folder})"
    )
    parser.add_argument(
        "--vocab_size", type=int, default=800, help="most tokens it may have (default: 800)"
    )
    args = parser.parse_args()

    # train
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        # '@' becomes id 34, as published.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list_pieces(), trainer)

    # save
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(args.out_dir)
    print(f"{len(wrapped)} tokens -> {args.out_dir}")


if __name__ == "__main__":
    main()
