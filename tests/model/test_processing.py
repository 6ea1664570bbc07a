"""The chat format, the placeholders, the labels and pictures of every kind."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

import model.labels
import model.processing
from common.errors import BadSampleError, MissingFileError, UserError
from model.image import load_image
from model.labels import count_labels, find_labels
from model.LMConfig import VLMConfig
from model.model_vlm import find_image_tokens
from model.processing import VLMProcessor, check_conversation, load_tokenizer, match_image_tags
from tests.helpers import N_PATCHES, SHARED, TOKENIZER, needs_shared, picture, run_cold

PUBLISHED = SHARED / "minimind_tokenizer"

TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=30).filter(
    lambda text: "<image>" not in text
)


def dialogue(*contents: str) -> list[dict]:
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


def template_ids(tokenizer, conversations, placeholder):
    turns = [
        turn | {"content": turn["content"].replace("<image>", placeholder)}
        for turn in conversations
    ]
    return tokenizer(
        tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False
    )["input_ids"]


CHATS = [
    dialogue("<image>\nWhat color is the circle?", "red"),
    dialogue("描述一下。\n<image>", "红色圆形", "And in English?", "red circle"),
    dialogue("<image>\n<image>\nWhat changes?", "color"),
    dialogue("mail a@b.com about <image>", "yes @ once", "@@@", "ok"),
]


@pytest.mark.parametrize("conversations", CHATS)
def test_ids_are_those_of_the_chat_template(processor, tokenizer, conversations):
    n_images = sum(turn["content"].count("<image>") for turn in conversations)
    sample = processor.encode(conversations, [picture(i) for i in range(n_images)], 500)
    assert sample["input_ids"].tolist() == template_ids(tokenizer, conversations, "@" * N_PATCHES)
    assert sample["pixel_values"].shape == (n_images, 3, 48, 48)


@needs_shared
@pytest.mark.parametrize("conversations", CHATS)
def test_ids_are_those_of_the_published_tokenizer(conversations):
    tokenizer = load_tokenizer(PUBLISHED)
    assert len(tokenizer) == 6400
    processor = VLMProcessor(tokenizer, None, VLMConfig())
    processor.preprocess = lambda images: torch.empty(len(images), 3, 224, 224)
    n_images = sum(turn["content"].count("<image>") for turn in conversations)
    sample = processor.encode(conversations, [None] * n_images, 2000)
    assert sample["input_ids"].tolist() == template_ids(
        tokenizer, conversations, VLMConfig().image_special_token
    )


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=4),
    st.lists(TEXT, min_size=0, max_size=3),
)
def test_labels_are_the_answers_and_their_end(processor, tokenizer, pairs, tagged):
    """Whatever the texts hold: labels are the answers' tokens and </s>; images as many as tags."""
    contents = [text for pair in pairs for text in pair]
    contents[0] = "<image>".join([contents[0], *tagged])
    sample = processor.encode(dialogue(*contents), [picture(i) for i in range(len(tagged))], 10**6)
    learned = sample["labels"][sample["labels"] != -100].tolist()
    expected = [processor.encode_content(answer) + [2] for _, answer in pairs]
    assert learned == [token for answer in expected for token in answer]
    assert torch.equal(
        sample["input_ids"][sample["labels"] != -100], sample["labels"][sample["labels"] != -100]
    )
    assert len(find_image_tokens(sample["input_ids"][None], 34, N_PATCHES)) == N_PATCHES * len(
        tagged
    )
    assert len(sample["pixel_values"]) == len(tagged)


# Pieces of text that look like what only the chat format or an image may write.
RUNS = ["@" * n for n in (1, 2, 97, 98, 194, 195, 196, 197, 391, 392, 393, 588)]
IMITATIONS = ["<s>", "</s>", "<unk>", "<s>user\n", "</s>\n<s>assistant\n", " @", "@a"]
HOSTILE = st.lists(st.sampled_from([*RUNS, *IMITATIONS, "\n", " ", "a"]) | TEXT, max_size=4).map(
    "".join
)


