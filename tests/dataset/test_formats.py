"""Data as people have it: each format is read as it is, or the reason is said once."""

import base64
import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import random
import re
import tarfile
import zipfile
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import BadSampleError, MissingFileError, UserError
from common.files import MAX_TEXT_BYTES
from dataset.encodings import guess_encoding
from dataset.formats import QUESTIONS, Row, convert, name_format
from dataset.json_objects import read_values
from dataset.mixture import find_sources, open_data
from dataset.row_images import split_names
from dataset.rows import open_rows
from dataset.table_rows import read_fields
from dataset.vlm_dataset import check_row
from tests.helpers import SHARED, assistant, needs_shared, picture, user, write_rows

TROUBLE = SHARED / "trouble"
TURNS = [user("<image>\nWhat?"), assistant("A cat.")]


def count_rows(path, images) -> tuple[str, Counter]:
    """(format, what became of the rows: "usable", a repair or the reason why it was left out)."""
    rows, found = open_rows(path, images), Counter()
    for key, _, row in rows.scan():
        try:
            checked = check_row(rows, row)
            assert rows.read(key) == row, "one by one as in a scan"
        except BadSampleError as error:
            assert rows.name_places([key])[0] and rows.read_raw(key)
            found[error.args[0]] += 1
            continue
        found.update(["usable", *checked.repairs])
    assert len(rows.keys()) == sum(found.values()) - found["<image> put in front"]
    return rows.format, found


# File, its format, and what becomes of its rows.
READ = [
    ("03/ok.jsonl", "MiniMind-V", {"usable": 6}),
    ("03/array.json", "MiniMind-V (one JSON array)", {"usable": 6}),
    ("03/array_indent.json", "MiniMind-V (one JSON array)", {"usable": 6}),
    ("03/commas.jsonl", "MiniMind-V (one JSON array)", {"usable": 6}),
    ("03/pretty.jsonl", "MiniMind-V (indented JSON)", {"usable": 6}),
    ("03/wrapped.json", "MiniMind-V (a list in a JSON object)", {"usable": 6}),
    ("03/llava.jsonl", "LLaVA", {"usable": 6}),
    ("03/llava_array.json", "LLaVA (one JSON array)", {"usable": 6}),
    *[
        (f"04/{name}.jsonl", "MiniMind-V", {"usable": 6})
        for name in ("bom", "bom_crlf", "crlf", "nan", "two_boms", "u2028")
    ],
    *[
        (f"04/{name}.jsonl", "MiniMind-V", {"usable": 5, "not a JSON object": 1})
        for name in ("no_last_newline_cut", "one_bad_line")
    ],
    ("04/nul_tail.jsonl", "MiniMind-V", {"usable": 6, "not a JSON object": 1}),
    *[
        (f"06/{name}.jsonl", "MiniMind-V", {"usable": 6})
        for name in (
            *("base64", "conv_Image", "conv_as_text", "conv_image_base64", "conv_image_path_key"),
            *("conv_images_key", "conv_img_file", "dict", "dot", "list_of_dict", "openai_conv"),
            "other_tag",
        )
    ],
    ("06/caption_only.jsonl", "captions", {"usable": 6}),
    ("06/messages_images.jsonl", "messages", {"usable": 6}),
    ("06/openai.jsonl", "messages", {"usable": 6}),
    ("06/query_response.jsonl", "query/response", {"usable": 6}),
    ("06/no_tag.jsonl", "MiniMind-V", {"usable": 6, "<image> put in front": 6}),
    ("06/null.jsonl", "MiniMind-V", {"<image> but no image": 6}),
    ("06/empty_str.jsonl", "MiniMind-V", {"<image> but no image": 6}),
    ("06/prefix.jsonl", "MiniMind-V", {"image missing": 6}),
    ("06/url.jsonl", "MiniMind-V", {"image is a URL": 6}),
]
# File, and what is said of it.
REFUSED = [
    ("03/ok.jsonl.gz", "is packed by gzip: unpack it with `gunzip -k"),
    ("04/cr_only.jsonl", "ends its lines by CR alone: convert it with `tr"),
    ("04/gbk.jsonl", r"is not UTF-8 \(it looks like GBK\): convert it with `iconv -f GBK -t UTF-8"),
    ("04/utf16.jsonl", r"\(it looks like UTF-16\)"),
    ("04/utf16_crlf.jsonl", r"\(it looks like UTF-16\)"),
    ("04/utf16be_nobom.jsonl", r"\(it looks like UTF-16BE\)"),
    ("04/utf32.jsonl", r"\(it looks like UTF-32\)"),
]


@needs_shared
@pytest.mark.parametrize(("name", "format_", "expected"), READ)
def test_what_becomes_of_rows_that_people_bring(name, format_, expected):
    assert count_rows(TROUBLE / name, TROUBLE / "01/set") == (format_, expected)


@needs_shared
@pytest.mark.parametrize(("name", "message"), REFUSED)
def test_a_file_that_cannot_be_read_is_told_so_once(name, message):
    with pytest.raises(UserError, match=message) as refused:
        open_rows(TROUBLE / name, TROUBLE / "01/set")
    assert "\n" not in str(refused.value)


