"""The onnx backend answers as the model that was exported, and bad folders are one line."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from common.errors import MissingFileError, UserError
from dataset.vlm_dataset import VLMDataset
from inference import load_vlm
from inference.config import EvalConfig, WebConfig
from inference.evaluate import Evaluation, pad_left
from inference.generate import generate, prefill
from inference.load import VLM
from inference.onnx_files import DECODER_NAMES
from inference.paths import find_model
from inference.web.models import ModelShelf
from inference.web.words import say
from model.model_lm import KVCache
from model.weights import save_weights
from scripts.export.onnx_graphs import write_graphs
from scripts.export.transformers_directory import write_small_files
from tests.helpers import TOKENIZER, picture, small_model, user
from tests.inference.test_web_page import PNG, ask, open_page, texts

SIZES = dict(n_heads=4, n_kv_heads=2, max_seq_len=128)


@pytest.fixture(scope="module")
def vlm(vision_dir, tmp_path_factory):
    """What is exported: a random model that says something else to each question."""
    model, path = small_model(**SIZES), tmp_path_factory.mktemp("trained") / "sft_vlm_64.pth"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and name.startswith(("layers", "vision_proj")):
                weight.mul_(2)
    save_weights(model, path, tokenizer=str(TOKENIZER), vision_model=str(vision_dir))
    return load_vlm(path, device="cpu")


@pytest.fixture(scope="module")
def folder(vlm, tmp_path_factory):
    """The exported folder, without model.safetensors."""
    folder = tmp_path_factory.mktemp("exported")
    write_small_files(vlm, folder)
    write_graphs(vlm, folder / "onnx")
    return folder


@pytest.fixture(scope="module")
def onnx(folder):
    return load_vlm(folder, backend="onnx")


@pytest.fixture
def copied(folder, tmp_path):
    """A folder to break."""
    return shutil.copytree(folder, tmp_path / "exported")


@pytest.fixture(scope="module")
def batch(vlm):
    """Prompts with 0, 1 and 2 images, padded on the left, and their pixels."""
    texts = ["What color?", "<image>\nWhat is this, in all its parts?", "<image>\n<image>\nSame?"]
    rows = [vlm.processor.encode_prompt([user(text)], n)[0] for n, text in enumerate(texts)]
    input_ids, attention_mask = pad_left(rows)
    assert not attention_mask.all(), "padding is part of it"
    return input_ids, attention_mask, vlm.processor.preprocess([picture(n) for n in range(3)])


def start(model, batch, n_free: int) -> tuple[torch.Tensor, KVCache, torch.Tensor]:
    """(logits after the prompts, the cache with room for more tokens, its attention mask)."""
    input_ids, attention_mask, pixel_values = batch
    n_rows, length = input_ids.shape
    cache = KVCache(model.config, n_rows, length + n_free, torch.device("cpu"), torch.float32)
    logits = prefill(model, input_ids, pixel_values, None, attention_mask, cache)
    return logits, cache, F.pad(attention_mask, (0, n_free), value=1)


@torch.inference_mode()
def test_logits_are_those_of_the_network(vlm, onnx, batch):
    """After the prompts, one token at a time, and several tokens after going back."""
    after = torch.arange(50, 62).view(3, 4)  # (B, T)
    found = []
    for model in (vlm.model, onnx.model):
        logits, cache, mask = start(model, batch, 4)
        n_prompt, steps = cache.length, [logits]
        for tokens in after.T[:2]:
            steps.append(model.predict(model.tok_embeddings(tokens[:, None]), mask, cache)[:, -1])
        cache.rewind(n_prompt)
        several = model.predict(model.tok_embeddings(after), mask, cache)  # (B, 4, vocab_size)
        # The same tokens again give the same.
        torch.testing.assert_close(several[:, :2], torch.stack(steps[1:], dim=1))
        found.append(torch.cat((torch.stack(steps, dim=1), several), dim=1))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)


@torch.inference_mode()
def test_without_a_cache_all_logits_come(vlm, onnx):
    input_ids = torch.arange(40, 60)[None]
    expected = vlm.model(input_ids).logits
    given = onnx.model.predict(onnx.model.embed(input_ids))
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)
    assert onnx.model.predict(onnx.model.embed(input_ids), n_last=3).shape == (1, 3, 672)


def test_greedy_answers_are_the_same_in_a_batch(vlm, onnx, batch):
    input_ids, attention_mask, pixel_values = batch
    options = {"attention_mask": attention_mask, "temperature": 0, "max_new_tokens": 12}
    expected = vlm.model.generate(input_ids, pixel_values, eos_token_id=-1, **options)
    given = onnx.model.generate(input_ids, pixel_values, eos_token_id=-1, **options)
    assert torch.equal(given, expected)
    assert len(set(map(tuple, given[:, -12:].tolist()))) == 3, "each row says something else"


def test_a_conversation_is_the_same(vlm, onnx):
    answers = []
    for one in (vlm, onnx):
        chat = one.start_chat()
        sampling = {"temperature": 0, "max_new_tokens": 6}
        first = "".join(chat.ask("What is a@b <image> </s>?", [picture(1)], **sampling))
        second = "".join(chat.ask("And now?", [picture(2)], **sampling))
        answers.append((first, second, one.ask(None, "Hello", seed=3, max_new_tokens=6)))
    assert answers[0] == answers[1]


def test_the_vision_encoder_waits_for_a_picture(folder):
    fresh = load_vlm(folder, backend="onnx")
    fresh.ask(None, "Hello", max_new_tokens=1)
    assert "vision_encoder" not in vars(fresh.model)
    fresh.ask(picture(), "Hello", max_new_tokens=1)
    assert "vision_encoder" in vars(fresh.model)
    assert fresh.model.decoder.get_session_options().intra_op_num_threads == torch.get_num_threads()


@pytest.mark.parametrize(("dtype", "tolerance"), [("int8", 0.1), ("int4", 0.5)])
@torch.inference_mode()
def test_small_dtypes_give_nearly_the_same_logits(vlm, folder, batch, dtype, tolerance):
    """Random weights are the worst case: a trained model's answers are in test_export_onnx.py."""
    expected, _, _ = start(vlm.model, batch, 0)
    given, _, _ = start(load_vlm(folder, backend="onnx", dtype=dtype).model, batch, 0)
    assert 1e-3 * expected.norm() < (given - expected).norm() < tolerance * expected.norm()


