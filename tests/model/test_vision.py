"""Each family of vision encoders against transformers itself, and from training to export."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from common.errors import UserError
from inference import load_vlm
from model.image_processor import PROCESSORS, load_image_processor, pixel_statistics
from model.llava import from_llava, to_llava, to_llava_ids
from model.LMConfig import VLMConfig
from model.model_vlm import MiniMindVLM, find_image_tokens
from model.processing import VLMProcessor
from model.vision import VisionEncoder, load_vision_encoder, normalize_pixels
from model.vision_families import FAMILIES, HALVES
from scripts.processes import as_flags
from tests.helpers import TOKENIZER, picture, run_script
from tests.small_encoders import ENCODERS, make_network, make_processor, save_encoder
from trainer.feature_cache import name_cache
from trainer.feature_format import FeatureFormat

VITS = ["clip", "siglip", "dinov2", "dinov2_with_registers", "dinov3_vit"]
EXPORTED = ["clip", "siglip", "dinov2"]
SIZES = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=512, vocab_size=672)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> its folder, made when it is asked for."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = save_encoder(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def photographs() -> list:
    return [picture(1, (83, 61)), picture(2, (40, 131)), picture(3, (301, 224))]


def own_pixels(name: str, images: list) -> torch.Tensor:
    """What the family's own image processor makes of pictures."""
    if ENCODERS[name][1][0] != "DINOv3ViT":
        return make_processor(name)(images, return_tensors="pt")["pixel_values"]
    # It needs torchvision, which resizes floats like this.
    side, each = ENCODERS[name][1][1]["size"]["height"], []
    for image in images:
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
        each.append(F.interpolate(pixels, (side, side), mode="bilinear", antialias=True))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return (torch.cat(each) - mean) / std


def own_features(folder, pixel_values: torch.Tensor) -> torch.Tensor:
    """Patch features worked out from what transformers' AutoModel returns."""
    network = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        output = network(pixel_values=pixel_values, output_hidden_states=True)
    model_type = network.config.model_type
    if model_type == "siglip_vision_model":
        return output.hidden_states[-1]
    if model_type in ("clip_vision_model", "dinov2"):
        return output.hidden_states[-1][:, 1:]
    if hasattr(network.config, "num_register_tokens"):
        return output.last_hidden_state[:, 1 + network.config.num_register_tokens :]

    if model_type == "dinov3_convnext":
        deepest = output.hidden_states[-1].permute(0, 2, 3, 1).flatten(1, 2)
        return network.layer_norm(deepest).detach()
    deepest = output.last_hidden_state
    mean, variance = deepest.mean(1, keepdim=True), deepest.var(1, correction=0, keepdim=True)
    return ((deepest - mean) / (variance + 1e-5).sqrt()).permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize("name", ENCODERS)
def test_features_and_pixels_are_those_of_transformers(folders, tokenizer, name):
    encoder, image_processor = load_vision_encoder(folders(name))
    _, (kind, _), (side, width) = ENCODERS[name]
    assert (encoder.grid, encoder.n_patches, encoder.width) == ((side, side), side * side, width)
    assert not encoder.training and encoder.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in encoder.parameters())

    # pixels, in one step and in two
    config = VLMConfig.for_vision_encoder(encoder, **SIZES)
    processor = VLMProcessor(tokenizer, image_processor, config)
    images = photographs()
    pixel_values, expected = processor.preprocess(images), own_pixels(name, images)
    # DINOv3's own has no bytes in between: off by one of them, divided by the deviation
    atol = 1.01 / 255 / 0.224 if kind == "DINOv3ViT" else 1e-5
    torch.testing.assert_close(pixel_values, expected, atol=atol, rtol=0)
    as_bytes = torch.stack([processor.resize(image) for image in images])
    assert as_bytes.dtype == torch.uint8
    in_two_steps = normalize_pixels(as_bytes, *pixel_statistics(image_processor))
    torch.testing.assert_close(in_two_steps, pixel_values, atol=1e-5, rtol=0)
    assert torch.equal(processor.denormalize(pixel_values), as_bytes), "and back"
    assert processor.preprocess([]).shape == (0, *pixel_values.shape[1:])

    # features, from them
    features = MiniMindVLM(config, encoder).encode_images(pixel_values)
    assert features.shape == (3, side * side, width)
    expected = own_features(folders(name), pixel_values)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert (features[0] - features[1]).abs().max() > 0.1, "pictures make no difference"
    assert encoder.bfloat16()(pixel_values).dtype == torch.bfloat16