@needs_shared
def test_names_with_all_kinds_of_letters():
    rows = open_rows(TROUBLE / "12/rows.jsonl", TROUBLE / "12/set")
    left_out, n_usable = {}, 0
    for key, _, row in rows.scan():
        try:
            check_row(rows, row)
            n_usable += 1
        except BadSampleError as error:
            left_out[rows.name_places([key])[0]] = str(error)
    assert left_out == {
        "line 1": "image missing: IMG_6003.jpg: there is IMG_6003.JPG",
        "line 9": "image missing: a b.jpg: there is a%20b.jpg",
        "line 13": "image missing: x.jpg: there is x.jpeg",
        "line 20": "image path leaves its folder: /sub/dir.png.jpg",
        "line 25": "image is no file: sub/ is a folder, a pipe or a device",
    }
    assert n_usable == 20


def encoded(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = encoded()
BASE64 = base64.b64encode(JPEG).decode()
IMAGE_PART = {"type": "image"}
TEXT_PART = {"type": "text", "text": "What?"}
URL_PART = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{BASE64}"}}
HUMAN, GPT = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}


@pytest.mark.parametrize(
    ("record", "name", "images"),
    [
        ({"conversations": TURNS, "image": "a.jpg, b c.jpg"}, "MiniMind-V", ["a.jpg", "b c.jpg"]),
        ({"conversations": TURNS, "image": ["a, b.jpg"]}, "MiniMind-V", ["a, b.jpg"]),
        ({"conversations": json.dumps(TURNS), "image_bytes": JPEG}, "MiniMind-V", [JPEG]),
        ({"conversations": TURNS, "image_bytes": [None, JPEG]}, "MiniMind-V", [JPEG]),
        ({"conversations": TURNS, "image": {"bytes": JPEG, "path": "a"}}, "MiniMind-V", [JPEG]),
        ({"conversations": TURNS, "image": BASE64}, "MiniMind-V", [JPEG]),
        ({"conversations": TURNS, "Image Path": "a.jpg"}, "MiniMind-V", ["a.jpg"]),
        ({"conversations": TURNS, "left_view": "a.jpg"}, "MiniMind-V", ["a.jpg"]),
        ({"image": "a.jpg", "conversations": [HUMAN, GPT]}, "LLaVA", ["a.jpg"]),
        ({"images": ["a.jpg"], "conversations": [HUMAN, GPT]}, "ShareGPT", ["a.jpg"]),
        ({"messages": [user([URL_PART, TEXT_PART]), assistant("A cat.")]}, "messages", [JPEG]),
        (
            {
                "messages": [user([IMAGE_PART, TEXT_PART]), assistant([{"text": "A cat."}])],
                "images": [{"bytes": JPEG}],
            },
            "messages",
            [JPEG],
        ),
        (
            {
                "prompt": [user([IMAGE_PART, TEXT_PART])],
                "completion": [assistant("A cat.")],
                "images": [JPEG],
            },
            "prompt/completion",
            [JPEG],
        ),
        (
            {"images": [JPEG], "texts": [{"user": "What?", "assistant": "A cat.", "source": "x"}]},
            "texts",
            [JPEG],
        ),
        ({"images": ["a.jpg"], "query": "What?", "response": "A cat."}, "query/response", None),
        ({"image": "a.jpg", "question": "What?", "answer": "A cat."}, "question/answer", None),
        (
            {"img": "a.jpg", "question": "What?", "answers": ["A cat.", "A dog.", "A cat."]},
            "question/answers",
            ["a.jpg"],
        ),
        (
            {"image": "a.jpg", "instruction": "What?", "input": "", "output": "A cat."},
            "instruction/output",
            ["a.jpg"],
        ),
    ],
)
def test_a_row_of_each_format(record, name, images):
    row = convert(record)
    assert name_format(record) == name
    assert row.images == (["a.jpg"] if images is None else images)
    assert [turn["role"] for turn in row.conversations] == ["user", "assistant"]
    assert row.conversations[0]["content"] == "<image>\nWhat?"
    assert row.conversations[1]["content"] == "A cat."


ENCODED = b"GIF89a" + bytes(range(256))
IN_BASE64 = base64.b64encode(ENCODED).decode()
ANSWER = assistant("A cat.")


