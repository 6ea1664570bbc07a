"""Answers that are given together are those that each request would get alone."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import batch_rows
from inference.answer_text import AnswerText
from inference.batch_rows import Rows
from inference.batching import Answer, Batcher, FeatureCache, Picture
from inference.load import VLM
from inference.onnx_model import OnnxVLM
from model.processing import VLMProcessor, load_tokenizer
from scripts.export.onnx_graphs import write_graphs
from tests.helpers import N_PATCHES, TOKENIZER, small_image_processor, small_model

MAX_SEQ_LEN = 96


@pytest.fixture(scope="module")
def vlm():
    # float64, so that the order of a sum decides no token
    model = small_model(max_seq_len=MAX_SEQ_LEN).double()
    processor = VLMProcessor(load_tokenizer(TOKENIZER), small_image_processor(), model.config)
    return VLM(model, processor, None)


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    """The same network in float32, exported."""
    model = small_model(max_seq_len=MAX_SEQ_LEN)
    processor = VLMProcessor(load_tokenizer(TOKENIZER), small_image_processor(), model.config)
    folder = tmp_path_factory.mktemp("exported")
    write_graphs(VLM(model, processor, None), folder / "onnx", ("float32",))
    return VLM(OnnxVLM(model.config, folder, "float32"), processor, None)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Prompts of several chunks, and a cache that has to grow."""
    monkeypatch.setattr(batch_rows, "CHUNK", 16)
    monkeypatch.setattr(batch_rows, "FIRST_COLUMNS", 32)


