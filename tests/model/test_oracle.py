"""The network against an independent one: transformers' stock LlavaForConditionalGeneration."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from inference.cuda_graph import GraphDecoder
from inference.evaluate import pad_left
from inference.generate import cut_after_end, decode_one_token, prefill
from model.llava import (
    from_llava,
    load_transformers_directory,
    to_half_split,
    to_interleaved,
    to_llava,
    to_llava_ids,
)
from model.model_lm import KVCache
from model.model_vlm import find_image_tokens
from tests.helpers import N_PATCHES, small_image_processor, small_model

AT = 34


@pytest.fixture(scope="module")
def llava(model):
    return to_llava(model)


def tokens(seed: int, length: int = 12) -> list[int]:
    return torch.randint(40, 600, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 48, 48, generator=torch.Generator().manual_seed(n))


IMAGE = [AT] * N_PATCHES
ROWS = {
    "text": [tokens(1, 40)],
    "one image": [tokens(2) + IMAGE + tokens(3)],
    "two images apart": [tokens(4) + IMAGE + tokens(5) + IMAGE + tokens(6)],
    "two images side by side": [tokens(4) + 2 * IMAGE + tokens(5)],
    "an e-mail address is text": [
        tokens(7) + [AT] + tokens(8) + IMAGE + tokens(9) + 3 * [AT] + tokens(1)
    ],
    "batch of 0, 1 and 2 images": [
        tokens(1, 45),
        tokens(2) + IMAGE + tokens(3, 24),
        tokens(4) + IMAGE + tokens(5) + IMAGE + tokens(6, 3),
    ],
    "image at the start and at the end": [IMAGE + tokens(1), tokens(2) + IMAGE],
}


def oracle_inputs(model, rows):
    input_ids = torch.tensor(rows)
    indices = find_image_tokens(input_ids, AT, N_PATCHES)
    n_images = len(indices) // N_PATCHES
    return (
        input_ids,
        to_llava_ids(input_ids, indices, model.config),
        images(n_images) if n_images else None,
    )


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_logits_and_loss_equal_llava(model, llava, name):
    input_ids, llava_ids, pixel_values = oracle_inputs(model, ROWS[name])
    labels = torch.where(torch.arange(input_ids.shape[1]) % 3 == 0, input_ids, -100)
    ours = model(input_ids, pixel_values, labels)
    theirs = llava(
        input_ids=llava_ids, pixel_values=pixel_values, attention_mask=torch.ones_like(llava_ids)
    )
    expected = theirs.logits[..., :-1]  # without the row of <image>
    torch.testing.assert_close(ours.logits, expected, atol=1e-5, rtol=0)
    shifted = torch.nn.functional.cross_entropy(
        expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(ours.loss, shifted, atol=1e-5, rtol=0)
    assert ours.logits.std() > 0.3, "logits too flat to compare anything"


@torch.no_grad()
def test_every_image_goes_to_its_own_row(model):
    """Swapping the images of two rows must swap what the rows say.

    The published loop mixed batch and image dimensions.
    """
    input_ids, _, pixel_values = oracle_inputs(
        model, [tokens(2) + IMAGE + tokens(3), tokens(2) + IMAGE + tokens(3)]
    )
    straight, swapped = (
        model(input_ids, pixel_values).logits,
        model(input_ids, pixel_values.flip(0)).logits,
    )
    torch.testing.assert_close(straight, swapped.flip(0), atol=1e-5, rtol=0)
    assert (straight[0, -1] - straight[1, -1]).abs().max() > 0.01, "the image makes no difference"


@pytest.mark.parametrize("name", ["text", "one image", "two images apart"])
def test_greedy_decoding_equals_llava(model, llava, name):
    input_ids, llava_ids, pixel_values = oracle_inputs(model, ROWS[name])
    ours = model.generate(input_ids, pixel_values, max_new_tokens=20, temperature=0)
    shown = {} if pixel_values is None else {"pixel_values": pixel_values}
    theirs = llava.generate(
        input_ids=llava_ids,
        attention_mask=torch.ones_like(llava_ids),
        max_new_tokens=20,
        do_sample=False,
        suppress_tokens=[model.config.vocab_size],
        **shown,
    )
    assert ours[0, input_ids.shape[1] :].tolist() == theirs[0, input_ids.shape[1] :].tolist()


@torch.no_grad()
def test_cached_decoding_equals_uncached(model):
    input_ids, _, pixel_values = oracle_inputs(model, ROWS["two images apart"])
    full = model(input_ids, pixel_values).logits
    cache = KVCache(model.config, 1, input_ids.shape[1], input_ids.device, torch.float32)
    # all up to the images, then 3 tokens at once, then one by one
    start = input_ids.shape[1] - 8
    pieces = [model(input_ids[:, :start], pixel_values, cache=cache).logits]
    pieces.append(model(input_ids[:, start : start + 3], cache=cache).logits)
    pieces += [
        model(input_ids[:, i : i + 1], cache=cache).logits
        for i in range(start + 3, input_ids.shape[1])
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=1e-5, rtol=0)


def test_left_padded_batch_equals_one_by_one(model):
    rows = [
        tokens(1, 5),
        tokens(2) + IMAGE + tokens(3),
        tokens(4) + IMAGE + tokens(5) + IMAGE + tokens(6),
    ]
    pixel_values = images(3)
    input_ids, attention_mask = pad_left([torch.tensor(row) for row in rows])
    batch = model.generate(
        input_ids, pixel_values, attention_mask=attention_mask, max_new_tokens=12, temperature=0
    )
    per_row = (None, pixel_values[:1], pixel_values[1:])
    for row, shown, together in zip(rows, per_row, batch):
        alone = model.generate(torch.tensor([row]), shown, max_new_tokens=12, temperature=0)[
            0, len(row) :
        ]
        assert together[input_ids.shape[1] :][: len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("is_padded", [True, False])
def test_what_a_gpu_records_is_decode_one_token(model, is_padded, request):
    """A mask over the whole cache gives what its growing part gives, padded or not.

    Memory that nobody has written holds anything: here NaN, as it did once on a GPU.
    """
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True)
    rows = [tokens(2) + IMAGE + tokens(3), tokens(1, 5 if is_padded else 24 + N_PATCHES)]
    input_ids, attention_mask = pad_left([torch.tensor(row) for row in rows])
    whole_mask = torch.nn.functional.pad(attention_mask, (0, 6), value=1) if is_padded else None
    caches = [
        KVCache(model.config, 2, input_ids.shape[1] + 6, input_ids.device, torch.float32)
        for _ in range(2)
    ]
    with torch.inference_mode():
        for cache in caches:
            prefill(model, input_ids, images(1), None, attention_mask if is_padded else None, cache)
        decoders = [
            partial(decode_one_token, model, attention_mask=whole_mask, cache=cache)
            for cache in caches
        ]
        as_recorded = GraphDecoder(decoders[0], caches[0], batch_size=2)
        for step in range(6):
            token = torch.tensor(tokens(step, 2))
            torch.testing.assert_close(as_recorded(token), decoders[1](token), atol=1e-5, rtol=0)


def test_answers_are_cut_where_the_last_one_ends():
    new_tokens = torch.tensor([[5, 2, 0, 0, 0, 0], [5, 6, 7, 2, 0, 0]])
    assert cut_after_end(new_tokens, 2).tolist() == new_tokens[:, :4].tolist()
    assert cut_after_end(new_tokens, 9).tolist() == new_tokens.tolist()
    assert cut_after_end(new_tokens[:, :0], 2).shape == (2, 0)


def test_streaming_yields_the_same_tokens_and_stops_at_the_end_token(model):
    input_ids, _, pixel_values = oracle_inputs(model, ROWS["one image"])
    whole = model.generate(input_ids, pixel_values, max_new_tokens=15, temperature=0)[
        0, input_ids.shape[1] :
    ]
    streamed = list(
        model.generate(input_ids, pixel_values, max_new_tokens=15, temperature=0, stream=True)
    )
    assert [len(piece[0]) for piece in streamed] == list(range(1, 16))
    assert streamed[-1][0].tolist() == whole.tolist()
    stopped = model.generate(
        input_ids, pixel_values, max_new_tokens=15, temperature=0, eos_token_id=whole[4].item()
    )
    assert stopped.shape[1] - input_ids.shape[1] == whole.tolist().index(whole[4]) + 1


def test_max_new_tokens_counts_new_tokens_and_sampling_follows_the_seed(model):
    prompt = torch.tensor([tokens(1, 30)])
    torch.manual_seed(1)
    first = model.generate(prompt, max_new_tokens=7, temperature=1.5, top_p=0.9, eos_token_id=-1)
    torch.manual_seed(1)
    second = model.generate(prompt, max_new_tokens=7, temperature=1.5, top_p=0.9, eos_token_id=-1)
    assert first.shape == (1, 37) and torch.equal(first, second)
    greedy = model.generate(prompt, max_new_tokens=7, temperature=0, eos_token_id=-1)
    assert torch.equal(
        model.generate(prompt, max_new_tokens=7, temperature=1.0, top_p=1e-6, eos_token_id=-1),
        greedy,
    )
    with pytest.raises(ValueError, match=r"600 tokens .* 512"):
        model.generate(torch.tensor([tokens(1, 600)]))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=6), min_size=1, max_size=4
    )
)
def test_find_image_tokens_agrees_with_reading_run_by_run(rows):
    """Alternating stretches of '@' and of other tokens, in rows of one length."""
    rows = [[AT if is_at else 50 for is_at, length in row for _ in range(length)] for row in rows]
    length = max(1, *map(len, rows))
    rows = [row + [50] * (length - len(row)) for row in rows]
    expected = []
    for number, row in enumerate(rows):
        start = 0
        while start < length:
            end = start
            while end < length and row[end] == row[start]:
                end += 1
            if row[start] == AT and (end - start) % N_PATCHES == 0:
                expected += range(number * length + start, number * length + end)
            start = end
    assert find_image_tokens(torch.tensor(rows), AT, N_PATCHES).tolist() == expected


def test_image_token_and_image_counts_must_agree(model):
    row = torch.tensor([tokens(1) + IMAGE + tokens(2)])
    with pytest.raises(ValueError, match=r"tokens for 1 images .* 2 images"):
        model(row, images(2))
    with pytest.raises(ValueError, match=r"tokens for 1 images .* 0 images"):
        model(row)
    with pytest.raises(ValueError, match=r"tokens for 0 images .* 1 images"):
        model(torch.tensor([tokens(1)]), images(1))


def test_rope_row_orders_are_inverse():
    weight = torch.randn(32, 5)
    assert torch.equal(to_interleaved(to_half_split(weight, 8), 8), weight)
    assert to_half_split(torch.arange(8)[:, None], 8).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@torch.no_grad()
def test_transformers_directory_comes_back_equal(model, llava, tmp_path):
    llava.save_pretrained(tmp_path)
    small_image_processor().save_pretrained(tmp_path)
    again, _ = load_transformers_directory(tmp_path, None)
    input_ids, _, pixel_values = oracle_inputs(model, ROWS["one image"])
    torch.testing.assert_close(
        again(input_ids, pixel_values).logits,
        model(input_ids, pixel_values).logits,
        atol=1e-6,
        rtol=0,
    )


def test_another_llava_is_refused():
    llava = to_llava(small_model())
    llava.model.multi_modal_projector.linear_2.weight.data[0, 1] = 0.5
    with pytest.raises(UserError, match="not 1 times the identity"):
        from_llava(llava)
    llava.config.vision_feature_layer = -2
    with pytest.raises(UserError, match="vision_feature_layer -2"):
        from_llava(llava)