@pytest.mark.parametrize(
    ("record", "images"),
    [
        # pictures in the turns, and in their text
        ({"messages": [user("What?") | {"images": ["a.jpg"]}, ANSWER]}, ["a.jpg"]),
        ({"messages": [user("<image>\nWhat?") | {"image": "a.jpg"}, ANSWER]}, ["a.jpg"]),
        ({"conversations": [user("<img>a.jpg</img>\nWhat?"), ANSWER]}, ["a.jpg"]),
        ({"messages": [user([{"image": "a.jpg"}, {"text": "What?"}]), ANSWER]}, ["a.jpg"]),
        (
            {"messages": [user([{"image_url": {"url": "a.jpg"}}, TEXT_PART]), ANSWER]},
            ["a.jpg"],
        ),
        (
            {"messages": [user([IMAGE_PART, {"type": "text", "content": "What?"}]), ANSWER],
             "images": ["a.jpg"]},
            ["a.jpg"],
        ),
        # lists that are written as text, objects with a name for each tag
        ({"image": "['a.jpg']", "conversations": str(TURNS)}, ["a.jpg"]),
        ({"images": '["a, b.jpg"]', "conversations": TURNS}, ["a, b.jpg"]),
        ({"image": {"<image_00>": "a.jpg"}, "conversations": TURNS}, ["a.jpg"]),
        # files as text or numbers, under any key
        ({"image": {"bytes": [*ENCODED]}, "conversations": TURNS}, [ENCODED]),
        ({"img_b64": IN_BASE64, "question": "What?", "answer": "A cat."}, [ENCODED]),
        ({"thumb": IN_BASE64, "question": "What?", "answer": "A cat."}, [ENCODED]),
        (
            {"image": base64.urlsafe_b64encode(b"\0\xff\xfe" * 99).decode().rstrip("="),
             "conversations": TURNS},
            [b"\0\xff\xfe" * 99],
        ),
        ({"image": "a.jpg", "image_bytes": ENCODED, "conversations": TURNS}, [ENCODED]),
        # nothing, in several ways, under the first key
        ({"image": {"bytes": None, "path": ""}, "path": "a.jpg", "messages": TURNS}, ["a.jpg"]),
        ({"image": float("nan"), "img": "a.jpg", "messages": TURNS}, ["a.jpg"]),
        ({"image": "file:///a%20b.jpg", "conversations": TURNS}, ["/a b.jpg"]),
        # other names for roles and answers
        ({"image": "a.jpg", "question": "What?", "choices": ["A dog.", "A cat."], "answer": 1},
         ["a.jpg"]),
        ({"image": "a.jpg", "qas": [{"question": "What?", "answer": "A cat."}]}, ["a.jpg"]),
        ({"image": "a.jpg", "prompt": [user("What?")], "chosen": [ANSWER]}, ["a.jpg"]),
    ],
)  # fmt: skip
def test_what_other_sets_have_in_other_places(record, images):
    row = convert(record)
    assert row.images == images
    assert row.conversations == [user("<image>\nWhat?"), ANSWER]


def test_captions_in_lists_and_objects():
    for captions in ("['A cat.']", '["A cat."]', [{"raw": "A cat.", "tokens": []}]):
        row = convert({"filename": "a.jpg", "sentences": captions})
        assert row.conversations[1] == ANSWER and row.images == ["a.jpg"]


def test_what_is_no_picture_is_not_trained_as_text():
    for key in ("video", "videos", "audio_path"):
        with pytest.raises(BadSampleError, match=f"{key[:5]} is not supported"):
            convert({key: ["a.mp4"], "messages": [user("What?"), ANSWER]})
    # a row of text that has the keys of other rows
    for value in (None, float("nan"), "", [None], {"bytes": None}):
        row = convert({"id": "7.jpg", "image": value, "messages": [user("What?"), ANSWER]})
        assert row.images == [] and row.conversations == [user("What?"), ANSWER]
    with pytest.raises(BadSampleError, match="image is a URL"):
        convert({"conversations": [user("<img>http://x.org/a.jpg</img> What?"), ANSWER]})


@pytest.mark.parametrize(
    ("keys", "captions"),
    [
        ({"en": ["A cat.", "A pet."], "zh": ["一只猫。"]}, None),
        ({"en": "A cat.", "zh-CN": "['一只猫。', '猫']"}, {"zh-CN": ["一只猫。", "猫"]}),
        ({"en": ["A cat.", " ", None], "zh": []}, {"en": ["A cat."]}),
        ({"captions": ["A cat.", "A pet."], "id": 7}, {"": ["A cat.", "A pet."]}),
        ({"references": ["A cat.", "A pet."]}, {"": ["A cat.", "A pet."]}),
        ({"sentences": [{"raw": "A cat."}, {"raw": "A pet."}]}, {"": ["A cat.", "A pet."]}),
    ],
)
def test_of_several_captions_one_is_learned_and_all_are_kept(keys, captions):
    row = convert({"image": "a.jpg", **keys})
    captions = keys if captions is None else captions
    assert row.captions.items() >= captions.items() and row.answers is None
    texts = [text for group in row.captions.values() for text in group]
    question, answer = (turn["content"] for turn in row.conversations)
    assert answer in texts and question.startswith("<image>\n")
    assert convert({"image": "a.jpg", **keys}) == row, "the same one each time"
    assert name_format({"image": "a.jpg", **keys}) == "captions"


def test_each_caption_of_several_is_drawn_in_some_row():
    rows = [convert({"image": "a.jpg", "en": [f"A{n}", f"B{n}"], "zh": ["一"]}) for n in range(40)]
    drawn = Counter(row.conversations[1]["content"][0] for row in rows)
    assert set(drawn) == {"A", "B", "一"}


