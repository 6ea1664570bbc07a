"""The preview: what it counts, where it says that rows are broken, what its sheet shows."""

import io
import json
import random
import re
import zipfile
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from common.errors import BadSampleError, run_command
from dataset.language import UNSURE, detect_language
from dataset.preview import __main__ as preview
from dataset.preview.contact_sheet import (
    CUT_SHADES,
    HEADER,
    IMAGE,
    LEARNED,
    LINE_BREAK,
    MARK,
    SHADES,
    Piece,
    Sample,
    draw_sheet,
    lay_out,
    load_font,
    shorten,
    split_pieces,
)
from dataset.vlm_dataset import open_rows
from tests.helpers import (
    N_PATCHES,
    ROOT,
    SHARED,
    TOKENIZER,
    needs_shared,
    picture,
    run_script,
    write_rows,
)

PATCHES = ["--n_image_tokens", str(N_PATCHES)]
words = st.lists(
    st.sampled_from(["red", " circle", "是", "饕餮", "🐶", "é", "\n", " ", "@", "</s>", "x" * 30]),
    min_size=1,
)
texts = words.map("".join)


def row(image: str | None, question: str, answer: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": turns} | ({"image": image} if image else {})


def run(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """(exit status, what is printed) of the command."""
    monkeypatch.setattr(
        "sys.argv", ["preview", "--tokenizer", str(TOKENIZER), *map(str, arguments)]
    )
    with pytest.raises(SystemExit) as ended:
        run_command(preview.main)
    return ended.value.code, capsys.readouterr().out


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=4), st.integers(8, 60)
)
def test_lengths_and_what_cutting_costs(tmp_path_factory, processor, pairs, max_seq_len):
    path = write_rows(
        tmp_path_factory.mktemp("rows") / "rows.jsonl", [row(None, *pair) for pair in pairs]
    )
    rows = open_rows(path, None)
    measured = preview.measure_rows(rows, preview.check_rows(rows).usable, processor, max_seq_len)
    n_labels, n_kept = [], []
    for number, (question, answer) in enumerate(pairs):
        ids = processor.tokenizer(answer, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        n_labels.append(len(ids) + 1)  # </s>
        whole, _ = processor.encode_text(row(None, question, answer)["conversations"], [], 10**6)
        assert measured.tokens[number] == len(whole["input_ids"])
        try:
            cut, _ = processor.encode_text(
                row(None, question, answer)["conversations"], [], max_seq_len
            )
            n_kept.append(int((cut["labels"] != -100).sum()))
        except BadSampleError:
            n_kept.append(0)
    assert measured.labels.tolist() == n_labels and measured.labels_kept.tolist() == n_kept
    assert measured.languages.total() == len(pairs)


def test_the_printed_numbers(tmp_path, monkeypatch, capsys, processor):
    """Counts, percentiles and shares against numpy's, for rows of 0, 1 and 2 images."""
    rng = random.Random(1)
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images/a.png")
    rows = []
    for number in range(40):
        n_images = number % 3
        question = "<image>" * (n_images + (number == 5)) + "What? " * rng.randint(1, 6)
        rows.append(
            row(", ".join(["a.png"] * n_images) or None, question, "red " * rng.randint(1, 40))
        )
    path = write_rows(tmp_path / "rows.jsonl", rows)
    status, printed = run(
        monkeypatch,
        capsys,
        path,
        "--images",
        tmp_path / "images",
        *PATCHES,
        "--max_seq_len",
        70,
        "--samples",
        0,
    )
    assert (
        status == 0
        and "rows             40\nusable           40  (100.0%)\nleft out         0\n" in printed
    )
    assert (
        "repaired         1  " in printed
        and "images per row   0: 14   1: 13   2: 13\nanswers per row  1: 40" in printed
    )
    encoded = [
        processor.encode_text(r["conversations"], [0] * (n % 3), 10**6)[0]
        for n, r in enumerate(rows)
    ]
    tokens = np.array([len(one["labels"]) for one in encoded])
    labels = np.array([(one["labels"] != -100).sum() for one in encoded])
    kept = np.array([(one["labels"][:70] != -100).sum() for one in encoded])  # no image lies beyond
    for name, lengths in (("tokens per row", tokens), ("learned of them", labels)):
        numbers = [int(text) for text in re.search(rf"{name}(.*)", printed)[1].split()]
        assert (
            np.abs(
                numbers - np.append(np.percentile(lengths, [1, 50, 90, 99, 100]), lengths.mean())
            ).max()
            <= 0.5
        )
    assert 0 < (tokens > 70).mean() < 1 and kept.all()
    assert (
        f"cut at 70        {(tokens > 70).mean():.1%} of the rows, {1 - kept.sum() / labels.sum():.1%} of what"
        in printed
    )
    _, printed = run(
        monkeypatch,
        capsys,
        path,
        "--images",
        tmp_path / "images",
        *PATCHES,
        "--max_seq_len",
        12,
        "--samples",
        0,
    )
    assert (
        "100.0% of the rows, 100.0% of what" in printed
        and "40 rows (100.0%) have no answer left" in printed
    )
    assert not (ROOT / "out/preview_rows.png").exists()


def test_broken_rows_are_named_by_their_place(tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images/a.png")
    (tmp_path / "images/torn.png").write_bytes((tmp_path / "images/a.png").read_bytes()[:200])
    lines = [
        row("a.png", "<image>?", "红"), "", row("missing.png", "<image>?", "x"), '{"image": ', "", '"text"',
        row("torn.png", "<image>?", "x"), row("../a.png", "<image>?", "x"), row("a.png", "?", "x"), [1, 2],
        *[row(None, "?", " ")] * 5, row("a.png\u2028\x1b.png", "<image>?", "x"),
        row(None, "?", "\ud83d"),
    ]  # fmt: skip
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    status, printed = run(
        monkeypatch, capsys, path, "--images", tmp_path / "images", *PATCHES, "--out_dir", tmp_path
    )
    assert (
        status == 0
        and "rows             15\nusable           1  (6.7%)\nleft out         14  (93.3%)"
        in printed
    )
    found = re.findall(r"^ +(\d+)  (.+)((?:\n {11}line .*)+)", printed, re.M)
    places = {
        reason: (int(count), re.findall(r"^ +line (\d+)", lines, re.M))
        for count, reason, lines in found
    }
    assert places == {
        "empty answer": (5, ["11", "12", "13"]),
        "not a JSON object": (3, ["4", "6", "10"]),
        "image missing": (2, ["3", "16"]),
        "image path leaves its folder": (1, ["8"]),
        "fewer <image> than images": (1, ["9"]),
        "image damaged": (1, ["7"]),
        "half a character": (1, ["17"]),
    }
    details = (
        "missing.png",
        "Expecting value",
        "it is [1, 2]",
        r"a.png \x1b.png",
        "0 for 1",
        r"'\ud83d'",
    )
    for detail in details:
        assert detail in printed, detail

    path.write_text("\n".join(lines[1:]), encoding="utf-8")
    status, printed = run(monkeypatch, capsys, path, "--images", tmp_path / "images", *PATCHES)
    assert status == 1 and "line 15" in printed, "no usable row"
    status, printed = run(monkeypatch, capsys, path, "--images", tmp_path / "nowhere")
    assert status == 1 and "nowhere, which is not there" in printed
    assert run(monkeypatch, capsys, tmp_path / "none.jsonl")[0] == 2


def test_rows_of_a_parquet_file(tmp_path, monkeypatch, capsys):
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    conversations = [json.dumps(row(None, "<image>?", "red")["conversations"])] * 4 + ["{", "[]"]
    images = [[buffer.getvalue()], [], [buffer.getvalue()[:99]], [buffer.getvalue()], [], []]
    parquet.write_table(
        pa.table({"conversations": conversations, "image_bytes": images}), tmp_path / "rows.parquet"
    )
    status, printed = run(
        monkeypatch, capsys, f"{tmp_path}/*.parquet:2", *PATCHES, "--out_dir", tmp_path
    )
    assert (
        status == 0
        and "usable           3  (50.0%)" in printed
        and "each row 2 times an epoch" in printed
    )
    for place in ("row 3 ", "row 5 ", "row 6\n"):
        assert place in printed
    assert (tmp_path / "preview_rows.png").is_file()


def test_a_large_file_is_sampled(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preview, "MOST_MEASURED", 30)
    monkeypatch.setattr(preview, "MOST_OPENED", 20)
    rows = [row(f"{number}.png", "<image>?", "red") for number in range(100)]
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number in range(100):
            archive.writestr(f"{number}.png", b"no picture")
    path = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = path, "--images", tmp_path / "images.zip", *PATCHES, "--out_dir", tmp_path
    status, printed = run(monkeypatch, capsys, *arguments)
    assert (
        status == 0 and "usable           80  (80.0%)" in printed and "20  image damaged" in printed
    )
    assert re.search(r"line \d+ +\d+\.png: no picture\n", printed), "the picture that is damaged"
    assert (
        "those of 20 random rows were opened" in printed and "in 30 random usable rows" in printed
    )
    assert not list(tmp_path.glob("*.png")), "nothing to draw"
    assert run(monkeypatch, capsys, *arguments)[1] == printed, "the same seed"
    assert run(monkeypatch, capsys, *arguments, "--seed", 1)[1] != printed


def test_languages_of_short_texts():
    assert (
        detect_language("A dog runs across the grass.") == "en"
        and detect_language("一只狗在草地上跑。") == "zh"
    )
    assert detect_language("大马跳起来。") == "zh" == detect_language("狗狗吐舌头。"), (
        "py3langid: Wu Chinese"
    )
    assert (
        detect_language("大马跳起来 ABCDEF GHIJ")
        == "zh"
        == detect_language("街上好多人 DJ MV TV KTV")
    ), "Wu and Yue"
    assert (
        detect_language("犬が芝生の上を走っています。") == "ja"
        and detect_language("개가 잔디밭을 달린다.") == "ko"
    )
    assert detect_language("Собака бежит по зеленой траве.") == "ru"
    for text in ("", "red", "42", "B2", "🐶", "\n"):
        assert detect_language(text) == UNSURE, text


@needs_shared
def test_languages_of_real_captions():
    captions = [
        json.loads(line)["conversations"][1]["content"]
        for line in open(SHARED / "flickr8k/pretrain_vlm_data.jsonl")
    ]
    captions = random.Random(0).sample(captions, 3000)
    is_chinese = [bool(re.search("[一-鿿]", caption)) for caption in captions]
    for language, expected in (("zh", True), ("en", False)):
        told = [
            detect_language(caption)
            for caption, chinese in zip(captions, is_chinese)
            if chinese == expected
        ]
        assert len(told) > 1000 and told.count(language) / len(told) >= 0.95


@settings(max_examples=60, deadline=None)
@given(texts, texts.filter(str.strip), st.integers(0, 2))
def test_pieces_are_the_tokens_in_whole_characters(processor, question, answer, n_images):
    turns = row(None, "<image>" * n_images + question, answer)["conversations"]
    sample, _ = processor.encode_text(turns, [None] * n_images, 10**6)
    pieces = split_pieces(sample, 10**6, processor)
    assert sum(piece.n_tokens for piece in pieces) == len(sample["input_ids"])
    assert (
        sum(piece.n_tokens for piece in pieces if piece.kind == LEARNED)
        == (sample["labels"] != -100).sum()
    )
    assert sum(piece.kind == IMAGE for piece in pieces) == n_images
    assert "".join(piece.text for piece in pieces if piece.kind == LEARNED) == answer + "</s>"
    text = "".join(piece.text for piece in pieces if piece.kind != IMAGE)
    assert "\ufffd" not in text and question.replace("\n", "") in text.replace("\n", "")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(texts.map(lambda text: Piece(text, 1, LEARNED)), max_size=30), st.integers(100, 400)
)
def test_lines_hold_everything_side_by_side(pieces, width):
    placed = lay_out(pieces, lambda text: 10 * len(text), width)
    shown = "".join(one.text for one in placed).replace(LINE_BREAK, "\n")
    assert shown == "".join(piece.text for piece in pieces)
    for one, after in pairwise(placed):
        starts_line = after.line == one.line + 1 and after.x == 0
        assert starts_line or (after.line == one.line and after.x == one.x + one.width)
        assert one.text != LINE_BREAK or starts_line
    assert all(one.x == 0 or one.text == LINE_BREAK or one.x + one.width <= width for one in placed)


def test_a_line_ends_before_a_word():
    """A word of several tokens stays together, unless it is longer than a line."""
    tokens = ["aa", " wa", "ter", "melon", ".", " 一", "二三", "x" * 30, "y" * 30]
    placed = lay_out([Piece(token, 1, LEARNED) for token in tokens], len, 13)
    assert [(one.text, one.line) for one in placed[:7]] == [
        ("aa", 0), (" wa", 1), ("ter", 1), ("melon", 1), (".", 1), (" 一", 2), ("二三", 2),
    ]  # fmt: skip


def test_a_turn_starts_on_the_line_of_its_role():
    tokens = [
        "<s>",
        "user",
        "\n",
        "hi",
        "\n",
        "there",
        "</s>",
        "\n",
        "<s>",
        "assistant",
        "\n",
        "yes",
    ]
    placed = lay_out(
        [Piece(token, 1, MARK if "s>" in token else LEARNED) for token in tokens], len, 99
    )
    assert [one.line for one in placed] == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_a_long_row_is_shortened():
    pieces = [Piece(str(number), 2, LEARNED) for number in range(1000)]
    short = shorten(pieces)
    assert len(short) < 300 and short[0] == pieces[0] and short[-1] == pieces[-1]
    assert sum(piece.n_tokens for piece in short) == 2000
    assert any("…" in piece.text and f"{piece.n_tokens:,} tokens" in piece.text for piece in short)
    assert shorten(pieces[:100]) == pieces[:100]


def count_pixels(sheet: Image.Image, shades: tuple[str, ...], top: int) -> int:
    """Pixels of these colours below `top`, where the legend ends."""
    pixels = np.asarray(sheet)[top:]
    return sum(int((pixels == ImageColor.getrgb(shade)).all(axis=2).sum()) for shade in shades)


def draw(processor, question: str, answer: str, max_seq_len: int = 640) -> Image.Image:
    conversation = row(None, question, answer)
    n_images = question.count("<image>")
    whole, n_kept, _ = preview.encode_and_cut(conversation, n_images, processor, max_seq_len)
    sample = Sample("line 1", [picture()] * n_images, split_pieces(whole, n_kept, processor))
    return draw_sheet([sample], "rows.jsonl", "", N_PATCHES, max_seq_len)


def test_green_is_what_is_learned_and_red_what_is_cut(processor):
    short, long = (
        draw(processor, "<image>What color?", answer) for answer in ("red", "red and blue " * 8)
    )
    n_short, n_long = (count_pixels(sheet, SHADES[LEARNED], HEADER) for sheet in (short, long))
    assert 200 < n_short < n_long / 4
    assert count_pixels(long, CUT_SHADES, HEADER) == 0 < count_pixels(long, SHADES[IMAGE], HEADER)
    half = draw(processor, "<image>What color?", "red and blue " * 8, max_seq_len=60)
    assert n_short < count_pixels(half, SHADES[LEARNED], HEADER) < n_long
    assert count_pixels(half, CUT_SHADES, HEADER) > 200
    nothing = draw(processor, "<image>What color?", "red and blue", max_seq_len=20)
    assert (
        count_pixels(nothing, SHADES[LEARNED], HEADER)
        == 0
        < count_pixels(nothing, CUT_SHADES, HEADER)
    )


def test_chinese_is_drawn_and_what_the_font_lacks_is_a_box(processor):
    font = load_font(20)
    glyphs = {character: bytes(font.getmask(character)) for character in "狗饕餮a，⏎…×·\U0010ffff"}
    assert len(set(glyphs.values())) == len(glyphs), "ten different pictures, the last the box"
    assert bytes(font.getmask("🐶")) == glyphs["\U0010ffff"]
    dogs, cats = (np.asarray(draw(processor, "?", character * 5)) for character in "狗猫")
    assert dogs.shape == cats.shape and (dogs != cats).any()
    draw(
        processor,
        "<image>" * 12 + "\t\r\x00\u200d\ue000\u202e\u0e01",
        "👨‍👩‍👧 \x1b[0m ﷽ e\u0301" * 3,
    )


def test_the_command(tmp_path):
    """As the README says; text without images beside a file with them."""
    (tmp_path / "images").mkdir()
    picture(1).save(tmp_path / "images/a.png")
    both = write_rows(
        tmp_path / "both.jsonl",
        [row("a.png", "<image>\n?", "一只狗"), row(None, "?", "A dog runs on the grass.")],
    )
    text = write_rows(tmp_path / "text.jsonl", [row(None, "?", "好")] * 3)
    finished = run_script(
        "-m", "dataset.preview", both, text, "--images", tmp_path / "images", "--tokenizer", TOKENIZER, "--out_dir", tmp_path
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout
    assert (
        "languages        zh 50.0%   en 50.0%" in finished.stdout
        and "images per row   0: 3" in finished.stdout
    )
    for name in ("both", "text"):
        with Image.open(tmp_path / f"preview_{name}.png") as sheet:
            sheet.load()
            assert sheet.width > 1000 and sheet.format == "PNG"
