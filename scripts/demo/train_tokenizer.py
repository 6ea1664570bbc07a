"""Train the demo's tokenizer: byte-level BPE over the words of the scenes, published special ids.

    python -m scripts.demo.train_tokenizer        # a second; writes model/demo/tokenizer/

It learns from the *pieces* that sentences are filled from, never from whole sentences: merges
cannot cross a slot. So "红色圆形" is always 红色 + 圆形, and every attribute is one token in every
combination, in those that are held out too.
"""

import re
import string
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from common.errors import run_command
from common.flags import check_options, option, parse_flags
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


@dataclass(frozen=True)
class Settings:
    """Options of `python -m scripts.demo.train_tokenizer`."""

    out_dir: str = option("model/demo/tokenizer", "where it is written")
    vocab_size: int = option(800, "most tokens it may have", least=259, most=1_000_000)

    def __post_init__(self):
        check_options(self)


def main() -> None:
    args = parse_flags(Settings(), __doc__)

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
    run_command(main)