@pytest.mark.parametrize(
    ("keys", "answers"),
    [
        ({"question": "What?", "answers": ["cat", "cat", "pet"]}, ["cat", "cat", "pet"]),
        ({"question": "What?", "answers": [{"answer": "cat", "answer_id": 1}]}, ["cat"]),
        ({"question": "What?", "references": ["cat", "pet"]}, ["cat", "pet"]),
        ({"question": "What?", "answer": "cat"}, None),
    ],
)
def test_of_several_right_answers_the_most_frequent_is_learned(keys, answers):
    row = convert({"image": "a.jpg", **keys})
    assert row.answers == answers and row.conversations[1] == assistant("cat")
    assert row.captions is None


@pytest.mark.parametrize("keys", [{"en": []}, {"en": [" "]}, {"zh": [None], "captions": []}, {}])
def test_no_caption_at_all_is_said(keys):
    with pytest.raises(BadSampleError, match="no conversation: the row has the keys image"):
        convert({"image": "a.jpg", **keys})


@needs_shared
def test_photographs_with_five_captions_in_two_languages():
    folder = SHARED / "flickr8k"
    rows = open_rows(folder / "val_captions.jsonl", folder / "val_images.zip")
    row = rows.read(int(rows.keys()[0]))
    assert rows.format == "captions" and {*row.captions} == {"en", "zh"}
    assert [len(texts) for texts in row.captions.values()] == [5, 5] and check_row(rows, row)


def test_a_caption_gets_a_question_in_its_language():
    for key in ("caption", "text", "Description", "captions"):
        rows = [convert({"file_name": f"{n}.jpg", key: f"A cat, {n}."}) for n in range(60)]
        questions = {row.conversations[0]["content"] for row in rows}
        assert questions == {f"<image>\n{question}" for question in QUESTIONS}
        assert not any(row.repairs for row in rows) and rows[7].images == ["7.jpg"]
    row = convert({"image": "a.jpg", "caption": "一只狗在草地上跑。"})
    assert re.fullmatch("<image>\n[一-鿿，]+[？。]", row.conversations[0]["content"])
    assert convert({"image": "a.jpg", "caption": "x"}) == convert(
        {"image": "a.jpg", "caption": "x"}
    )
    assert convert({"image": "a.jpg", "captions": ["x", "x"]}).conversations[1] == assistant("x")


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"conversations": TURNS}, "<image> but no image: the row has the keys conversations"),
        ({"conversations": TURNS, "image": None}, "<image> but no image: image is null"),
        (
            {"conversations": TURNS, "timestamp": 0, "Image Path": ""},
            '<image> but no image: Image Path is ""',
        ),
        (
            {"conversations": TURNS, "left": "a.jpg", "right": "b.jpg"},
            "<image> but no image: left and right name pictures: write them as a list under image",
        ),
        (
            {"conversations": [user("<|image|>\nWhat?"), assistant("x")]},
            "<image> but no image: the row has the keys conversations",
        ),
        (
            {"messages": [user([IMAGE_PART, TEXT_PART]), assistant("x")]},
            "<image> but no image: 1 in the text, 1 missing",
        ),
        (
            {"conversations": TURNS, "image": "HTTPS://x.org/a.jpg"},
            "image is a URL: HTTPS://x.org/a.jpg: download it first",
        ),
        ({"conversations": TURNS, "image": 7}, "image is no name: 7"),
        ({"image": "a.jpg", "sha": "1"}, "no conversation: the row has the keys image, sha"),
        ({"text": "only a text"}, "no conversation: the row has the keys text"),
        ({"messages": []}, "no conversation: the row has the keys messages"),
        ({"conversations": "[]", "image": "a.jpg"}, "no conversation: conversations is empty"),
        (
            {"messages": [user([{"type": "video", "video": "a.mp4"}]), assistant("x")]},
            "turn without text content: turn 0: 'video'",
        ),
    ],
)
def test_why_a_row_cannot_be_used(record, error):
    with pytest.raises(BadSampleError, match=re.escape(error)):
        convert(record)


def test_tags_of_other_sets_are_read_where_there_is_a_picture():
    for tag in ("<|image|>", "<image_placeholder>", "<img>", "<|image_1|>", "<ImageHere>", "[IMG]",
                "<|vision_start|><|image_pad|><|vision_end|>", "<start_of_image>"):  # fmt: skip
        row = convert({"image": "a.jpg", "messages": [user(f"{tag} What?"), assistant(tag)]})
        assert row.conversations == [user("<image> What?"), assistant(tag)] and not row.repairs
    for text in ("What is <img> in HTML?", "What is <picture>?", "From a page: [Image] a cat"):
        turns = [user(text), assistant("A picture.")]
        assert convert({"conversations": turns}) == Row(turns, [], {})