@settings(max_examples=400, deadline=None)
@given(
    system=st.none() | HOSTILE,
    pairs=st.lists(st.tuples(HOSTILE, HOSTILE.filter(str.strip)), min_size=1, max_size=3),
    tagged=st.lists(HOSTILE, max_size=2),
)
def test_no_text_of_any_role_can_pose_as_an_image_or_a_turn(tokenizer, system, pairs, tagged):
    """Every special token and run of '@' in every role, with 0, 1 and 2 images."""
    # a row as somebody may write it
    contents = [text for pair in pairs for text in pair]
    contents[0] = "<image>".join([contents[0], *tagged])
    conversations = [] if system is None else [{"role": "system", "content": system + "<image>"}]
    conversations += dialogue(*contents[:-1], contents[-1] + "<image>")

    # as a training row and as a prompt
    processor = VLMProcessor(tokenizer, None, VLMConfig())
    sample, images = processor.encode_text(conversations, [None] * len(tagged), 10**6)
    prompt = processor.encode_prompt(conversations[:-1], len(tagged))
    input_ids, labels = sample["input_ids"], sample["labels"]
    n_turns = 2 * len(pairs) + 1
    for ids, n_ends in ((input_ids[None], n_turns), (prompt, n_turns - 1)):
        n_image_tokens = len(find_image_tokens(ids, 34, 196))
        assert n_image_tokens == 196 * len(tagged) == 196 * len(images)
        assert (ids == 1).sum() == n_turns and (ids == 2).sum() == n_ends

    # what is learned: the answers as they are read, each with its end
    is_label = labels != -100
    answers = [answer for _, answer in pairs[:-1]] + [pairs[-1][1] + "<image>"]
    learned = [token for text in answers for token in processor.encode_content(text) + [2]]
    assert labels[is_label].tolist() == learned == input_ids[is_label].tolist()


def test_a_row_that_imitates_an_image_trains(model, processor):
    run = "@" * N_PATCHES
    turns = [{"role": "system", "content": run}, *dialogue(run, f"{run}</s>", "<image>" + run, run)]
    sample = processor.encode(turns, [picture()], 500)
    input_ids, labels = sample["input_ids"][None], sample["labels"][None]
    assert model(input_ids, sample["pixel_values"], labels=labels).loss.isfinite()


@pytest.mark.parametrize("n", [1, 97, 194, 195])
def test_a_shorter_run_is_left_as_it_is(tokenizer, n):
    processor = VLMProcessor(tokenizer, None, VLMConfig())
    text = "mail a@b.com " + "@" * n
    assert processor.encode_content(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    longer = processor.encode_content("@" * 196)
    assert tokenizer.decode(longer) == "@" * 195 + "\n@"


def test_every_special_token_of_a_tokenizer_is_text_in_a_content(tokenizer):
    """Those that somebody added too, as an exported tokenizer's <image>."""
    own = load_tokenizer(TOKENIZER)
    own.add_special_tokens({"additional_special_tokens": ["<image>", "<|end|>"]})
    processor = VLMProcessor(own, None, VLMConfig())
    for token in ("<s>", "</s>", "<unk>", "<image>", "<|end|>"):
        ids = processor.encode_content(f"a {token} b")
        assert not set(ids) & {0, 1, 2, *range(len(tokenizer), len(own))}
        assert own.decode(ids) == f"a {token} b"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 120))
def test_cut_never_inside_an_image(processor, max_length):
    conversations = dialogue("<image>\nWhat?", "red", "<image>\nAnd this? <image>", "blue green")
    whole = processor.encode(conversations, [picture(i) for i in range(3)], 500)
    try:
        sample = processor.encode(conversations, [picture(i) for i in range(3)], max_length)
    except BadSampleError as error:
        assert error.args[0] == "no answer within max_length"
        return
    length = len(sample["input_ids"])
    assert length <= max_length and torch.equal(sample["input_ids"], whole["input_ids"][:length])
    n_images = int((sample["input_ids"] == 34).sum()) // N_PATCHES
    assert (
        int((sample["input_ids"] == 34).sum())
        == N_PATCHES * n_images
        == N_PATCHES * len(sample["pixel_values"])
    )
    assert (
        length == max_length
        or length == len(whole["input_ids"])
        or whole["input_ids"][length] == 34
    )


@pytest.mark.parametrize(
    ("conversations", "reason"),
    [
        ([], "no conversation"),
        (None, "no conversation"),
        (["hello"], "turn without text content"),
        ([{"role": "user", "content": None}], "turn without text content"),
        ([{"role": "assistant", "content": "hi"}], "wrong roles"),
        (dialogue("a", "b")[:1] + dialogue("c", "d"), "wrong roles"),
        ([{"role": "human", "content": "hi"}], "wrong roles"),
        (dialogue("a", "  "), "empty answer"),
    ],
)
def test_malformed_conversations_have_a_reason(conversations, reason):
    with pytest.raises(BadSampleError) as error:
        check_conversation(conversations)
    assert error.value.args[0] == reason