def test_clips_features_are_to_the_bit_what_they_were(folders):
    encoder, image_processor = load_vision_encoder(folders("clip"))
    pixel_values = image_processor(photographs(), return_tensors="pt")["pixel_values"]
    network = make_network("clip")
    with torch.no_grad():
        expected = network(pixel_values=pixel_values).last_hidden_state[:, 1:]
    assert torch.equal(encoder(pixel_values), expected)
    mean, std = pixel_statistics(image_processor)
    assert torch.equal(mean.flatten(), torch.tensor(image_processor.image_mean))
    assert torch.equal(std.flatten(), torch.tensor(image_processor.image_std))


def test_the_sizes_of_published_encoders():
    """Without numbers, and with two of their layers: only shapes are computed."""
    two = dict(num_hidden_layers=2)
    vit_l = two | dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    published = [
        ("CLIPVision", vit_l | dict(image_size=336, patch_size=14), 336),
        ("SiglipVision", two | dict(image_size=512, patch_size=16), 512),
        ("Dinov2", two | dict(image_size=518, patch_size=14), 224),
        ("ResNet", dict(depths=[1, 1, 1, 1]), 224),
    ]
    shapes = []
    for classes, sizes, image_size in published:
        config = getattr(transformers, f"{classes}Config")(**sizes)
        with torch.device("meta"):
            network = getattr(transformers, f"{classes}Model")(config)
            encoder = VisionEncoder(network, image_size)
        shapes.append((encoder.n_patches, encoder.width))
    assert shapes == [(576, 1024), (1024, 768), (256, 768), (49, 2048)]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_of_a_model_with_two_halves_the_one_that_sees_is_read(folders, tmp_path, name):
    """SigLIP 2 of one size is such a folder: its model_type is "siglip"."""
    folder = shutil.copytree(folders(name), tmp_path / "whole")
    vision = json.loads((folder / "config.json").read_text())
    whole = {"model_type": name, "vision_config": vision, "text_config": {"vocab_size": 256_000}}
    (folder / "config.json").write_text(json.dumps(whole))
    weights = load_file(folder / "model.safetensors")
    weights = {f"vision_model.{key}": weight for key, weight in weights.items()}
    weights["text_model.embeddings.token_embedding.weight"] = torch.ones(3, 3)
    save_file(weights, folder / "model.safetensors")
    pixel_values = torch.randn(2, 3, *[vision["image_size"]] * 2)
    expected = load_vision_encoder(folders(name))[0](pixel_values)
    assert torch.equal(load_vision_encoder(folder)[0](pixel_values), expected)
    assert set(HALVES) == {"clip", "siglip"}


@pytest.mark.parametrize("name", ["dinov2", "resnet", "efficientnet", "mobilenet_v2"])
def test_a_classifier_is_read_without_its_head(folders, tmp_path, name):
    """As CNNs are published: under a name of their own, beside what names 1,000 things."""
    folder = shutil.copytree(folders(name), tmp_path / "classifier")
    weights = load_file(folder / "model.safetensors")
    weights = {f"{name}.{key}": weight for key, weight in weights.items()}
    weights["classifier.weight"] = torch.ones(10, 3)
    # older versions wrote no counts for training
    weights = {key: one for key, one in weights.items() if "num_batches_tracked" not in key}
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    pixel_values = own_pixels(name, photographs())
    expected = load_vision_encoder(folders(name))[0](pixel_values)
    found = load_vision_encoder(folder)[0](pixel_values)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_no_family_is_untested():
    assert {HALVES.get(name, name) for name in ENCODERS} == set(FAMILIES)
    assert {kind for _, (kind, _), _ in ENCODERS.values()} | {"ViT", "DeiT"} == set(PROCESSORS)


