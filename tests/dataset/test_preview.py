"""The preview: what it counts, where it says that rows are broken, what its page shows."""

import io
import json
import random
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import BadSampleError, run_command
from dataset.language import UNSURE, detect_language
from dataset.preview import __main__ as preview
from dataset.preview import checks
from dataset.preview.contact_sheet import (
    CUT,
    GAP,
    IMAGE,
    LABEL,
    LINE_BREAK,
    MARK,
    SEEN,
    Piece,
    Sample,
    shorten,
    split_pieces,
    write_sheet,
)
from dataset.rows import open_rows
from model.processing import count_labels
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
    measured = checks.count_tokens(rows, checks.check_rows(rows).usable, processor, max_seq_len)
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
        "repaired         1 surplus <image> dropped" in printed
        and "images per row   0: 14   1: 13   2: 13\nanswers per row  1: 40" in printed
    )
    encoded = [
        processor.encode_text(r["conversations"], [0] * (n % 3), 10**6)[0]
        for n, r in enumerate(rows)
    ]
    tokens = np.array([len(one["labels"]) for one in encoded])
    labels = np.array([(one["labels"] != -100).sum() for one in encoded])
    kept = np.array([(one["labels"][:70] != -100).sum() for one in encoded])  # no image lies beyond
    for name, lengths in (("tokens per row", tokens), ("label tokens", labels)):
        numbers = [int(text) for text in re.search(rf"{name}(.*)", printed)[1].split()]
        assert (
            np.abs(
                numbers - np.append(np.percentile(lengths, [1, 50, 90, 99, 100]), lengths.mean())
            ).max()
            <= 0.5
        )
    assert 0 < (tokens > 70).mean() < 1 and kept.all()
    cut, lost = (tokens > 70).mean(), 1 - kept.sum() / labels.sum()
    assert f"cut at 70        {cut:.1%} of the rows, {lost:.1%} of the label tokens" in printed
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
        "100.0% of the rows, 100.0% of the label" in printed
        and "40 rows (100.0%) have no answer left" in printed
    )
    assert not (ROOT / "out/preview_rows.html").exists()


def test_broken_rows_are_named_by_their_place(tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images/a.png")
    (tmp_path / "images/torn.png").write_bytes((tmp_path / "images/a.png").read_bytes()[:200])
    lines = [
        row("a.png", "<image>?", "红"),
        "",
        row("missing.png", "<image>?", "x"),
        '{"image": ',
        "",
        '"text"',
        row("torn.png", "<image>?", "x"),
        row("../a.png", "<image>?", "x"),
        row("a.png, a.png", "?", "x"),
        [1, 2],
        *[row(None, "?", " ")] * 5,
        row("a.png\u2028\x1b.png", "<image>?", "x"),
        row(None, "?", "\ud83d"),
    ]
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
        "0 for 2",
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
        and "usable           2  (33.3%)" in printed
        and "each row 2 times an epoch" in printed
    )
    assert "format           MiniMind-V (Parquet)" in printed
    assert "distinct images  1 of 2\n" in printed, "without the cut one"
    for place in ("row 2 ", "row 3 ", "row 5 ", "row 6 "):
        assert place in printed
    assert (tmp_path / "preview_rows.html").is_file()


def test_a_large_file_is_sampled(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checks, "MOST_COUNTED", 30)
    monkeypatch.setattr(checks, "MOST_OPENED", 20)
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
    assert not list(tmp_path.glob("*.html")), "nothing to show"
    assert run(monkeypatch, capsys, *arguments)[1] == printed, "the same seed"
    assert run(monkeypatch, capsys, *arguments, "--seed", 1)[1] != printed


def test_pictures_are_in_memory_as_small_as_they_are_shown(tmp_path, processor):
    picture(size=(800, 1000)).save(tmp_path / "a.png")
    path = write_rows(tmp_path / "rows.jsonl", [row("a.png", "<image>?", "red")])
    rows = open_rows(path, tmp_path)
    [sample] = checks.make_samples(rows, rows.keys().tolist(), processor, 100)
    assert [image.size for image in sample.images] == [(256, 320)]


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
        sum(piece.n_tokens for piece in pieces if piece.kind == LABEL)
        == (sample["labels"] != -100).sum()
    )
    assert sum(piece.kind == IMAGE for piece in pieces) == n_images
    assert "".join(piece.text for piece in pieces if piece.kind == LABEL) == answer + "</s>"
    text = "".join(piece.text for piece in pieces if piece.kind != IMAGE)
    assert "\ufffd" not in text and question.replace("\n", "") in text.replace("\n", "")


def test_a_long_row_is_shortened():
    pieces = [Piece(str(number), 2, LABEL) for number in range(3000)]
    short = shorten(pieces)
    assert len(short) < 900 and short[0] == pieces[0] and short[-1] == pieces[-1]
    assert sum(piece.n_tokens for piece in short) == 6000
    gap = [piece for piece in short if piece.kind == GAP]
    assert len(gap) == 1 and gap[0].text == f" … {gap[0].n_tokens:,} tokens … "
    assert shorten(pieces[:100]) == pieces[:100]


