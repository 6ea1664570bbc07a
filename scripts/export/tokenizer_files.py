"""The tokenizer and its chat template, so that other tools see the tokens that the model learned.

Our own code encodes the format of a conversation and what people wrote apart from each other. Other
tools put both into one text and encode that, so three things are added to the files:

- `<image>` is a token of its own behind the vocabulary.
- CUT, a character that no text has, parts two pieces of a text and leaves no token. The template
  puts it into a "</s>" that somebody typed, which is then four characters as here, and before
  blanks at the start of a question, which would join the line break of the format.
- The template finds out where pictures belong, as `add_image_tags` (inference/chat.py) does.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from common.text import IMAGE_TAG

if TYPE_CHECKING:
    from model.processing import VLMProcessor

# Unicode keeps this code point for use inside of programs.
CUT = "\ufdd0"
# A "Regex", although it is one character: transformers.js does not remove a "String".
CUT_STEP = {"type": "Split", "pattern": {"Regex": CUT}, "behavior": "Removed", "invert": False}

# CUT, ESCAPES and SYSTEM are filled in. The dashes take away line breaks and blanks between parts.
TEMPLATE = r"""
{#- What somebody wrote: no token of the format is in it, and no blank joins what is before it.
    A line break keeps an '@' away from a picture. -#}
{%- macro typed(text, is_behind_image, is_before_image) -%}
  {{- '\n' if is_behind_image and text[:1] == '@' else '' -}}
  {{- 'CUT' if not is_behind_image and text != text | trim else '' -}}
  {{- textESCAPES -}}
  {{- '\n' if is_before_image and text[-1:] == '@' else '' -}}
{%- endmacro -%}

{%- for message in messages -%}
  {%- if loop.first and message['role'] != 'system' -%}
    {{- '<s>system\n' + SYSTEM + '</s>\n' -}}
  {%- endif -%}
  {{- '<s>' + message['role'] + '\n' -}}

  {#- Its text, and how many pictures it has. In a plain text each <image> is one. -#}
  {%- set turn = namespace(text='', images=0, piece='') -%}
  {%- if message['content'] is string -%}
    {%- set turn.text = message['content'] -%}
    {%- set turn.images = turn.text.split('<image>') | length - 1 -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'text' -%}
        {%- set turn.text = turn.text + part['text'] -%}
      {%- elif part['type'] in ['image', 'image_url'] -%}
        {%- set turn.images = turn.images + 1 -%}
      {%- else -%}
        {{- raise_exception('MiniMind-V takes text and images, not ' + part['type']) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}

  {%- if message['role'] == 'user' -%}
    {#- Pictures are where <image> is typed, the others at the start. -#}
    {%- for _ in range(turn.images - turn.text.split('<image>') | length + 1) -%}
      {%- set turn.text = '<image>\n' + turn.text -%}
    {%- endfor -%}
    {#- An <image> that has no picture is left out. -#}
    {%- for piece in turn.text.split('<image>') -%}
      {%- set turn.piece = turn.piece + piece -%}
      {%- if loop.index <= turn.images -%}
        {{- typed(turn.piece, loop.index > 1, true) + '<image>' -}}
        {%- set turn.piece = '' -%}
      {%- endif -%}
    {%- endfor -%}
    {{- typed(turn.piece, turn.images > 0, false) -}}
  {%- else -%}
    {{- typed(turn.text, false, false) -}}
  {%- endif -%}
  {{- '</s>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<s>assistant\n' -}}
{%- endif -%}
""".lstrip()


def chat_template(processor: VLMProcessor) -> str:
    """The Jinja text that writes a conversation as `processor.encode_prompt` encodes it."""
    special = dict.fromkeys([*processor.tokenizer.all_special_tokens, IMAGE_TAG])
    escapes = "".join(f" | replace({quote(token)}, {quote(cut_token(token))})" for token in special)
    system = quote(processor.default_system)
    # The system text last: it may be any, even "CUT".
    return TEMPLATE.replace("CUT", CUT).replace("ESCAPES", escapes).replace("SYSTEM", system)


def quote(text: str) -> str:
    """A string in Jinja's words; repr() would write escapes that not every Jinja knows."""
    for character, escape in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n")):
        text = text.replace(character, escape)
    return f"'{text}'"


def cut_token(token: str) -> str:
    """CUT is put in before the letters, where the tokenizer parts the text anyway: </ and s>."""
    return re.sub(r"(?<=\W)(?=\w)", CUT, token, count=1)


def tokenizer_json(processor: VLMProcessor) -> dict:
    """tokenizer.json: ours, and what the head of this file says."""
    facts = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    # A model that was exported before has both already.
    if all(token["content"] != IMAGE_TAG for token in facts["added_tokens"]):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token = {"id": processor.config.vocab_size, "content": IMAGE_TAG, **flags, "special": True}
        facts["added_tokens"].append(token)
        steps = [CUT_STEP, facts["pre_tokenizer"]]
        facts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return facts


def tokenizer_config(processor: VLMProcessor, template: str) -> dict:
    """tokenizer_config.json, with the names that transformers 4 and transformers.js know too."""
    tokenizer = processor.tokenizer
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokenizer.unk_token,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "additional_special_tokens": [IMAGE_TAG],
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": processor.config.max_seq_len,
        # Answers of a batch begin where its prompts end.
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