def test_scores_are_the_same(vlm, onnx, rows_dir):
    """Loss goes through several tokens of several rows at once."""
    found = []
    for one in (vlm, onnx):
        dataset = VLMDataset(rows_dir / "rows.jsonl", rows_dir / "images", one.processor, 120)
        evaluation = Evaluation(one, dataset, batch_size=5)
        questions = evaluation.collect()
        for _ in evaluation.answer(questions, "right"):
            pass
        evaluation.measure_loss(questions, "right")
        found.append([(it.given["right"], *it.loss["right"]) for it in questions])
    assert len(found[0]) > 10
    for (text, nats, n), (its_text, its_nats, its_n) in zip(*found, strict=True):
        assert (text, n) == (its_text, its_n)
        assert nats == pytest.approx(its_nats, rel=1e-4)


def test_the_web_page_opens_the_folder(folder):
    """An answer is there, and no word of it asks to be clicked."""
    shelf = ModelShelf(WebConfig(weights=str(folder), backend="onnx", dtype="int4"))
    (entry, *_) = shelf.list()
    assert entry.path == folder and not entry.problem and entry.n_parameters is None

    flags = ("--weights", str(folder), "--backend", "onnx", "--max_new_tokens", "4")
    page = ask(open_page(*flags), "What color?", ("a.png", PNG))
    assert not page.exception
    assert any("tokens/s" in text for text in texts(page))
    assert say("click_a_word") not in texts(page)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "--dtype is int4: with --backend torch choose from float32, float16"),
        ({"backend": "onnx", "dtype": "float16"}, "with --backend onnx choose from float32, int8"),
        ({"backend": "onnx", "attention": "a.png"}, "leave it out, or pass --backend torch"),
    ],
)
def test_flags_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        EvalConfig(**options)