class Page(HTMLParser):
    """What a page shows: (class, tokens, text) of the spans of each row, tags, attributes."""

    def __init__(self, path: Path):
        super().__init__()
        self.rows, self.tags, self.attributes, self.is_token = [], [], [], False
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        attributes = dict(attributes)
        if attributes.get("class") == "tokens":
            self.rows.append([])
        self.is_token = tag == "span" and self.rows != []
        if self.is_token:
            n_tokens = int(attributes.get("title", "1 token").split()[0])
            self.rows[-1].append((attributes["class"], n_tokens, ""))

    def handle_endtag(self, tag: str) -> None:
        self.is_token = False

    def handle_data(self, text: str) -> None:
        if self.is_token:
            kind, n_tokens, before = self.rows[-1][-1]
            self.rows[-1][-1] = (kind, n_tokens, before + text)

    def count(self, kind: str) -> int:
        return sum(n_tokens for row in self.rows for one, n_tokens, _ in row if one == kind)

    def text(self, *kinds: str) -> str:
        return "".join(text for row in self.rows for kind, _, text in row if kind in kinds)


def show_page(processor, path: Path, question: str, answer: str, max_seq_len: int = 640) -> Page:
    n_images = question.count("<image>")
    turns = row(None, question, answer)["conversations"]
    whole, n_kept, _ = checks.encode_and_cut(turns, n_images, processor, max_seq_len)
    sample = Sample("line 1", [picture()] * n_images, split_pieces(whole, n_kept, processor))
    write_sheet(path, "<b>rows</b>.jsonl", "about", [sample], f"--max_seq_len {max_seq_len}")
    return Page(path)


@settings(max_examples=60, deadline=None)
@given(texts, texts.filter(str.strip), st.integers(0, 2), st.integers(20, 120))
def test_green_is_what_the_loss_counts_and_red_what_is_cut(
    processor, tmp_path_factory, question, answer, n_images, max_seq_len
):
    path = tmp_path_factory.mktemp("page") / "page.html"
    question = "<image>" * n_images + question
    whole, n_kept, n_labels_kept = checks.encode_and_cut(
        row(None, question, answer)["conversations"], n_images, processor, max_seq_len
    )
    n_tokens = len(whole["labels"])
    page = show_page(processor, path, question, answer)
    assert page.count(LABEL) == count_labels(whole["labels"]) and page.count(CUT) == 0
    assert page.text(LABEL) == (answer + "</s>").replace("\n", f"{LINE_BREAK}\n")
    assert page.count(IMAGE) == n_images * N_PATCHES and page.tags.count("img") == n_images
    assert sum(map(page.count, (LABEL, IMAGE, SEEN, MARK))) == n_tokens
    # the tokens of one character may lie on both sides of the cut
    page = show_page(processor, path, question, answer, max_seq_len)
    tolerance = 3 * (0 < n_kept < n_tokens)
    assert abs(page.count(CUT) - (n_tokens - n_kept)) <= tolerance
    assert abs(page.count(LABEL) - n_labels_kept) <= tolerance


def test_whatever_people_write_is_shown_as_text(processor, tmp_path):
    hostile = (
        '</span></div><script>alert(1)</script><img src="http://x/" onerror="y()">&amp; &#106;'
    )
    question = f"<image>{hostile} 狗饕餮，🐶"
    page = show_page(processor, tmp_path / "page.html", question, f"猫'\"{hostile}</s>")
    assert hostile in page.text(SEEN) and "狗饕餮，🐶" in page.text(SEEN, MARK)
    assert page.text(LABEL) == f"猫'\"{hostile}</s></s>"
    assert page.tags.count("img") == 1 and not {"script", "a", "link"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert names <= {"lang", "charset", "class", "title", "src", "alt", "style"}
    sources = [value for name, value in page.attributes if name == "src"]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "&lt;b&gt;rows&lt;/b&gt;.jsonl</h1>" in (tmp_path / "page.html").read_text("utf-8")
    # what cannot be shown is a box: it could turn the line around, or hide
    page = show_page(processor, tmp_path / "page.html", "\t\r\x00\u200d\u202e", "e\u0301 ﷽ \x1b[0m")
    assert "\u202e" not in page.text(SEEN) and page.text(SEEN).count("□") == 3
    assert page.text(LABEL) == "e\u0301 ﷽ □[0m</s>"


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
        *("-m", "dataset.preview", both, text, "--images", tmp_path / "images"),
        *("--tokenizer", TOKENIZER, "--out_dir", tmp_path),
    )
    assert finished.returncode == 0, finished.stdout
    assert (
        "languages        zh 50.0%   en 50.0%" in finished.stdout
        and "images per row   0: 3" in finished.stdout
    )
    for name, n_pictures in (("both", 1), ("text", 0)):
        page = Page(tmp_path / f"preview_{name}.html")
        assert page.tags.count("img") == n_pictures and page.count(LABEL) > 0


def test_what_stops_a_preview_is_said_in_one_line(tmp_path):
    for command, message in (
        ((tmp_path / "none.jsonl",), "none.jsonl"),
        ((__file__, "--tokenizer", tmp_path), "no tokenizer in"),
        ((__file__, "--samples", "-1"), "--samples is -1: it has to be from 0 to 256"),
    ):
        finished = run_script("-m", "dataset.preview", *command)
        assert finished.returncode == 2 and message in finished.stdout
        assert finished.stdout.count("\n") == 1, finished.stdout
