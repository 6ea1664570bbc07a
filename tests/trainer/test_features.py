"""The feature cache: what comes out is what the encoder said of this very picture, or nothing."""

import pytest
import torch

from model.vision import normalize_pixels, patch_features
from model.weights import read_weights
from scripts.processes import as_flags
from tests.helpers import picture, read_log, run_script, small_image_processor, small_vision_encoder
from trainer.collate import Batch
from trainer.feature_cache import FeatureCache, name_cache
from trainer.image_encoder import ImageEncoder

SHAPE = (9, 32)


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path, SHAPE, torch.float16, 1e6)


def features(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).half()


def key(number: int) -> bytes:
    return number.to_bytes(8, "little") + (number * 7).to_bytes(8, "little")


def test_every_reader_gets_what_every_writer_wrote(cache, tmp_path):
    other = FeatureCache(tmp_path, SHAPE, torch.float16, 1e6)
    for number in range(10):
        (cache, other)[number % 2].add(key(number), features(number))
    for reader in (cache, FeatureCache(tmp_path, SHAPE, torch.float16, 1e6)):
        reader._loaded_at -= 60  # as if it had last looked a minute ago
        assert all(torch.equal(reader.find(key(number)), features(number)) for number in range(10))
        assert reader.find(key(11)) is None


def test_torn_and_damaged_slots_are_never_used(cache, tmp_path):
    for number in range(3):
        cache.add(key(number), features(number))
    (path,) = tmp_path.glob("*.features")
    stored = bytearray(path.read_bytes())
    stored[cache.slot_bytes + 5] ^= 1  # one bit of the second
    path.write_bytes(stored[:-1])  # and the end of the third
    reader = FeatureCache(tmp_path, SHAPE, torch.float16, 1e6)
    assert torch.equal(reader.find(key(0)), features(0))
    assert reader.find(key(1)) is None and reader.find(key(2)) is None
    index = path.with_suffix(".index")
    index.write_bytes(index.read_bytes()[:-30])  # a record and a half
    assert len(FeatureCache(tmp_path, SHAPE, torch.float16, 1e6)) == 1


def test_the_limit_holds(tmp_path):
    cache = FeatureCache(tmp_path, SHAPE, torch.float16, 5 * 2 * 9 * 32)
    for number in range(9):
        cache.add(key(number), features(number))
    assert len(cache) == 5 and "limit" in cache.closed_reason


def test_another_encoder_preprocessing_or_dtype_is_another_folder():
    processor, vision_encoder = small_image_processor(), small_vision_encoder()
    name = name_cache(vision_encoder, processor, torch.float16)
    changed = small_vision_encoder()
    with torch.no_grad():
        changed.get_parameter(next(iter(dict(changed.named_parameters())))).view(-1)[0] += 1e-3
    other_processor = small_image_processor()
    other_processor.image_mean = [0.5, 0.5, 0.5]
    names = [
        name_cache(changed, processor, torch.float16),
        name_cache(vision_encoder, other_processor, torch.float16),
        name_cache(vision_encoder, processor, torch.bfloat16),
    ]
    assert len({name, *names}) == 4 and name == name_cache(
        small_vision_encoder(), processor, torch.float16
    )


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
        assert "24 images take up to 0 MB" in first and "(24 are there;" in again
        # Features are stored in 16 bits.
        assert losses == pytest.approx(expected, rel=1e-3)
        assert all(torch.equal(weight, same[name]) for name, weight in weights.items())
    assert not (tmp_path / "without/features").exists()