def make_prompt(vlm, seed: int, n_tokens: int, n_images: int = 0):
    """(int64[1, T], pictures): text, then pictures, then text."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(40, 672, (1, n_tokens), generator=generator)
    image = torch.full((1, N_PATCHES), 34)
    pieces = [text[:, :1], *[image, text[:, :1]] * n_images, text[:, 1:]]
    pixels = torch.randn(n_images, 3, 48, 48, generator=generator)
    pixels = pixels.to(vlm.model.tok_embeddings.weight.dtype).split(1) if n_images else ()
    pictures = [Picture(bytes([seed, index]), one) for index, one in enumerate(pixels)]
    return torch.cat(pieces, dim=1), pictures


def answer_alone(vlm, input_ids, pictures, **sampling) -> list[int]:
    pixel_values = torch.cat([one.pixel_values for one in pictures]) if pictures else None
    tokens = vlm.model.generate(input_ids, pixel_values, **sampling)
    return tokens[0, input_ids.shape[1] :].tolist()


class Recorded(Answer):
    """An answer that remembers its tokens, and when it was over."""

    def __init__(self, *args, **options):
        self.tokens, self.pieces, self.is_over = [], [], threading.Event()
        self.after_token = lambda: None
        super().__init__(*args, on_piece=self.take, **options)

    def take(self, piece: str) -> None:
        self.pieces.append(piece)
        if not piece:
            self.is_over.set()

    def add(self, token: int) -> None:
        self.tokens.append(token)
        super().add(token)
        self.after_token()

    def wait(self) -> "Recorded":
        assert self.is_over.wait(60)
        assert self.error is None
        return self


@pytest.fixture
def batcher(vlm):
    batcher = Batcher(vlm, 3)
    yield batcher
    batcher.close()


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 60),  # tokens of the prompt
        st.integers(0, 2),  # pictures
        st.integers(1, 40),  # longest answer
        st.sampled_from((0.0, 0.0, 1.5)),  # temperature
        st.integers(0, 20),  # rounds before it arrives
    ),
    min_size=1,
    max_size=8,
)


def check_answers(vlm, requests, max_rows: int) -> None:
    """Together as alone; whole rounds by hand, so that each example is the same each time."""
    batcher = Batcher(vlm, max_rows)
    batcher.close()
    expected, answers = [], []
    for index, (n_tokens, n_images, longest, temperature, _) in enumerate(requests):
        input_ids, pictures = make_prompt(vlm, index, n_tokens, n_images)
        sampling = dict(max_new_tokens=longest, temperature=temperature, top_p=0.9, seed=index)
        expected.append(answer_alone(vlm, input_ids, pictures, **sampling))
        sampling["max_new_tokens"] = min(longest, MAX_SEQ_LEN - input_ids.shape[1])
        answers.append(Recorded(input_ids, pictures, **sampling))

    # until all have arrived, and ended
    most_running = 0
    for number in range(1000):
        arrived = [a for a, request in zip(answers, requests) if request[-1] == number]
        batcher._waiting.extend(arrived)
        batcher.do_round()
        most_running = max(most_running, batcher.n_running)
        if number > 20 and all(answer.end for answer in answers):
            break

    assert [answer.error for answer in answers] == [None] * len(answers)
    assert [answer.tokens for answer in answers] == expected
    assert most_running <= max_rows and batcher.n_open == 0
    assert not batcher.rows.starts
    for answer in answers:
        assert answer.end == ("stop" if answer.tokens[-1] == 2 else "length")


@settings(max_examples=15, deadline=None, derandomize=True)
@given(requests=REQUESTS, max_rows=st.integers(1, 4))
def test_rows_that_come_and_go_answer_as_alone(vlm, requests, max_rows):
    check_answers(vlm, requests, max_rows)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(requests=REQUESTS, max_rows=st.integers(2, 4))
def test_so_they_do_on_onnx_graphs(onnx, requests, max_rows):
    check_answers(onnx, requests, max_rows)


def test_rows_run_together_and_one_picture_is_seen_once(vlm, monkeypatch):
    seen, most = [], 0
    batcher = Batcher(vlm, 4)
    batcher.close()
    encode, decode = batcher.rows.encode_images, batcher.rows.decode
    monkeypatch.setattr(
        batcher.rows, "encode_images", lambda pixels: seen.append(len(pixels)) or encode(pixels)
    )
    sizes = []
    monkeypatch.setattr(
        batcher.rows, "decode", lambda tokens: sizes.append(len(tokens)) or decode(tokens)
    )
    answers = []
    for index in range(4):
        # all about the same picture
        input_ids, _ = make_prompt(vlm, index, 10, 1)
        _, pictures = make_prompt(vlm, 9, 10, 1)
        answers.append(Recorded(input_ids, pictures, max_new_tokens=20))
    batcher._waiting.extend(answers)
    while batcher.n_open:
        batcher.do_round()
        most = max(most, batcher.n_running)
    assert seen == [1]
    assert max(sizes) == 4 == most
    # the four share their steps
    assert len(sizes) < 2 * 20


def test_an_answer_that_nobody_wants_frees_its_row_and_leaves_the_others_alone(batcher, vlm):
    prompts = [make_prompt(vlm, index, 20) for index in range(4)]
    expected = answer_alone(vlm, *prompts[3], max_new_tokens=30, temperature=0)
    unwanted = [Recorded(*prompt, max_new_tokens=60) for prompt in prompts[:3]]
    for answer in unwanted:
        # in the middle of it
        answer.after_token = lambda answer=answer: len(answer.tokens) == 5 and answer.cancel()
        batcher.submit(answer)
    wanted = batcher.submit(Recorded(*prompts[3], max_new_tokens=30)).wait()
    assert wanted.tokens == expected
    for answer in unwanted:
        answer.wait()
        assert answer.end == "cancelled" or len(answer.tokens) < 5
        assert len(answer.tokens) <= 5


def test_what_fails_ends_alone(batcher, vlm):
    input_ids, pictures = make_prompt(vlm, 0, 20, 1)
    wrong = batcher.submit(Recorded(input_ids, []))  # the picture is missing
    right = batcher.submit(Recorded(input_ids, pictures, max_new_tokens=10)).wait()
    assert wrong.is_over.wait(60)
    assert wrong.end == "failed" and "1 images" in str(wrong.error)
    expected = answer_alone(vlm, input_ids, pictures, max_new_tokens=10, temperature=0)
    assert right.tokens == expected


def test_a_failure_while_decoding_ends_the_rows_and_the_next_request_is_answered(batcher, vlm):
    def fail(tokens):
        monkeypatch.undo()
        raise MemoryError

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(batcher.rows, "decode", fail)
        failed = batcher.submit(Recorded(*make_prompt(vlm, 0, 20), max_new_tokens=10))
        assert failed.is_over.wait(60)
    assert failed.end == "failed" and isinstance(failed.error, MemoryError)
    prompt = make_prompt(vlm, 1, 20)
    answer = batcher.submit(Recorded(*prompt, max_new_tokens=10)).wait()
    assert answer.tokens == answer_alone(vlm, *prompt, max_new_tokens=10, temperature=0)


def test_so_it_does_where_rows_cannot_be_moved(batcher, vlm):
    def fail(row):
        monkeypatch.undo()
        raise MemoryError

    # one leaves while the other is at work
    failed, left = (Recorded(*make_prompt(vlm, n, 20), max_new_tokens=60) for n in (0, 1))
    both_are_there = threading.Event()
    failed.after_token, left.after_token = both_are_there.wait, left.cancel
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(batcher.rows, "leave", fail)
        batcher.submit(failed)
        batcher.submit(left)
        both_are_there.set()
        assert failed.is_over.wait(60) and left.is_over.wait(60)
    assert failed.end == "failed" and isinstance(failed.error, MemoryError)
    prompt = make_prompt(vlm, 1, 20)
    answer = batcher.submit(Recorded(*prompt, max_new_tokens=10)).wait()
    assert answer.tokens == answer_alone(vlm, *prompt, max_new_tokens=10, temperature=0)


def test_a_long_prompt_lets_a_short_one_go_first(vlm):
    """Chunks of both in turn: the short one has its first token long before."""
    batcher = Batcher(vlm, 2)
    batcher.close()
    long, short = (
        Recorded(*make_prompt(vlm, 0, n_tokens), max_new_tokens=1) for n_tokens in (90, 5)
    )
    batcher._waiting.extend([long, short])
    for _ in range(2):
        batcher.do_round()
    assert short.end == "length" and long.end is None


def test_a_prompt_that_fills_the_model_is_refused(batcher, vlm):
    input_ids, _ = make_prompt(vlm, 0, MAX_SEQ_LEN)
    with pytest.raises(ValueError, match=f"{MAX_SEQ_LEN} tokens"):
        batcher.submit(Answer(input_ids))


def test_closing_ends_all_that_is_open(vlm):
    batcher = Batcher(vlm, 1)
    answers = [
        batcher.submit(Recorded(*make_prompt(vlm, index, 30), max_new_tokens=60))
        for index in range(3)
    ]
    batcher.close()
    assert all(answer.is_over.is_set() for answer in answers)
    with pytest.raises(ValueError, match="closed"):
        batcher.submit(Answer(make_prompt(vlm, 0, 5)[0]))


def test_columns_move_to_the_left_when_rows_leave(vlm):
    """A row that stays alone has no padding, which is the fast way; a cache that grew shrinks."""
    rows = Rows(vlm.model, 3)
    for seed, n_tokens in ((0, 20), (1, 50), (2, 8)):
        prompt = rows.open_prompt(make_prompt(vlm, seed, n_tokens)[0], None)
        while rows.prefill(prompt) is None:
            pass
        rows.join(prompt)
    assert rows.starts == [30, 0, 42] and rows.cache.max_length == 64
    # 30 of 50 columns would be padding of both
    rows.leave(1)
    assert rows.starts == [0, 12] and rows.cache.length == 20
    rows.leave(0)
    assert rows.starts == [0] and rows.cache.length == 8
    rows.clear()
    assert rows.cache.max_length == 32


# The text of an answer.


@given(
    text=st.text(st.sampled_from("ab红🙂 \n"), max_size=20),
    stops=st.lists(st.text("ab红", min_size=1, max_size=3), max_size=3),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_pieces_end_before_the_first_stop_string(vlm, text, stops):
    tokenizer = vlm.processor.tokenizer
    answer, pieces = AnswerText(tokenizer, tuple(stops)), []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.append(answer.add(token))
        # what is given out is never taken back
        assert not any(stop in "".join(pieces) for stop in stops)
        if answer.is_stopped:
            break
    pieces.append(answer.finish())
    ends = [index for stop in stops if (index := text.find(stop)) >= 0]
    whole = "".join(pieces)
    assert answer.is_stopped == bool(ends)
    if not ends:
        assert whole == text
    # several may end with the same token: then it is the one that begins first
    else:
        assert text.startswith(whole) and any(text[len(whole) :].startswith(s) for s in stops)


@given(st.lists(st.integers(0, 671), max_size=30))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_pieces_are_the_text_of_all_tokens_together(vlm, tokens):
    """Any tokens: half characters, special ones."""
    tokenizer = vlm.processor.tokenizer
    text = "".join(map(AnswerText(tokenizer).add, tokens))
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert whole.startswith(text) and (whole == text or whole.endswith("\ufffd"))


def test_features_that_were_used_least_recently_go():
    cache, one = FeatureCache(2), torch.zeros(1)
    for key in (b"a", b"b"):
        cache.put(key, one)
    assert cache.get(b"a") is one
    cache.put(b"c", one)
    assert cache.get(b"b") is None and cache.get(b"a") is one and cache.get(b"c") is one
