"""The tokenizer that a model was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from model.chat_template import try_template
from model.files import TOKENIZER_PATH, find_tokenizer, read_json
from model.LMConfig import IMAGE_TOKEN, VLMConfig
from model.pretrained import refusing_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str | Path = TOKENIZER_PATH) -> PreTrainedTokenizerBase:
    """Load the tokenizer in the folder `path`.

    MissingFileError where there is none; UserError where it is damaged, or has not the ids that
    the model counts on (0 padding, 1 `<s>`, 2 `</s>`, 34 '@').
    """
    path = find_tokenizer(path)
    # The class that AutoTokenizer would choose too, without importing every other model for it.
    from transformers import PreTrainedTokenizerFast

    expected = {"<unk>": 0, "<s>": 1, "</s>": 2, IMAGE_TOKEN: VLMConfig().image_token_id}
    with refusing_folder("tokenizer", path):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            read_json(path / name)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        found = {token: tokenizer.convert_tokens_to_ids(token) for token in expected}
        # A file may cut every text, or fill it up.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        # It looks whether a text is too long: what the file says of that has to be a number.
        tokenizer.encode(IMAGE_TOKEN)
        conversation = [{"role": "user", "content": ""}]
        values = {"messages": conversation, "add_generation_prompt": False}
        values |= {"tools": None, "documents": None, **tokenizer.special_tokens_map}
        try_template(tokenizer.get_chat_template(), values)
        tokenizer.apply_chat_template(conversation, tokenize=False)
    wrong = {token: found[token] for token in expected if found[token] != expected[token]}
    if wrong:
        raise UserError(
            f"the tokenizer in {path} gives {wrong} instead of {expected}: "
            "it was not made for MiniMind-V"
        )
    return tokenizer
