"""The ONNX graphs, run by onnxruntime as transformers.js runs them, and by the command line."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dataset.scenes.write import write_scene_set
from dataset.vlm_dataset import VLMDataset
from inference import load_vlm
from inference.evaluate import Evaluation
from model.image_processor import picture_side
from model.llava import to_llava_ids
from model.LMConfig import VLMConfig
from model.model_vlm import MiniMindVLM, find_image_tokens
from model.vision import VisionEncoder
from scripts.export.onnx_builder import BLOCK, GraphBuilder, quantize_int4, quantize_int8
from scripts.export.onnx_graphs import trace_vision_encoder
from tests.helpers import DEMO, ROOT, picture, run_script, user
from tests.small_encoders import make_network, make_processor

# The id of `<image>` in the exported tokenizer, behind all others.
IMAGE_ID = 672
GRAPHS = {
    *("vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"),
    *("decoder_model_merged_quantized.onnx", "decoder_model_merged_q4.onnx"),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The demo model, by the command."""
    folder = tmp_path_factory.mktemp("export") / "exported"
    finished = run_script("-m", "scripts.export", DEMO, "--to", "onnx", "--out", folder)
    assert finished.returncode == 0, finished.stdout
    # nothing but what is said, and the list of files
    said, *files = finished.stdout.splitlines()
    assert said == "tracing the vision encoder for ONNX ..."
    assert all(" MB  " in line for line in files), finished.stdout
    assert {path.name for path in (folder / "onnx").iterdir()} == GRAPHS
    assert (folder / "config.json").is_file() and not (folder / "model.safetensors").exists()
    return folder


def answer(folder, input_ids, pixel_values, n_new: int) -> list[int]:
    """Greedy tokens, by nothing but the graphs; the cache grows with each, as in transformers.js.

    `input_ids` int64[1, T] have the id of `<image>`.
    """
    see, embed, decode = (
        onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx")
        for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
    )
    # An empty cache: these are the only sizes that the graph leaves open.
    sizes = {"batch_size": 1, "past_sequence_length": 0}
    cache = {
        node.name: np.zeros([sizes.get(size, size) for size in node.shape], dtype=np.float32)
        for node in decode.get_inputs()
        if node.name.startswith("past_key_values.")
    }

    # the prompt
    (embeddings,) = embed.run(["inputs_embeds"], {"input_ids": input_ids.numpy()})
    if len(pixel_values):
        (features,) = see.run(["image_features"], {"pixel_values": pixel_values.numpy()})
        embeddings[input_ids.numpy() == IMAGE_ID] = features.reshape(-1, features.shape[-1])

    # token by token
    tokens, n_seen = [], 0
    for _ in range(n_new):
        positions = np.arange(n_seen, n_seen + embeddings.shape[1])[None]
        n_seen += embeddings.shape[1]
        mask = np.ones((1, n_seen), dtype=np.int64)
        inputs = {"inputs_embeds": embeddings, "attention_mask": mask, "position_ids": positions}
        logits, *present = decode.run(None, inputs | cache)
        cache = dict(zip(cache, present, strict=True))
        tokens.append(int(logits[0, -1].argmax()))
        (embeddings,) = embed.run(None, {"input_ids": np.array([tokens[-1:]])})
    return tokens


@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_onnxruntime_alone_gives_the_same_tokens(demo, exported, n_images):
    config = demo.model.config
    assert config.vocab_size == IMAGE_ID
    question = user("<image>\n" * n_images + "What color is the circle? a@b.c")
    input_ids = demo.processor.encode_prompt([question], n_images)
    pixel_values = demo.processor.preprocess([picture(n) for n in range(n_images)])
    options = {"temperature": 0, "max_new_tokens": 12, "eos_token_id": -1}
    expected = demo.model.generate(input_ids, pixel_values, **options)[0, input_ids.shape[1] :]

    indices = find_image_tokens(input_ids, config.image_token_id, config.n_image_tokens)
    their_ids = to_llava_ids(input_ids, indices, config)
    assert answer(exported, their_ids, pixel_values, 12) == expected.tolist()


