"""Sizes, what is trainable, and the vision encoder."""

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from common.errors import MissingFileError, UserError
from model.LMConfig import LMConfig, VLMConfig
from model.model_lm import MiniMindLM
from model.model_vlm import MiniMindVLM, VisionProj
from model.processing import VLMProcessor
from model.vision import load_vision_encoder, patch_features
from tests.helpers import picture, small_image_processor, small_model, small_vision_encoder
from trainer.build import set_trainable


@pytest.mark.parametrize(
    ("dim", "n_layers", "hidden_dim", "n_parameters"),
    [(512, 8, 1408, 25_829_888), (768, 16, 2048, 104_030_976)],
)
def test_published_sizes(dim, n_layers, hidden_dim, n_parameters):
    config = LMConfig(dim=dim, n_layers=n_layers)
    with torch.device("meta"):
        assert sum(p.numel() for p in MiniMindLM(config).parameters()) == n_parameters
    assert config.hidden_dim == hidden_dim


def test_pretraining_trains_what_was_published():
    model = MiniMindVLM(VLMConfig())
    trainable = set_trainable(model, lambda name: name.startswith(("vision_proj.", "layers.7.")))
    assert sum(p.numel() for p in trainable) == 3_212_800
    assert sum(p.numel() for p in VisionProj(768, 512).parameters()) == 393_728


def test_sizes_that_cannot_work_are_refused_with_both_numbers():
    with pytest.raises(UserError, match="dim 130 .* 4 heads"):
        LMConfig(dim=130)
    with pytest.raises(UserError, match="n_heads 8 .* n_kv_heads 3"):
        LMConfig(n_kv_heads=3)
    with pytest.raises(UserError, match="196 tokens .* makes 9 patches"):
        MiniMindVLM(VLMConfig(), small_vision_encoder())
    with pytest.raises(UserError, match="100 characters but image_ids has 196"):
        VLMConfig(image_special_token="@" * 100, image_ids=[34] * 196)


def test_configs_survive_a_file(tmp_path):
    config = VLMConfig(dim=128, n_layers=3, max_seq_len=99)
    config.save_pretrained(tmp_path)
    assert VLMConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_larger_vision_encoder_works_by_configuration(tokenizer):
    """576 patches, as ViT-L/14-336 has."""
    config = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    from transformers import CLIPVisionModel

    vision_encoder = CLIPVisionModel(config)
    model = MiniMindVLM(
        VLMConfig.for_vision_encoder(
            vision_encoder.config, dim=64, n_layers=1, n_heads=4, vocab_size=672
        ),
        vision_encoder,
    )
    size = {"height": 336, "width": 336}
    processor = VLMProcessor(
        tokenizer, CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=size), model.config
    )
    sample = processor.encode(
        [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "red"}],
        [picture()],
        max_length=700,
    )
    assert int((sample["input_ids"] == 34).sum()) == 576
    assert model(sample["input_ids"][None], sample["pixel_values"], sample["labels"][None]).loss > 0


@pytest.fixture
def whole_clip(tmp_path):
    """A CLIP with both halves, as published, in the sub-folder people download it to."""
    vision = small_vision_encoder().config.to_dict()
    text = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=100,
    )
    clip = CLIPModel(
        CLIPConfig(
            vision_config=vision, text_config=CLIPTextConfig(**text).to_dict(), projection_dim=16
        )
    ).eval()
    folder = tmp_path / "clip-vit-base-patch16"
    clip.save_pretrained(folder)
    small_image_processor().save_pretrained(folder)
    return tmp_path, clip


def test_only_the_vision_half_of_clip_is_loaded_frozen(whole_clip, capfd):
    folder, clip = whole_clip
    vision_encoder, image_processor = load_vision_encoder(folder)
    assert {tuple(p.shape) for p in vision_encoder.parameters()} == {
        tuple(p.shape) for p in clip.vision_model.parameters()
    }
    assert sum(p.numel() for p in vision_encoder.parameters()) < sum(
        p.numel() for p in clip.parameters()
    )
    assert not vision_encoder.training and not any(
        p.requires_grad for p in vision_encoder.parameters()
    )
    pixel_values = image_processor(picture(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = clip.vision_model(pixel_values=pixel_values, output_hidden_states=True)
    torch.testing.assert_close(
        patch_features(vision_encoder, pixel_values), states.last_hidden_state[:, 1:]
    )
    out, err = capfd.readouterr()
    assert "text_model" not in out + err, (
        "transformers' report of left-out keys reached the terminal"
    )


def test_missing_or_broken_clip_says_what_to_do(tmp_path, whole_clip):
    with pytest.raises(MissingFileError, match=r"python -m scripts.download clip.*--vision_model"):
        load_vision_encoder(tmp_path / "nothing")
    folder, _ = whole_clip
    weights = folder / "clip-vit-base-patch16/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="fetch (it|or train it) again"):
        load_vision_encoder(folder)


def test_the_vision_encoder_stays_in_eval_mode():
    model = small_model().train()
    assert model.training and not model.vision_encoder.training


@pytest.mark.parametrize(
    "image",
    [
        picture(1, (640, 480)),
        picture(2, (120, 300)),
        picture(3, (224, 224)),
        picture(4, (64, 64)).convert("L"),
    ],
)
def test_preprocessing_is_clips(tokenizer, image):
    ours = VLMProcessor(tokenizer, CLIPImageProcessorPil(), VLMConfig()).preprocess([image])[0]
    scale = 224 / min(image.size)  # the definition, step by step
    size = [int(side * scale) if side != min(image.size) else 224 for side in image.size]
    resized = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
    pixels = torch.frombuffer(
        bytearray(resized.crop((left, top, left + 224, top + 224)).tobytes()), dtype=torch.uint8
    )
    pixels = pixels.view(224, 224, 3).permute(2, 0, 1) / 255
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    torch.testing.assert_close(
        ours, (pixels - mean[:, None, None]) / std[:, None, None], atol=1e-5, rtol=0
    )


def test_head_runs_only_where_labels_are(model):
    """The loss is the same without logits, and padding on the right changes nothing."""
    input_ids = torch.randint(40, 600, (2, 20))
    labels = torch.where(torch.rand(2, 20) < 0.3, input_ids, -100)
    loss = model(input_ids, labels=labels).loss
    assert torch.equal(model(input_ids, labels=labels, return_logits=False).loss, loss)
    padded = (
        torch.nn.functional.pad(input_ids, (0, 9)),
        torch.nn.functional.pad(labels, (0, 9), value=-100),
    )
    torch.testing.assert_close(model(padded[0], labels=padded[1]).loss, loss)
    assert model(input_ids, labels=torch.full_like(labels, -100)).loss == 0


def test_dropout_acts_in_training_only():
    model = small_model(dropout=0.3)
    input_ids = torch.randint(40, 600, (1, 20))
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)
