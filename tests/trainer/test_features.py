"""The feature cache: what comes out is what the encoder said of this very picture, or nothing."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.vision import normalize_pixels, patch_features
from model.weights import read_weights
from scripts.processes import as_flags
from tests.helpers import picture, read_log, run_script, small_image_processor, small_vision_encoder
from trainer.collate import Batch
from trainer.feature_cache import FeatureCache, name_cache, needed_gb
from trainer.feature_format import GROUP, FeatureFormat
from trainer.image_encoder import ImageEncoder

SHAPE = (9, 32)
FORMAT = FeatureFormat(SHAPE, torch.float16)


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path, FORMAT, 1e6)


def features(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).half()


def slot(seed: int) -> torch.Tensor:
    return FORMAT.pack(features(seed)[None])[0]


def key(number: int) -> bytes:
    return number.to_bytes(8, "little") + (number * 7).to_bytes(8, "little")


def test_every_reader_gets_what_every_writer_wrote(cache, tmp_path):
    other = FeatureCache(tmp_path, FORMAT, 1e6)
    for number in range(10):
        (cache, other)[number % 2].add(key(number), slot(number))
    for reader in (cache, FeatureCache(tmp_path, FORMAT, 1e6)):
        reader._loaded_at -= 60  # as if it had last looked a minute ago
        assert all(torch.equal(reader.find(key(number)), features(number)) for number in range(10))
        assert reader.find(key(11)) is None


def test_torn_and_damaged_slots_are_never_used(cache, tmp_path):
    for number in range(3):
        cache.add(key(number), slot(number))
    (path,) = tmp_path.glob("*.features")
    stored = bytearray(path.read_bytes())
    stored[cache.slot_bytes + 5] ^= 1  # one bit of the second
    path.write_bytes(stored[:-1])  # and the end of the third
    reader = FeatureCache(tmp_path, FORMAT, 1e6)
    assert torch.equal(reader.find(key(0)), features(0))
    assert reader.find(key(1)) is None and reader.find(key(2)) is None
    index = path.with_suffix(".index")
    index.write_bytes(index.read_bytes()[:-30])  # a record and a half
    assert len(FeatureCache(tmp_path, FORMAT, 1e6)) == 1


def test_the_limit_holds(tmp_path):
    cache = FeatureCache(tmp_path, FORMAT, 5 * 2 * 9 * 32)
    for number in range(9):
        cache.add(key(number), slot(number))
    assert len(cache) == 5 and cache.closed_reason.startswith("its limit of 2.88e-06 GB is reached")
    assert cache.closed_reason.endswith(": --feature_cache_gb 0.1 would do")
    assert [needed_gb(size) for size in (1, 1e8, 1.2e9 + 1, 196e9)] == ["0.1", "0.1", "1.3", "196"]


# Loud channels as CLIP has them, patches of nothing, numbers that float16 hardly holds.
LOUDNESS = st.lists(st.sampled_from([0, 1e-7, 1e-3, 1, 50, 3e4]), min_size=1, max_size=6)


@given(LOUDNESS, st.sampled_from([32, 48, 96, 7]), st.sampled_from([torch.float16, torch.bfloat16]))
def test_bytes_are_near_and_stay_as_they_are(loudness, dim, dtype):
    """Of each group of channels the error is at most half a step of 127 to its largest number."""
    form = FeatureFormat((len(loudness), dim), dtype, is_int8=True)
    values = torch.randn(3, len(loudness), dim, generator=torch.Generator().manual_seed(dim))
    values = values.clamp(-2, 2) * torch.tensor(loudness)[:, None]
    slots = form.pack(values)
    assert slots.dtype == torch.uint8 and slots.shape == (3, form.slot_bytes)
    unpacked = form.unpack(slots)
    assert unpacked.dtype == dtype and unpacked.isfinite().all()
    groups, found = (x.float().view(3, -1, dim // form.n_groups) for x in (values, unpacked))
    largest = groups.abs().amax(2, keepdim=True)
    # Half a step, what float16 and `dtype` round, and what is below the smallest float16.
    assert ((found - groups).abs() <= largest * (0.5 / 127 + 2**-8) + 1e-5).all()
    assert torch.equal(form.unpack(slots[1:2])[0], unpacked[1]), "one by one as all together"


def test_bytes_take_half_the_room():
    whole = FeatureFormat((196, 768), torch.bfloat16)
    assert whole.slot_bytes == 301_056 and GROUP == 32
    assert replace(whole, is_int8=True).slot_bytes == 159_936
    exact = torch.randn(2, 196, 768).bfloat16()
    assert torch.equal(whole.unpack(whole.pack(exact)), exact)


def test_another_encoder_preprocessing_or_format_is_another_folder():
    processor, vision_encoder = small_image_processor(), small_vision_encoder()
    name = name_cache(vision_encoder, processor, FORMAT)
    changed = small_vision_encoder()
    with torch.no_grad():
        changed.get_parameter(next(iter(dict(changed.named_parameters())))).view(-1)[0] += 1e-3
    other_processor = small_image_processor()
    other_processor.image_mean = [0.5, 0.5, 0.5]
    names = [
        name_cache(changed, processor, FORMAT),
        name_cache(vision_encoder, other_processor, FORMAT),
        name_cache(vision_encoder, processor, replace(FORMAT, dtype=torch.bfloat16)),
        name_cache(vision_encoder, processor, replace(FORMAT, is_int8=True)),
    ]
    assert len({name, *names}) == 5
    assert name == name_cache(small_vision_encoder(), processor, FORMAT)


def test_bytes_normalised_on_the_device_are_what_clips_processor_makes(processor):
    picture_ = picture(3, (200, 150))
    expected = processor.preprocess([picture_])[0]
    mean, std = torch.tensor(
        [processor.image_processor.image_mean, processor.image_processor.image_std]
    ).view(2, 3, 1, 1)
    torch.testing.assert_close(
        normalize_pixels(processor.resize(picture_), mean, std), expected, atol=1e-6, rtol=1e-6
    )


def test_cached_and_fresh_images_keep_their_order(cache, processor):
    """A batch of five, of which two are cached; then all."""
    vision_encoder = small_vision_encoder()
    encoder = ImageEncoder(vision_encoder, processor.image_processor, torch.device("cpu"), cache)
    pixels = torch.stack([processor.resize(picture(seed)) for seed in range(5)])
    expected = patch_features(
        vision_encoder, normalize_pixels(pixels, encoder.mean, encoder.std)
    ).half()
    is_cached = torch.tensor([False, True, False, False, True])
    batch = Batch(
        input_ids=torch.zeros(1, 2),
        labels=torch.zeros(1, 2),
        indices=[0],
        keys=[key(number) for number in range(5)],
        is_cached=is_cached,
        pixels=pixels[~is_cached],
        cached_features=expected[is_cached],
    )
    torch.testing.assert_close(encoder.features(batch), expected, atol=2e-3, rtol=1e-3)
    encoder.close()
    found = [cache.find(key(number)) for number in range(5)]
    assert [one is not None for one in found] == (~is_cached).tolist()
    torch.testing.assert_close(
        torch.stack([found[0], found[2], found[3]]), expected[~is_cached], atol=2e-3, rtol=1e-3
    )


def test_with_and_without_the_cache_the_curve_is_the_same(options, tmp_path):
    """Also from workers, and in a second run that finds everything cached."""

    def run(folder, **changes) -> tuple[str, list[float], dict]:
        out_dir = tmp_path / folder
        flags = as_flags(**(options | {"epochs": 3, "out_dir": out_dir} | changes))
        finished = run_script("train_sft_vlm.py", *flags)
        assert finished.returncode == 0, finished.stdout
        losses = [line["loss"] for line in read_log(out_dir, "train")]
        return finished.stdout, losses, read_weights(out_dir / "sft_vlm_64.pth")

    _, expected, _ = run("without", feature_cache_gb=0)
    for workers in (0, 2):
        first, losses, weights = run(str(workers), num_workers=workers)
        again, _, same = run(str(workers), num_workers=workers)
        assert "24 pictures take up to 0 MB" in first and "(24 are there;" in again
        # Features are stored in 16 bits.
        assert losses == pytest.approx(expected, rel=1e-3)
        assert all(torch.equal(weight, same[name]) for name, weight in weights.items())
    assert not (tmp_path / "without/features").exists()


def test_bytes_give_nearly_the_same_curve(options, tmp_path):
    """The first epoch already learns from what later ones read."""

    def run(folder, **changes) -> tuple[str, list[float]]:
        out_dir = tmp_path / folder
        changes = {"feature_cache_dtype": "int8", "out_dir": out_dir} | changes
        flags = as_flags(**(options | changes))
        finished = run_script("train_sft_vlm.py", *flags)
        assert finished.returncode == 0, finished.stdout
        return finished.stdout, [line["loss"] for line in read_log(out_dir, "train")]

    _, first = run("bytes")
    printed, again = run("bytes")
    assert again == first and "(24 are there;" in printed
    _, whole = run("whole", feature_cache_dtype="auto")
    assert first == pytest.approx(whole, rel=1e-2) and first != whole


def test_a_cache_counts_pictures_and_says_which_limit_would_do(rows_dir, tmp_path, options):
    """Each row twice: as many pictures as before."""
    text = (rows_dir / "rows.jsonl").read_text(encoding="utf-8")
    data = tmp_path / "rows.jsonl"
    data.write_text(text * 2, encoding="utf-8")
    changes = dict(data_path=data, max_steps=1, out_dir=tmp_path)
    for limit, line in (
        (1, "feature cache: 24 pictures take up to 0 MB in"),
        (1e-6, "off, --feature_cache_gb is 1e-06; 0.1 would do\n"),
        (0, "off, --feature_cache_gb is 0; 0.1 would do\n"),
    ):
        flags = as_flags(**(options | changes | {"feature_cache_gb": limit}))
        assert line in run_script("train_sft_vlm.py", *flags).stdout