def test_a_row_of_text_may_have_a_url():
    turns = [user("Who wrote this?"), assistant("A person.")]
    for value in ("https://x.org/page", "data/part-3.jsonl"):
        row = convert({"conversations": turns, "url": value, "path": value, "id": 3})
        assert row.conversations == turns and not row.images and row.other["id"] == 3
    with pytest.raises(BadSampleError, match="image is a URL"):
        convert({"url": "https://x.org/1234", "caption": "A cat"})
    with pytest.raises(BadSampleError, match="image is a URL"):
        convert({"conversations": TURNS, "url": "https://x.org/1234"})


def test_a_first_line_that_is_longer_than_what_is_looked_at(tmp_path):
    rows = [{"image": "data:image/jpeg;base64," + "A" * 400_000, "conversations": TURNS}] * 2
    write_rows(tmp_path / "lines.jsonl", rows)
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "indented.jsonl").write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    assert count_rows(tmp_path / "lines.jsonl", None) == ("MiniMind-V", {"usable": 2})
    assert count_rows(tmp_path / "list.json", None)[1] == {"usable": 2}
    assert count_rows(tmp_path / "indented.jsonl", None)[1] == {"usable": 2}


def test_objects_in_several_lists_or_without_line_breaks(tmp_path):
    rows = [json.dumps({"conversations": [user(f"{n}?"), assistant("A")]}) for n in range(6)]
    bad = '{"conversations": 3, "x": }'
    for name, text, n_bad in (
        ("each", "\n".join(f"[{row}]" for row in rows), 0),
        ("each_bad", "\n".join(f"[{row}]" for row in [*rows[:3], bad, *rows[3:]]), 1),
        ("two", f"[{','.join(rows[:3])}][{','.join(rows[3:])}]", 0),
        ("lines", f"[{','.join(rows[:3])}]\n[{','.join(rows[3:])}]\n", 0),
        ("joined", "".join(rows), 0),
        ("spaced", " ".join(rows), 0),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(text)
        found = {"usable": 6} | ({"not a JSON object": n_bad} if n_bad else {})
        assert count_rows(path, None)[1] == found, name


def test_names_with_commas_in_one_text():
    for text, names in {
        "a.jpg": ["a.jpg"], "a.jpg, b.jpg": ["a.jpg", "b.jpg"], "a,b": ["a", "b"],
        "red, green.jpg": ["red, green.jpg"], "x, y.jpg,z.png": ["x, y.jpg", "z.png"],
        "a.jpg, ": ["a.jpg"], " lead.jpg": [" lead.jpg"],
    }.items():  # fmt: skip
        assert split_names(text) == names, text


keys = st.text(max_size=3) | st.sampled_from(
    [
        *("conversations", "messages", "image", "images", "role"),
        *("content", "from", "value", "type", "text"),
        *("image_url", "url", "path", "bytes", "query"),
        *("response", "question", "answer", "caption", "texts"),
        *("user", "assistant", "history", "system", "input"),
        *("instruction", "prompt", "completion", "answers", "image_bytes"),
    ]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(keys, json_values, max_size=5))
def test_any_object_is_a_row_or_a_reason(record):
    name_format(record)
    try:
        row = convert(record)
    except BadSampleError as error:
        assert error.args[0] and "\n" not in error.args[0]
        return
    assert all(isinstance(turn["content"], str) for turn in row.conversations)
    assert all(isinstance(image, str | bytes) for image in row.images)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(json_values.filter(lambda value: b"" not in [value])),
    st.sampled_from([None, 0, 2]),
    st.sampled_from([5, 64, 2**20]),
    st.booleans(),
    st.data(),
)
def test_the_scanner_finds_what_json_finds(values, indent, chunk, is_ascii, data):
    text = json.dumps(values, indent=indent, ensure_ascii=is_ascii, default=lambda _: "bytes")
    encoded = text.encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dataset.json_objects.CHUNK", chunk)
        found = list(read_values(io.BytesIO(encoded), 1))
        again = [next(read_values(io.BytesIO(encoded), value.offset)) for value in found]
    loads = [json.loads(value.text.decode("utf-8", "surrogatepass")) for value in found]
    assert repr(loads) == repr(json.loads(text)) and again == found
    # a damaged part is an error, never an exception
    if len(encoded) > 2:
        cut = data.draw(st.integers(1, len(encoded) - 1))
        list(read_values(io.BytesIO(encoded[:cut] + b"?" + encoded[cut:]), 1))