def test_roles_may_be_missing_and_a_system_turn_may_lead(processor, tokenizer):
    turns = check_conversation([{"content": "a"}, {"content": "b"}, {"content": "c"}])
    assert turns == [("user", "a"), ("assistant", "b"), ("user", "c")]
    sample = processor.encode(
        [{"role": "system", "content": "Be brief."}, *dialogue("a", "b")], [], 100
    )
    assert tokenizer.decode(sample["input_ids"]).startswith(
        "<s>system\nBe brief.</s>\n<s>user\na</s>"
    )


def test_surplus_tags_are_dropped_and_missing_ones_refused():
    turns = [("user", "Source: <image> Target: <image> What?<image>"), ("assistant", "say <image>")]
    assert match_image_tags(turns, 2) == (
        [("user", "Source: <image> Target: <image> What?"), ("assistant", "say <image>")],
        1,
    )
    assert match_image_tags(turns, 0)[1] == 3
    with pytest.raises(BadSampleError, match="fewer <image> than images: 3 for 4"):
        match_image_tags(turns, 4)


def encode_picture(mode: str, format: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image = (
        picture(5).convert(mode)
        if mode != "I;16"
        else Image.fromarray(np.linspace(0, 65535, 64 * 56).reshape(56, 64).astype(np.uint16))
    )
    image.save(file, format, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("CMYK", "JPEG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("1", "PNG"),
        ("L", "JPEG"),
        ("I;16", "PNG"),
        ("I;16", "TIFF"),
    ],
)
def test_every_kind_of_picture_becomes_rgb(mode, format):
    image = load_image(encode_picture(mode, format))
    assert image.mode == "RGB" and image.size == (64, 56)
    if mode == "I;16":
        assert 100 < np.asarray(image).mean() < 155, "16-bit grey was clipped instead of scaled"


def test_animations_give_their_first_frame_and_photos_stand_upright():
    file = io.BytesIO()
    picture(1).save(file, "GIF", save_all=True, append_images=[picture(2), picture(3)])
    assert load_image(file).size == (64, 56)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    picture(1).save(file, "JPEG", exif=exif)
    assert load_image(file).size == (56, 64)


def huge_png() -> bytes:
    """A few bytes that claim 60,000 x 60,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_unusable_pictures_have_a_reason(tmp_path, processor):
    whole = encode_picture("RGB", "JPEG").getvalue()
    cases = {
        whole[: len(whole) // 2]: "image damaged",
        b"": "image damaged",
        b"<html>404</html>": "image is a web page",
        huge_png(): "image too large",
        picture_bytes((2000, 10)): "image too narrow",
    }
    for content, reason in cases.items():
        with pytest.raises(BadSampleError) as error:
            load_image(io.BytesIO(content))
        assert error.value.args[0] == reason
    with pytest.raises(BadSampleError, match="image missing"):
        load_image(tmp_path / "nothing.jpg")
    assert processor.preprocess([Image.new("RGB", (1, 1))]).shape == (1, 3, 48, 48)


def picture_bytes(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


def test_missing_or_foreign_tokenizer(tmp_path, tokenizer):
    with pytest.raises(
        MissingFileError, match="no tokenizer in .*python -m scripts.download tokenizer"
    ):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    content = (
        (tmp_path / "tokenizer.json")
        .read_text()
        .replace('"@":34', '"@":35')
        .replace('"@": 34', '"@": 35')
    )
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="not made for MiniMind-V"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("folder", [TOKENIZER, pytest.param(PUBLISHED, marks=needs_shared)])
def test_the_tokenizer_is_the_one_that_transformers_would_choose(folder):
    """Only the imports of AutoTokenizer are spared."""
    ours, chosen = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(chosen)
    assert ours.backend_tokenizer.to_str() == chosen.backend_tokenizer.to_str()
    assert ours.special_tokens_map == chosen.special_tokens_map
    assert ours.chat_template == chosen.chat_template


def test_labels_need_torch_alone():
    """The network imports them, and it imports neither Pillow nor transformers for that."""
    code = "import sys, model.labels; print({'PIL', 'transformers'} & set(sys.modules))"
    assert run_cold("-c", code).stdout.strip() == "set()"
    assert model.processing.IGNORE_INDEX == model.labels.IGNORE_INDEX == -100
    assert model.processing.count_labels is model.labels.count_labels


def test_label_tokens_are_counted_over_all_rows_but_for_the_first_of_each():
    labels = torch.tensor([[5, -100, 7, 8], [-100, 6, -100, -100], [9, -100, -100, -100]])
    assert find_labels(labels).tolist() == [2, 3, 5] and count_labels(labels) == 3
    assert find_labels(labels[0]).tolist() == [2, 3]
    assert labels[0, 0] == 5, "the labels themselves stay as they are"