def test_a_feature_cache_is_of_one_encoder_and_one_way_of_making_features(folders):
    form = FeatureFormat((16, 64), torch.float16)
    encoder, image_processor = load_vision_encoder(folders("convnext"))
    name = name_cache(encoder, image_processor, form)
    assert name == name_cache(*load_vision_encoder(folders("convnext")), form)

    # weights, sizes that no weight depends on, preprocessing
    other = VisionEncoder(make_network("convnext", seed=1), 64)
    assert name_cache(other, image_processor, form) != name
    encoder.network.config.hidden_act = "relu"
    assert name_cache(encoder, image_processor, form) != name
    encoder.network.config.hidden_act = "gelu"
    assert name_cache(encoder, image_processor, form) == name
    image_processor.crop_pct = 0.9
    assert name_cache(encoder, image_processor, form) != name


def make_model(folder) -> MiniMindVLM:
    torch.manual_seed(3)
    encoder, _ = load_vision_encoder(folder)
    return MiniMindVLM(VLMConfig.for_vision_encoder(encoder, **SIZES), encoder).eval()


@pytest.mark.parametrize("name", EXPORTED)
@torch.no_grad()
def test_logits_equal_those_of_llava(folders, name):
    """The independent oracle, for two images and none."""
    model = make_model(folders(name))
    llava = to_llava(model)
    image = [34] * model.config.n_image_tokens
    input_ids = torch.tensor([[50, 51, *image, 52, *image, 53, 54]])
    side = make_processor(name)(photographs()[:2], return_tensors="pt")["pixel_values"]
    indices = find_image_tokens(input_ids, 34, len(image))
    llava_ids = to_llava_ids(input_ids, indices, model.config)
    expected = llava(input_ids=llava_ids, pixel_values=side).logits[..., :-1]
    torch.testing.assert_close(model(input_ids, side).logits, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.3 and llava.config.image_seq_length == len(image)
    # the other way round
    again = from_llava(llava)
    torch.testing.assert_close(again(input_ids, side).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in EXPORTED])
def test_what_no_llava_can_say_is_refused(folders, name):
    with pytest.raises(UserError, match="cannot become a LLaVA.* one of CLIP, SigLIP, DINOv2$"):
        to_llava(make_model(folders(name)))