def test_objects_behind_a_damaged_one(tmp_path, monkeypatch):
    rows = [{"conversations": [user("Q"), assistant(f"A{n}")]} for n in range(4)]
    text = json.dumps(rows, indent=1).replace('"A1"', "A1")
    (tmp_path / "rows.json").write_text(text)
    found = count_rows(tmp_path / "rows.json", None)
    assert found == ("MiniMind-V (one JSON array)", {"usable": 3, "not a JSON object": 1})
    # several of them, one behind the other, however much is read at a time
    text = json.dumps([{"n": n} for n in range(8)], indent=2).replace("1\n", "x\n")
    text = text.replace("2\n", "x\n").replace("5\n", "x\n").encode()
    for chunk in (5, 64, 2**20):
        monkeypatch.setattr("dataset.json_objects.CHUNK", chunk)
        found = [value.text for value in read_values(io.BytesIO(text), 1) if not value.problem]
        assert [json.loads(one)["n"] for one in found] == [0, 3, 4, 6, 7], chunk
    # a download that was cut off
    (tmp_path / "cut.json").write_text(json.dumps(rows)[:-30])
    assert count_rows(tmp_path / "cut.json", None)[1] == {"usable": 3, "not a JSON object": 1}
    (tmp_path / "object.json").write_text(json.dumps({"info": {}, "annotations": [{"id": 1}]}))
    with pytest.raises(UserError, match="is one JSON object with the keys info, annotations, not"):
        open_rows(tmp_path / "object.json", None)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(encoded(number))
    return folder


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", 'image,caption\n0.jpg,"Red, or\nblue"\n1.jpg,B\n', {"usable": 2}),
        ("a.csv", "0.jpg,A\n1.jpg,B\n", {"usable": 2}),
        ("a.csv", "\ufeffFile Name;Question;Answer\r\n0.jpg;Q;A\r\n\r\n", {"usable": 1}),
        ("a.tsv", "image\tcaption\n0.jpg\tA, or B\n1.jpg\n", {"usable": 1}),
        ("captions.txt", "image,caption\n0.jpg,A\n", {"usable": 1}),
        ("a.csv", "image_name| comment_number| comment\n0.jpg| 0| A dog .\n", {"usable": 1}),
        ("a.csv", "sep=;\r\nimage;caption\r\n0.jpg;A, or B\r\n", {"usable": 1}),
        ("a.csv", 'image, caption\n0.jpg, "A, or B"\n1.jpg,B,\n', {"usable": 2}),
        ("a.tsv", "A cat.\t0.jpg\nA dog.\t1.jpg\n", {"usable": 2}),
        (
            "a.csv",
            'image,conversations\n0.jpg,"[{""content"":""?""},{""content"":""A""}]"\n',
            {"usable": 1},
        ),
        # a quotation mark that is not closed, and one inside a field, cost one row each
        ("a.csv", 'image,caption\n0.jpg,"A\n1.jpg,B\n0.jpg,C\n', {"usable": 2, "row damaged": 1}),
        ("a.tsv", 'image\tcaption\n0.jpg\t"A" or B\n1.jpg\tB\n', {"usable": 1, "row damaged": 1}),
    ],
)
def test_tables(photos, name, text, expected):
    path = photos.parent / name
    path.write_bytes(text.encode())
    format_, found = count_rows(path, photos)
    found.pop("wrong number of fields", None)
    found.pop("<image> put in front", None)
    assert format_.endswith(" (a table)") and found == expected


fields = st.text(
    st.characters(exclude_characters="\0\r\ufeff", exclude_categories=("Cs",)), max_size=8
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(fields, min_size=2, max_size=3)),
    st.sampled_from([",", "\t", ";"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_any_row_of_a_table_is_read_from_its_place(rows, delimiter, line_end):
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=line_end).writerows(rows)
    file = io.BytesIO(text.getvalue().encode())
    found = list(read_fields(file, 0, delimiter))
    # spaces around a field may be left out
    expected = [[field.strip() for field in row] for row in rows]
    assert [[field.strip() for field in one] for _, _, one in found] == [*filter(any, expected)]
    for place in found:
        assert next(read_fields(file, place[0], delimiter)) == place


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("红色的狗在草地上奔跑，一只猫。"), min_size=4), st.integers(1, 6))
def test_the_encoding_of_a_text_is_guessed(letters, n_rows):
    text = json.dumps({"text": "草地上的狗" + "".join(letters)}, ensure_ascii=False) + "\n"
    for codec, name in {
        "utf-8": None, "utf-8-sig": None, "gbk": "GBK", "gb18030": "GBK", "utf-16": "UTF-16",
        "utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE", "utf-32": "UTF-32",
    }.items():  # fmt: skip
        encoded = (text * n_rows).encode(codec)
        assert guess_encoding(encoded) == name, codec
        # what is looked at may end inside a letter
        assert codec != "utf-8" or guess_encoding(encoded[: -len(text)]) is None
    assert guess_encoding("ça va très bien, dit-il à l'été".encode("cp1252")) == "WINDOWS-1252"


def test_the_encoding_of_other_parts_of_the_world():
    for codec, name, text in (
        ("big5", "BIG5", "圖片裡有一隻貓在桌子上。"),
        ("shift_jis", "SHIFT_JIS", "これは猫の写真です。"),
        ("euc_jp", "EUC-JP", "これは猫の写真です。"),
        ("cp949", "CP949", "이것은 고양이 사진입니다. 아이가 있는 사진이다."),
        ("cp1251", "WINDOWS-1251", "Это фотография кошки"),
        ("koi8_r", "KOI8-R", "Это фотография кошки"),
        ("cp1252", "WINDOWS-1252", "Ein schöner Hund läuft über die Straße"),
    ):
        assert guess_encoding(json.dumps({"text": text}, ensure_ascii=False).encode(codec)) == name