def test_options_that_the_graphs_do_not_have(folder):
    with pytest.raises(UserError, match="--backend is tvm: choose from torch, onnx"):
        load_vlm(folder, backend="tvm")
    with pytest.raises(UserError, match="--max_seq_len is 129 but .* was exported for 128"):
        load_vlm(folder, backend="onnx", max_seq_len=129)
    with pytest.raises(UserError, match="--dim is 65 but .* has dim 64"):
        load_vlm(folder, backend="onnx", dim=65)
    short = load_vlm(folder, backend="onnx", max_seq_len=24)
    with pytest.raises(UserError, match="tokens but the model takes 24"):
        short.ask(picture(), "What is this? " * 5)
    with pytest.raises(UserError, match="30 tokens are more than the model's max_seq_len of 24"):
        short.model.predict(short.model.embed(torch.full((1, 30), 50)))
    with pytest.raises(UserError, match="tokens for 0 images .* but 1 images came"):
        next(generate(short.model, torch.full((1, 3), 50), torch.zeros(1, 3, 48, 48), stream=True))


def test_a_folder_without_graphs_says_how_to_make_them(vlm, copied):
    with pytest.raises(
        MissingFileError, match=r"sft_vlm_64.pth has no folder onnx/: make one with"
    ):
        load_vlm(vlm.weights, backend="onnx")
    for config in (EvalConfig, WebConfig):
        with pytest.raises(MissingFileError, match="has no folder onnx/"):
            find_model(config(weights=str(vlm.weights), backend="onnx"))
    (copied / "onnx" / DECODER_NAMES["int4"]).unlink()
    with pytest.raises(MissingFileError, match="for --dtype int4: it has float32, int8"):
        find_model(EvalConfig(weights=str(copied), backend="onnx", dtype="int4"))
    (copied / "onnx/vision_encoder.onnx").unlink()
    with pytest.raises(MissingFileError, match="has no vision_encoder.onnx: export the model"):
        load_vlm(copied, backend="onnx")


@pytest.mark.parametrize(
    "name", ["vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"]
)
@pytest.mark.parametrize("content", [b"", b"not a graph", "half"])
def test_a_damaged_graph_is_one_line(copied, name, content):
    path = copied / "onnx" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(UserError, match=f"{name} cannot be used .*: export the model") as error:
        load_vlm(copied, backend="onnx").ask(picture(), "Hello", max_new_tokens=1)
    assert "\n" not in str(error.value)


def test_graphs_of_different_models_are_told_apart(copied):
    onnx = copied / "onnx"
    shutil.copy(onnx / "embed_tokens.onnx", onnx / "decoder_model_merged.onnx")
    with pytest.raises(UserError, match="does not fit the config.json of its folder") as error:
        load_vlm(copied, backend="onnx")
    assert "\n" not in str(error.value)


def test_a_graph_of_a_narrower_model_is_one_line(vlm, copied, tmp_path):
    narrow = VLM(small_model(**SIZES, dim=32), vlm.processor, vlm.weights)
    write_graphs(narrow, tmp_path, ())
    for name in ("vision_encoder.onnx", "embed_tokens.onnx"):
        whole = shutil.move(copied / "onnx" / name, tmp_path / "whole")
        shutil.move(tmp_path / name, copied / "onnx" / name)
        with pytest.raises(UserError, match=rf"{name} does not fit .* \(see \(1, .* 32\) instead"):
            load_vlm(copied, backend="onnx").ask(picture(), "Hello", max_new_tokens=1)
        shutil.move(whole, copied / "onnx" / name)


def test_a_decoder_for_fewer_positions_is_one_line(copied):
    path = copied / "config.json"
    positions = '"max_position_embeddings": 128'
    assert positions in path.read_text()
    path.write_text(path.read_text().replace(positions, positions.replace("128", "512")))
    vlm = load_vlm(copied, backend="onnx")
    with pytest.raises(UserError, match="decoder_model_merged.onnx cannot be used") as error:
        vlm.ask(None, "? " * 200, max_new_tokens=1)
    assert "\n" not in str(error.value)