@pytest.mark.parametrize("name", ["siglip", "dinov2", "dinov3_vit", "efficientnet"])
def test_training_evaluation_and_export(folders, rows_dir, tmp_path, name):
    """With the feature cache on; the weights know their encoder."""
    model = dict(dim=64, n_layers=2, tokenizer=TOKENIZER, vision_model=folders(name))
    data = dict(data_path=rows_dir / "rows.jsonl", images_path=rows_dir / "images")
    run = dict(epochs=1, batch_size=12, num_workers=0, init_weights="none", out_dir=tmp_path)
    finished = run_script("train_sft_vlm.py", *as_flags(**model, **data, **run, device="cpu"))
    assert finished.returncode == 0 and "Traceback" not in finished.stdout, finished.stdout
    info = json.loads((tmp_path / "sft_vlm_64.json").read_text())
    side, width = ENCODERS[name][2]
    assert info["config"]["n_image_tokens"] == side * side
    assert info["config"]["vision_dim"] == width
    (slots,) = (tmp_path / "features").glob("*/*.features")
    n_pictures = len(list((rows_dir / "images").iterdir()))
    assert slots.stat().st_size == n_pictures * side * side * width * 2

    # the scores, by the weights alone
    weights = ["--weights", tmp_path / "sft_vlm_64.pth", "--device", "cpu"]
    data = ["--data", rows_dir / "rows.jsonl", "--images", rows_dir / "images"]
    finished = run_script("eval_vlm.py", *weights, *data, "--max_new_tokens", "4")
    assert finished.returncode == 0 and "loss" in finished.stdout, finished.stdout

    # and as a transformers directory
    vlm = load_vlm(tmp_path / "sft_vlm_64.pth", device="cpu")
    if name not in EXPORTED:
        return
    to_llava(vlm.model).save_pretrained(tmp_path / "llava")
    vlm.processor.image_processor.save_pretrained(tmp_path / "llava")
    again = load_vlm(tmp_path / "llava", tokenizer=TOKENIZER, device="cpu")
    input_ids = torch.tensor([[50, *[34] * side * side, 51]])
    pixel_values = again.processor.preprocess([picture(4)])
    assert torch.equal(pixel_values, vlm.processor.preprocess([picture(4)]))
    with torch.no_grad():
        logits = [each.model(input_ids, pixel_values).logits for each in (vlm, again)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
BROKEN = [
    ("siglip", CONFIG, dict(model_type="vit_mae"), "here is one of clip, siglip, dinov2"),
    ("siglip", CONFIG, dict(model_type=["siglip"]), "here is one of clip, siglip, dinov2"),
    ("siglip", CONFIG, dict(model_type="siglip2_vision_model"), "google/siglip2-base-patch16-224"),
    ("siglip", CONFIG, dict(image_size=56), r"\b60 pixels, .* takes 56"),
    ("siglip", CONFIG, dict(image_size=[60, 60]), "image_size"),
    ("siglip", CONFIG, dict(patch_size=61), "smaller than its patch_size 61"),
    ("siglip", PREPROCESSOR, dict(size={"height": 60, "width": 62}), "have to be squares"),
    ("siglip", PREPROCESSOR, dict(size={"shortest_edge": 60}), "have to be squares"),
    ("siglip", PREPROCESSOR, dict(do_pad=True), "do_pad .* has to be False"),
    ("siglip", PREPROCESSOR, dict(image_processor_type="Mine"), "is one of CLIP, Siglip,"),
    ("siglip", PREPROCESSOR, dict(image_processor_type=3), "is one of CLIP, Siglip,"),
    ("dinov2", CONFIG, dict(qkv_bias="yes"), "has to be true or false"),
    ("dinov2", CONFIG, dict(mlp_ratio=10**9), "mlp_ratio .* from 1 to 64"),
    ("dinov2", PREPROCESSOR, dict(size=8, crop_size=8), "no picture of 8 x 8 pixels goes through"),
    ("dinov3_vit", CONFIG, dict(num_register_tokens=-1), "num_register_tokens .* from 0"),
    ("dinov3_vit", CONFIG, dict(num_attention_heads=16), "cannot load"),
    ("resnet", CONFIG, dict(depths=[1, 1, 10**6, 1]), "depths .* from 1 to 64"),
    ("resnet", CONFIG, dict(depths=3), "it has to be a list"),
    ("resnet", CONFIG, dict(depths=[1, 1, 1]), "different lengths: hidden_sizes 4, depths 3"),
    ("resnet", CONFIG, dict(hidden_sizes=[8, 16, 24, 48]), "cannot load"),
    ("resnet", CONFIG, dict(layer_type="no such"), "none is so called"),
    ("resnet", CONFIG, dict(num_channels=1), "colors are 3"),
    ("resnet", PREPROCESSOR, dict(crop_pct=0), "crop_pct"),
    ("efficientnet", CONFIG, dict(num_block_repeats=[1] * 9), "a list of at most 8"),
    ("efficientnet", PREPROCESSOR, dict(rescale_offset=1), "has to be true or false"),
    ("efficientnet", PREPROCESSOR, dict(size=10**6), "size .* from 1 to 4,096"),
]


@pytest.mark.parametrize(("name", "file", "change", "reason"), BROKEN)
def test_what_is_broken_is_one_line(folders, tmp_path, name, file, change, reason):
    folder = shutil.copytree(folders(name), tmp_path / "broken")
    facts = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps(facts))
    with pytest.raises(UserError, match=reason) as raised:
        load_vision_encoder(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def test_an_image_processor_may_leave_steps_out(tmp_path):
    """Bytes as they are, floats of 0 to 1: the statistics follow."""
    for change, mean, std in (
        (dict(do_normalize=False), 0, 1),
        (dict(do_normalize=False, do_rescale=False), 0, 1 / 255),
        (dict(image_mean=[0.5] * 3, image_std=[0.25] * 3, include_top=True), 0.5, 0.25),
    ):
        facts = dict(image_processor_type="ViTFeatureExtractor", size=32) | change
        (tmp_path / PREPROCESSOR).write_text(json.dumps(facts))
        image_processor = load_image_processor(tmp_path, "CLIP")
        found = pixel_statistics(image_processor)
        assert [
            math.isclose(each[0], value, rel_tol=1e-6) for each, value in zip(found, (mean, std))
        ]
        own = image_processor(picture(), return_tensors="pt")["pixel_values"][0]
        as_bytes = torch.from_numpy(
            np.asarray(picture().resize((32, 32), image_processor.resample)).copy()
        ).permute(2, 0, 1)
        torch.testing.assert_close(
            normalize_pixels(as_bytes, *found), own.float(), atol=1e-4, rtol=0
        )
