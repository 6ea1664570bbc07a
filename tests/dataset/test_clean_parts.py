"""Parts of a cleaning: repairs of text and turns, fingerprints of pictures."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import BadSampleError
from common.text import IMAGE_TAG, simplify_answer
from dataset.clean.decide import count_validation
from dataset.clean.duplicates import MAX_DISTANCE, find_duplicates, near_hashes
from dataset.clean.examine import PICTURE, examine_picture, hash_text, shrink
from dataset.clean.repair import check_answers, repair_conversation, repair_text
from dataset.clean.settings import Settings
from model.processing import check_conversation, match_image_tags
from tests.helpers import assistant, picture, user

contents = st.lists(
    st.sampled_from([IMAGE_TAG, "a", " ", "图", "\n", "Ã©", "\x00", "", "What?"]), max_size=5
).map("".join)
turns = st.fixed_dictionaries(
    {"content": contents},
    optional={"role": st.sampled_from(["user", "assistant", "human", "gpt", "", None])},
)


# A busy machine is slow, not wrong.
@settings(deadline=None)
@given(st.lists(turns, max_size=6), st.integers(0, 3))
def test_a_repaired_row_can_be_learned_from_and_needs_no_second_repair(conversation, n_images):
    try:
        repaired, repairs = repair_conversation(conversation, n_images)
    except BadSampleError:
        return
    checked = check_conversation(repaired)
    assert [turn["role"] for turn in repaired][-1] == "assistant"
    assert match_image_tags(checked, n_images)[1] == 0, "as many tags as images"
    assert repair_conversation(repaired, n_images) == (repaired, []), "nothing is left to repair"
    if not repairs:
        assert [turn["content"].strip() for turn in conversation] == [
            turn["content"] for turn in repaired
        ]


def test_repairs_of_text():
    for broken, whole in (
        ("cafÃ© and â€œquotesâ€\x9d", "café and “quotes”"),
        ("a\x00b\x1b[31mred\x07", "abred"),
        ("e\u0301", "é"),
        # What people write stays: full-width signs, ligatures.
        (" ，全角Ａ！ﬁne ", "，全角Ａ！ﬁne"),
        ("&lt;image&gt; &amp; text", "<image> & text"),
    ):
        assert repair_text(broken, []) == whole
    with pytest.raises(BadSampleError, match="lost characters"):
        repair_conversation([user("x"), assistant("half a \ud83d character")], 0)


def test_repairs_of_turns():
    assert repair_conversation([user("What?"), assistant("A cat.")], 2) == (
        [user("<image>\n<image>\nWhat?"), assistant("A cat.")],
        ["<image> put in front"],
    )
    joined = [user("<image>\nHi"), user("there"), assistant("Yes."), user("No answer to this")]
    assert repair_conversation(joined, 1)[0] == [user("<image>\nHi\nthere"), assistant("Yes.")]
    blank = [
        {"role": "system", "content": "S"},
        user("<image>"),
        assistant(" "),
        user("What?"),
        assistant("A dog."),
    ]
    assert repair_conversation(blank, 1)[0] == [
        blank[0],
        user("<image>\nWhat?"),
        assistant("A dog."),
    ]
    assert repair_conversation([{"content": "Q"}, {"content": "A"}], 0)[0] == [
        user("Q"),
        assistant("A"),
    ]
    for bad, reason in (
        ([assistant("first"), user("second")], "wrong roles|no answer"),
        ([user("only a question")], "no answer"),
        ([], "no conversation"),
    ):
        with pytest.raises(BadSampleError, match=reason):
            repair_conversation(bad, 0)


def test_limits_of_answers():
    rows = [user("Q"), assistant("Ein Hund läuft über die grüne Wiese und bellt laut.")]
    assert check_answers(rows, Settings(languages=["de"])) and check_answers(rows, Settings())
    for limits, reason in (
        (Settings(languages=["en", "zh"]), "other language"),
        (Settings(min_answer=60), "answer too short"),
        (Settings(max_answer=20), "answer too long"),
    ):
        with pytest.raises(BadSampleError, match=reason):
            check_answers(rows, limits)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=60, unique=True),
    st.randoms(use_true_random=False),
)
def test_the_search_for_near_hashes_misses_none(hashes, random):
    for hash in list(hashes[:20]):
        flips = random.sample(range(64), random.randint(1, 9))
        hashes.append(hash ^ sum(1 << bit for bit in flips))
    unique = np.unique(np.array(hashes, np.uint64))
    starts, numbers = near_hashes(unique)
    distance = np.bitwise_count(unique[:, None] ^ unique[None])
    for k in range(len(unique)):
        assert (
            sorted(numbers[starts[k] : starts[k + 1]])
            == np.flatnonzero(distance[k] <= MAX_DISTANCE).tolist()
        )


def test_a_copy_is_of_a_picture_that_stays():
    """No chain: each picture is near the one before, the last is far from the first."""
    pictures = np.zeros(5, PICTURE)
    pictures["hash"] = [0b0, 0b11111, 0b11111_11111, 2**63 - 1, 0b0]
    pictures["digest"] = [1, 2, 3, 4, 1]
    everyone = np.arange(5)
    repeats, is_near = find_duplicates(pictures, everyone, set())
    assert repeats.tolist() == [-1, 0, -1, -1, 0]
    assert is_near.tolist() == [False, True, False, False, False]
    # a damaged picture is compared with none
    repeats, _ = find_duplicates(pictures, np.array([1, 2, 4]), set())
    assert repeats.tolist() == [-1, -1, 1, -1, 1]
    # those of one row are no copies of each other
    together = {(1, 0), (0, 1), (0, 4), (4, 0)}
    assert find_duplicates(pictures, everyone, together)[0].tolist() == [-1, -1, 1, -1, -1]
    # the same pattern in another color
    pictures["thumbnail"][1, 3, 3, 0] = 200
    assert find_duplicates(pictures, everyone, set())[0].tolist() == [-1, -1, -1, -1, 0]


def test_pictures_are_made_small_and_left_alone_where_they_are():
    def examine(content: bytes, **limits) -> tuple[bytes, np.void]:
        found = np.zeros(1, PICTURE)[0]
        return examine_picture(io.BytesIO(content), Settings(**limits), found), found

    buffer = io.BytesIO()
    picture(size=(128, 128)).save(buffer, "JPEG", quality=40)
    jpeg = buffer.getvalue()
    kept, found = examine(jpeg)
    assert kept == jpeg and found["size"].tolist() == [128, 128] and found["digest"] > 0
    small = Image.open(io.BytesIO(examine(jpeg, size=64)[0]))
    assert small.size == (64, 64) and small.format == "JPEG"
    buffer = io.BytesIO()
    picture(size=(200, 120)).convert("RGBA").save(buffer, "PNG")
    png = buffer.getvalue()
    whole = Image.open(io.BytesIO(shrink(picture(size=(200, 120)), png, 0)))
    assert whole.size == (200, 120) and whole.format == "JPEG"
    for content, limits, reason in (
        (jpeg[: len(jpeg) // 2], {}, "image damaged"),
        (b"no picture", {}, "image damaged"),
        (png, {"min_side": 121}, "image too small"),
        (png, {"max_aspect": 1.5}, "image too narrow"),
    ):
        with pytest.raises(BadSampleError, match=reason):
            examine(content, **limits)


def test_which_answers_are_the_same():
    same = {"A red  cat.", "a red cat", " A red cat。", "A RED CAT!", "Ａ red cat！ "}
    assert {simplify_answer(one) for one in same} == {"a red cat"}
    assert hash_text("A red cat.") == hash_text("a red cat") != hash_text("a red cat?")


def test_a_report_names_the_version_of_the_data_file(tmp_path):
    """Also where it is given as the folder that it is in."""
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    of_folder = Settings(str(tmp_path), "out").describe()
    of_file = Settings(str(path), "out").describe()
    assert of_folder == of_file | {"data": str(tmp_path)} and of_file["bytes"] == 3


def test_small_sets_get_a_validation_part_that_says_something():
    """1 %; of small sets 10 % up to 100 rows, at least 10 rows, at most a fifth."""
    sizes = (1, 4, 5, 20, 50, 60, 100, 500, 1000, 5000, 20_000, 600_000)
    counts = [count_validation(n, None) for n in sizes]
    assert counts == [0, 0, 1, 4, 10, 10, 10, 50, 100, 100, 200, 6000]
    assert [count_validation(60, share) for share in (0, 0.01, 0.1, 0.5)] == [0, 1, 6, 30]