def test_a_file_of_another_kind_is_called_what_it_is(tmp_path):
    rows = json.dumps({"image": "a.jpg", "caption": "A cat."}).encode() * 3
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("rows.jsonl", rows)
    for content, words in {
        bz2.compress(rows): "is packed by bzip2: unpack it with `bunzip2 -k",
        lzma.compress(rows): "is packed by xz",
        gzip.compress(rows): "is packed by gzip",
        packed.getvalue(): "is a .zip archive: unpack it",
        pickle.dumps([rows]): "is a pickle, which may run anything",
        b"version https://git-lfs.github.com/spec/v1\noid": "is a Git LFS pointer",
        b"\n<!DOCTYPE HTML><p>404": "is a web page",
        b"SQLite format 3\0": "is a database",
        random.Random(0).randbytes(5000): "is no text in UTF-8, nor in another encoding",
    }.items():
        for name in ("a.jsonl", "a.csv", "a.tar", "a.parquet"):
            path = tmp_path / name
            path.write_bytes(content)
            random_words = {"a.tar": "is no whole .tar", "a.parquet": "is no Parquet file"}
            expected = random_words.get(name, words) if "no text" in words else words
            with pytest.raises(UserError, match=re.escape(expected)) as refused:
                open_rows(path, None)
            assert "\n" not in str(refused.value)


def test_a_table_without_names_of_columns(tmp_path):
    (tmp_path / "a.csv").write_text("1,2\n3,4\n")
    with pytest.raises(
        UserError, match="its first line has to name its columns, such as image,cap"
    ):
        open_rows(tmp_path / "a.csv", None)


def test_a_table_of_captions_is_a_set(photos, processor):
    """`--data captions.csv --images photos/` is all that it needs."""
    path = photos.parent / "captions.csv"
    path.write_text("image,caption\n0.jpg,A cat\n1.jpg,A dog\n0.jpg,A red cat\n", "utf-8")
    data = open_data([str(path)], [str(photos)], processor, 200)
    assert len(data) == 3 and data.formats == ["captions (a table)"] and data.n_pictures == 2
    assert pickle.loads(pickle.dumps(data.rows)).read(int(data.keys[1])) == data.read(1)[0]
    assert len(data[2]["pixel_values"]) == 1


def test_a_folder_of_pictures_with_texts(photos, processor):
    (photos / "sub").mkdir()
    (photos / "sub/x.PNG").write_bytes((photos / "0.jpg").read_bytes())
    (photos / "sub/x.txt").write_text("一只猫", encoding="utf-8")
    for number in range(2):
        (photos / f"{number}.txt").write_text(f"A cat {number}.\n")
    data = open_data([str(photos)], None, processor, 200)
    assert len(data) == 3 and data.n_images == 3
    assert {data.read(n)[0].conversations[1]["content"] for n in range(3)} == {
        "A cat 0.", "A cat 1.", "一只猫",
    }  # fmt: skip
    assert all(len(data[n]["pixel_values"]) == 1 for n in range(3))
    # what is beside a picture may be anything
    (photos / "0.txt").rename(photos / "0.TXT")
    (photos / "1.txt").unlink()
    os.mkfifo(photos / "1.txt")
    with open(photos / "sub/x.txt", "wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    assert count_rows(photos, None)[1] == {"usable": 1, "text is no file": 1, "text too large": 1}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", '{"file_name": "0.jpg", "text": "A"}\n'),
        ("metadata.csv", "file_name,text\n0.jpg,A\n"),
    ],
)
def test_a_folder_with_metadata(photos, processor, name, text):
    (photos / name).write_text(text)
    data = open_data([str(photos)], None, processor, 200)
    assert len(data) == 1 and len(data[0]["pixel_values"]) == 1


def test_folders_of_data_files(tmp_path, photos):
    with pytest.raises(MissingFileError, match="photos holds no rows: no .parquet"):
        find_sources([str(photos)], None)
    (tmp_path / "set/data").mkdir(parents=True)
    names = [f"{split}-0000{n}-of-00002.jsonl" for split in ("test", "train") for n in range(2)]
    for name in names:
        write_rows(tmp_path / "set/data" / name, [{"conversations": [user("Q"), assistant("A")]}])
    sources = find_sources([f"{tmp_path}/set:2"], [str(photos)])
    assert [source.path for source in sources] == [
        str(tmp_path / "set/data" / name) for name in names[2:]
    ]
    assert {(source.images, source.weight) for source in sources} == {(str(photos), 2)}
    with pytest.raises(UserError, match="holds 2 data files: name one"):
        open_rows(tmp_path / "set", None)