def test_the_command_line_answers_the_same(exported, tmp_path):
    """Exported by one process, asked by another, as the model that was exported is by a third."""
    picture(3).save(tmp_path / "a.png")
    ask = ("eval_vlm.py", "--image", tmp_path / "a.png", "--prompt", "What is this?")
    ask += ("--temperature", "0", "--device", "cpu", "--max_new_tokens", "8")
    ours = run_script(*ask, "--weights", DEMO)
    theirs = run_script(*ask, "--weights", exported, "--backend", "onnx")
    assert theirs.returncode == 0, theirs.stdout
    # the size of the model, the picture, the answer; not how fast it was
    of_ours, of_theirs = (
        [line.partition(" M parameters")[0].split(", ")[-1] for line in printed.splitlines()[:-1]]
        for printed in (ours.stdout, theirs.stdout)
    )
    assert of_theirs == of_ours and len(of_ours) >= 3
    small = run_script(*ask, "--weights", exported, "--backend", "onnx", "--dtype", "int4")
    assert small.returncode == 0, small.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backend", "onnx"), "has no folder onnx/: make one with `python -m scripts.export"),
        (("--dtype", "int4"), "--dtype is int4: with --backend torch choose from float32"),
        (("--backend", "onnx", "--attention", "a.png"), "--attention looks into the network"),
    ],
)
def test_what_cannot_be_is_one_line(options, message):
    finished = run_script("eval_vlm.py", "--weights", DEMO, "--image", ROOT / "README.md", *options)
    assert finished.returncode == 2
    assert message in finished.stdout and finished.stdout.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_small_dtypes_cost_no_exact_answers(demo, exported, tmp_path, dtype):
    """Of 200 questions about new pictures at most one more is answered wrongly."""
    write_scene_set(tmp_path, {"eval": 200})
    rows, images = tmp_path / "eval_vlm_data.jsonl", tmp_path / "eval_images"
    exact = []
    for vlm in (demo, load_vlm(exported, backend="onnx", dtype=dtype)):
        evaluation = Evaluation(vlm, VLMDataset(rows, images, vlm.processor, 512), batch_size=20)
        answered = list(evaluation.answer(evaluation.collect(), "right"))
        exact.append(sum(it.given["right"] in it.right_answers for it in answered) / len(answered))
    assert exact[0] > 0.7 and exact[1] >= exact[0] - 0.005, exact


@pytest.mark.parametrize("name", ["siglip", "dinov2_with_registers"])
@torch.no_grad()
def test_other_vision_encoders_are_traced_too(name, tmp_path):
    side = picture_side(make_processor(name))
    vision_encoder = VisionEncoder(make_network(name), side)
    config = VLMConfig.for_vision_encoder(vision_encoder, dim=32, n_layers=1, n_heads=2)
    model = MiniMindVLM(config, vision_encoder).eval()
    trace_vision_encoder(model, side, tmp_path / "vision_encoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "vision_encoder.onnx")
    for n_images in (1, 3):
        pixel_values = torch.randn(n_images, 3, side, side)
        (given,) = session.run(["image_features"], {"pixel_values": pixel_values.numpy()})
        expected = model.vision_proj(model.encode_images(pixel_values))
        torch.testing.assert_close(torch.from_numpy(given), expected, rtol=0, atol=1e-4)


def dequantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what `quantize_int4` makes of float[out, in], the scale of each weight)."""
    packed, scale = quantize_int4(weight)
    numbers = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(2)  # (out, blocks, BLOCK)
    scale = scale[..., None].expand(numbers.shape)
    return ((numbers.float() - 8) * scale).flatten(1), scale.flatten(1)


def test_linear_layers_in_each_dtype():
    """A matrix product is that of the dequantized weights, whatever is in them."""
    torch.manual_seed(0)
    weight = torch.randn(24, 3 * BLOCK)
    weight[3], weight[5, :BLOCK], weight[7, 0] = 0, 0, 40
    x = torch.randn(5, weight.shape[1])
    quantized, scale = quantize_int8(weight)
    meant = {"float32": weight, "int8": quantized * scale[:, None]}
    meant["int4"] = dequantize_int4(weight)[0]
    for dtype, tolerance in (("float32", 1e-5), ("int8", 0.02), ("int4", 0.02)):
        graph = GraphBuilder(dtype)
        graph.add_input("x", onnx.TensorProto.FLOAT, ["rows", weight.shape[1]])
        graph.add_output("y", onnx.TensorProto.FLOAT, ["rows", len(weight)])
        graph.linear("x", "weight", weight, output="y")
        session = onnxruntime.InferenceSession(graph.build().SerializeToString())
        (given,) = session.run(None, {"x": x.numpy()})
        expected = x @ meant[dtype].T
        assert np.abs(given[:, 3]).max() < 1e-9, "weights of 0 give 0"
        assert (torch.from_numpy(given) - expected).norm() < tolerance * expected.norm(), dtype


def test_quantized_numbers_are_the_nearest():
    weight = torch.randn(8, 2 * BLOCK)
    quantized, scale = quantize_int8(weight)
    error = (quantized * scale[:, None] - weight).abs()
    assert (error <= 0.501 * scale[:, None]).all() and quantized.abs().amax() == 127

    meant, scale = dequantize_int4(weight)
    error, scale = (meant - weight).abs(), scale.abs()
    # 8 is missing: what is nearest to it becomes 7
    assert (error <= 1.001 * scale).all() and (error <= 0.501 * scale).float().mean() > 0.9
    largest = weight.abs().unflatten(1, (2, BLOCK)).argmax(dim=2, keepdim=True)
    assert error.unflatten(1, (2, BLOCK)).gather(2, largest).max() < 1e-6, "it is exact"