def write_shard(path, files: dict[str, bytes]):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_shards_of_webdataset(tmp_path, processor):
    texts = json.dumps({"caption": "A dog", "url": "http://x/a.jpg", "status": "success"})
    long = f"{'x' * 150}/0001"
    write_shard(
        tmp_path / "part-0.tar",
        {
            "0000.jpg": encoded(0), "0000.txt": b"A cat", "0000.cls": b"3", "0000.a.png": b"mask",
            "0001.json": texts.encode(), "0001.png": encoded(1),
            "0002.txt": b"no picture", f"{long}.jpg": encoded(2), f"{long}.txt": b"A long name",
            "0003.jpg": b"damaged", "0003.txt": b"A bird",
            "0004.l.jpg": encoded(1), "0004.r.jpg": encoded(2),
            "0004.json": json.dumps([user("<image><image>?"), assistant("Two")]).encode(),
            "0005.jpg": encoded(0), "0006.jpg": encoded(1), "0006.txt": "一只狗。".encode("gbk"),
        },
    )  # fmt: skip
    write_shard(tmp_path / "part-1.tar", {"0.jpg": encoded(0), "0.txt": b"A cat again"})
    data = open_data([f"{tmp_path}/part-*.tar"], None, processor, 200)
    answers = [data.read(n)[0].conversations[1]["content"] for n in range(len(data))]
    assert answers == ["A cat", "A dog", "A long name", "A bird", "Two", "A cat again"]
    assert data.skipped == {
        "text without an image behind it": 1, "image without a text behind it": 1,
        "text is not UTF-8": 1,
    }  # fmt: skip
    assert (data.n_images, data.n_pictures) == (7, 4)
    assert [len(data[n]["pixel_values"]) for n in (0, 2, 4, 5)] == [1, 1, 2, 1]
    with pytest.raises(BadSampleError, match="image damaged"):
        data[3]
    (tmp_path / "bad.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(UserError, match=r"is no whole \.tar"):
        open_rows(tmp_path / "bad.tar", None)


def test_a_shard_ends_at_the_damage_and_says_so(tmp_path):
    files = {f"{n}.jpg": encoded(n) for n in range(4)} | {f"{n}.txt": b"A cat" for n in range(4)}
    path = write_shard(tmp_path / "part.tar", dict(sorted(files.items())))
    whole = path.read_bytes()
    starts = [member.offset for member in tarfile.open(path).getmembers()]
    head, inside = starts[4], starts[4] + 600
    leads_back = tarfile.TarInfo("2.jpg")
    leads_back.size = -1024
    for content, n_good, n_bad in (
        (whole, 4, 0),
        # without the blank blocks at the end
        (whole[: starts[7] + 1024], 4, 0),
        (whole[:inside], 2, 2),
        (whole[: head + 100], 2, 1),
        (whole[:head] + b"x" * 512 + whole[head + 512 :], 2, 1),
        (whole[:head] + leads_back.tobuf(tarfile.GNU_FORMAT) + whole[head + 512 :], 2, 1),
    ):
        path.write_bytes(content)
        rows = open_rows(path, None)
        found = [(key, row) for key, _, row in rows.scan()]
        bad = [key for key, row in found if isinstance(row, BadSampleError)]
        assert (len(found) - len(bad), len(bad)) == (n_good, n_bad)
        assert not bad or found[-1][1].args == ("archive damaged",)
        # each of them is read again from its place
        for key in bad:
            with pytest.raises(BadSampleError):
                rows.read(key)
        assert len(rows.name_places(rows.keys().tolist())) == len(found)


def test_a_shard_may_name_pictures_of_a_folder(tmp_path, photos, processor):
    row = json.dumps({"image_path": "0.jpg", "caption": "A cat"}).encode()
    path = write_shard(tmp_path / "part.tar", {"0.json": row})
    assert open_data([str(path)], [str(photos)], processor, 200).n_images == 1
    with pytest.raises(UserError, match=r"no usable row \(1 image missing\); the image folder"):
        open_data([str(path)], [str(tmp_path / "nowhere")], processor, 200)


@pytest.mark.parametrize("chunk", [16, 2**20])
def test_a_line_without_end_is_one_row(photos, monkeypatch, chunk):
    """However long it is, only its beginning is in memory."""
    for module in ("json_objects", "json_rows", "lines", "table_rows"):
        monkeypatch.setattr(f"dataset.{module}.LARGEST_VALUE", 100)
    monkeypatch.setattr("dataset.lines.CHUNK", chunk)
    for name, head, good in (
        ("a.jsonl", "", '{"image": "0.jpg", "text": "A"}\n'),
        ("a.csv", "image,caption\n", "0.jpg,A\n"),
    ):
        long = good.replace("A", "A" * 300)
        path = photos.parent / name
        path.write_text(head + good + long + good + long.strip(), "utf-8")
        assert count_rows(path, photos)[1] == {"usable": 2, "row too large": 2}
        rows = open_rows(path, photos)
        keys = [key for key, _, row in rows.scan()]
        first = 1 + head.count("\n")
        assert rows.name_places(keys) == [f"line {first + n}" for n in range(4)]
        with pytest.raises(BadSampleError, match="row too large"):
            rows.read(keys[1])
        assert rows.read(keys[2]) == rows.read(keys[0])
        assert len(rows.read_raw(keys[1])["line"]) <= 101
