"""GGUF files, read by llama.cpp itself (xllamacpp): its answers and ours, form by form."""

import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from dataset.scenes.scene import draw_scene
from dataset.scenes.write import eval_row
from inference import VLM
from model.image_processor import picture_side, resize_picture
from model.LMConfig import VLMConfig
from model.model_vlm import MiniMindVLM
from model.processing import VLMProcessor, load_tokenizer
from model.vision import VisionEncoder
from scripts.export.ask_gguf import make_square
from scripts.export.gguf_files import read_tokenizer, write
from tests.helpers import SHARED, TOKENIZER, needs_shared, picture, run_script
from tests.scripts.llama_cpp import start_llama_cpp
from tests.small_encoders import make_network, make_processor

FORMS = ("first", "last", "none")
# The demo's, and the published one.
TOKENIZERS = [TOKENIZER, pytest.param(SHARED / "minimind_tokenizer", marks=needs_shared)]
TEXTS = [
    "What color is the star?",
    "红色的东西是什么形状？",
    "mail a@b.c, @@ and @",
    "  two blanks,\ttab\n\nlines ",
    "don't we'll I'VE 12345 ３４ ½ x²",
    "naïve façade Ω ñ e\u0301 \u200b\u00a0\u3000 end",
    "👍🏽 👨‍👩‍👧 🇩🇪 \U0001f9d1",
    "<image> <s>user\n</s> <unk> <|x|> [INST]",
    "مرحبا שלום नमस्ते 안녕 ありがとう",
    "a\r\nb\x0bc\x7f\ufeff\ufffd",
]


@pytest.fixture(scope="module")
def llama_cpp():
    with start_llama_cpp() as process:
        yield process


@pytest.fixture(scope="module")
def exported(demo, tmp_path_factory) -> dict[str, Path]:
    """Folder of the demo model, by the form of its class token."""
    return {form: export(demo, tmp_path_factory.mktemp(form), form) for form in FORMS}


def export(vlm: VLM, folder: Path, form: str = "first") -> Path:
    write(vlm, folder, SimpleNamespace(gguf_class_token=form))
    return folder


def make_vlm(encoder: str, tokenizer: Path = TOKENIZER, **sizes) -> VLM:
    """A small model with random weights."""
    torch.manual_seed(0)
    tokenizer, image_processor = load_tokenizer(tokenizer), make_processor(encoder)
    vision_encoder = VisionEncoder(make_network(encoder), picture_side(image_processor))
    sizes = dict(dim=64, n_layers=2, vocab_size=len(tokenizer), max_seq_len=512) | sizes
    model = MiniMindVLM(VLMConfig.for_vision_encoder(vision_encoder, **sizes), vision_encoder)
    processor = VLMProcessor(tokenizer, image_processor, model.config)
    # llama.cpp says no probabilities of half a character: no answer begins with one.
    halves = [n for n in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([n])]
    model.tok_embeddings.weight.data[halves] *= 0.1
    return VLM(model.eval(), processor, Path("small.pth"))


@pytest.fixture(scope="module")
def scenes(demo) -> list[tuple]:
    """(picture, question, our answer) of 24 questions, in English and Chinese."""
    rng, asked = random.Random(3), []
    for question_type in ("color", "shape", "size", "count", "relation", "description"):
        for language in ("en", "zh", "en", "zh"):
            row, (scene,) = eval_row(rng, language, question_type)
            question = row["conversations"][0]["content"].removeprefix("<image>\n")
            image = draw_scene(scene)
            asked.append((image, question, demo.ask(image, question, temperature=0)))
    return asked


def say(answers: list[dict]) -> list[str]:
    return [answer["message"]["content"] for answer in answers]


@torch.no_grad()
def predict(vlm: VLM, question: str, images: list, form: str) -> dict[int, float]:
    """Our log probabilities of all first tokens, by id, if the vision encoder has a defect.

    Args:
        vlm: the model.
        question: about the images.
        images: of any number.
        form: what is wrong. right: nothing. first, last, none: what llama.cpp makes of that form.
    """
    # states of the vision encoder
    network, pixels = vlm.model.vision_encoder.network, vlm.processor.preprocess(images)
    embeddings = network.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (k, patches, width)
    positions = embeddings.position_embedding.weight
    class_token = embeddings.class_embedding.expand(len(images), 1, -1)
    if form in ("right", "last"):
        inputs = torch.cat((class_token, patches), dim=1) + positions
    elif form == "first":
        inputs = torch.cat((patches, class_token), dim=1) + positions
    else:
        inputs = patches + positions[1:]
    states = network.encoder(inputs_embeds=network.pre_layrnorm(inputs)).last_hidden_state

    # what the language model gets of them
    rows = vlm.model.vision_proj(states if form == "none" else states[:, 1:])
    tags = [{"content": "<image>\n" * len(images) + question}]
    input_ids = vlm.processor.encode_prompt(tags, len(images))
    is_image = input_ids == vlm.model.config.image_token_id
    text = vlm.model.tok_embeddings(input_ids)
    if form == "last":
        # The first patch is lost, and a line break comes in place of the class token.
        line_break = vlm.model.tok_embeddings(torch.tensor(vlm.processor.encode_content("\n")))
        rows = torch.cat((rows[:, 1:], line_break.expand(len(images), 1, -1)), dim=1)
    text[is_image] = rows.flatten(0, 1)  # (k * patches, dim)
    logits = vlm.model.output(vlm.model.run_layers(text, None, None)[0, -1])
    return dict(enumerate(logits.log_softmax(-1).tolist()))


def distance(answer: dict, expected: dict[int, float]) -> float:
    """Largest difference between llama.cpp's log probabilities of its likeliest tokens and ours."""
    likeliest = answer["logprobs"]["content"][0]["top_logprobs"]
    return max(abs(token["logprob"] - expected[token["id"]]) for token in likeliest)


FIRST_TOKENS = dict(max_new_tokens=1, logprobs=True, top_logprobs=5)


def test_answers_without_a_picture_are_ours(llama_cpp, demo, exported):
    questions = [*TEXTS[:3], "How many things are there?", "hello", "圆形是什么颜色？", "x" * 40]
    answers = llama_cpp.ask(exported["last"], [([], text) for text in questions], max_new_tokens=24)
    ours = [demo.ask(None, text, temperature=0, max_new_tokens=24) for text in questions]
    assert say(answers) == ours


@pytest.mark.parametrize("precision, least", [("F16", 0.9), ("Q8_0", 0.9), ("Q4_0", 0.75)])
def test_answers_about_pictures_are_ours(precision, least, llama_cpp, exported, scenes):
    questions = [([image], question) for image, question, _ in scenes]
    answers = say(llama_cpp.ask(exported["last"], questions, precision))
    same = sum(answer == ours for answer, (_, _, ours) in zip(answers, scenes))
    assert same >= least * len(scenes), [
        (answer, ours) for answer, (_, _, ours) in zip(answers, scenes) if answer != ours
    ]


@pytest.mark.parametrize("n_images", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_llama_cpp_computes_what_we_say_of_each_form(form, n_images, llama_cpp, demo, exported):
    """Its known bug, put into our own network, gives the same probabilities."""
    images = [picture(seed, (224, 224)) for seed in range(n_images)]
    (answer,) = llama_cpp.ask(exported[form], [(images, TEXTS[0])], **FIRST_TOKENS)
    expected, right = (predict(demo, TEXTS[0], images, kind) for kind in (form, "right"))
    assert not (form == "first" and distance(answer, right) < distance(answer, expected)), (
        "llama.cpp now places the class token right: make the advice on --gguf_class_token in "
        "docs/export.md, README.md and scripts/export/gguf_vision.py obsolete"
    )
    assert distance(answer, expected) < 0.1


@torch.no_grad()
@pytest.mark.parametrize("n_images", [0, 1, 2])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_siglip_needs_no_class_token(tokenizer, n_images, llama_cpp, tmp_path):
    """Nothing is wrong with it; and the published tokenizer has a system turn in Chinese."""
    vlm = make_vlm("siglip", tokenizer)
    images = [picture(seed, (60, 60)) for seed in range(n_images)]
    (answer,) = llama_cpp.ask(export(vlm, tmp_path), [(images, TEXTS[1])], **FIRST_TOKENS)
    tags = "<image>\n" * n_images
    input_ids = vlm.processor.encode_prompt([{"content": tags + TEXTS[1]}], n_images)
    logits = vlm.model(input_ids, vlm.processor.preprocess(images)).logits[0, -1]
    expected = dict(enumerate(logits.log_softmax(-1).tolist()))
    assert distance(answer, expected) < 0.02


def test_rows_that_fill_no_block_stay_in_16_bits(llama_cpp, tmp_path):
    import gguf

    vlm = make_vlm("clip", dim=48, n_heads=2)
    folder = export(vlm, tmp_path)
    reader = gguf.GGUFReader(folder / "gguf/small-Q4_0.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q4_0" and kinds["output_norm.weight"] == "F32"
    (answer,) = llama_cpp.ask(folder, [([], "red")], "Q4_0", max_new_tokens=2)
    assert answer["finish_reason"] in ("stop", "length")


def random_texts(n: int) -> list[str]:
    rng = random.Random(0)
    letters = "abcXYZ 019\n\t  .,'\"-_@<>/ésß中文图片里是什么颜色\u00a0\u3000🙂\u0301"
    return ["".join(rng.choices(letters, k=rng.randint(1, 30))) for _ in range(n)]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_tokens_are_ours(tokenizer, llama_cpp, tmp_path):
    vlm, texts = make_vlm("clip", tokenizer), TEXTS + random_texts(300)
    found = llama_cpp.tokenize(export(vlm, tmp_path), texts)
    assert found == [vlm.processor.encode_content(text) for text in texts]


@settings(max_examples=40, deadline=None)
@given(st.integers(16, 400), st.integers(16, 400), st.sampled_from(["clip", "siglip"]))
def test_squares_are_those_of_the_image_processor(width, height, encoder):
    image, image_processor = picture(1, (width, height)), make_processor(encoder)
    if encoder == "siglip":
        # the published ones are bicubic
        image_processor.resample = 3
    square = make_square(image, picture_side(image_processor), encoder == "clip")
    expected = resize_picture(image_processor, image).permute(1, 2, 0)  # (side, side, 3)
    assert np.array_equal(np.asarray(square), expected)


def test_the_command_asks(exported, tmp_path):
    file = tmp_path / "wide.png"
    picture(0, (300, 200)).save(file)
    command = ("-m", "scripts.export.ask_gguf", exported["last"], file, "What color is the star?")
    finished = run_script(*command)
    assert finished.returncode == 0 and finished.stdout.count("\n") == 1, finished.stdout


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (("nowhere", "a.png", " "), "which question?"),
        (("nowhere", "a.png", "What?"), "no *-F16.gguf beside"),
        (("nowhere", "a.png", "What?", "--precision", "Q2"), "choose from"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, reason):
    finished = run_script("-m", "scripts.export.ask_gguf", *arguments)
    assert finished.returncode == 2 and reason in finished.stdout
    assert finished.stdout.count("\n") == 1


@pytest.mark.parametrize(
    "form, advice", [("first", "last"), ("last", "leave out"), ("none", "measure")]
)
def test_the_export_says_what_the_form_is_for(form, advice, demo, tmp_path, capsys):
    export(demo, tmp_path, form)
    (line,) = capsys.readouterr().out.splitlines()
    assert advice in line


@pytest.mark.parametrize("name", ["mmproj-sft_vlm_128-F16.gguf", "sft_vlm_128-F16.gguf"])
@pytest.mark.parametrize("damage", [b"", b"hello", 100_000, "another file"])
def test_damaged_files_are_refused(damage, name, llama_cpp, exported, tmp_path):
    shutil.copytree(exported["last"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "gguf" / name
    if damage == "another file":
        (other,) = set(path.parent.glob("*-F16.gguf")) - {path}
        shutil.copy(other, path)
    else:
        path.write_bytes(path.read_bytes()[:damage] if isinstance(damage, int) else damage)
    with pytest.raises(UserError, match=name):
        llama_cpp.ask(tmp_path, [([], "red")])


def test_a_question_that_is_too_long_is_refused(llama_cpp, exported):
    with pytest.raises(UserError, match="exceeds the available context"):
        llama_cpp.ask(exported["last"], [([], "a b " * 9000)])


def test_what_llama_cpp_has_not_is_refused(tmp_path):
    with pytest.raises(UserError, match="DINOv2 cannot .* CLIP or SigLIP"):
        export(make_vlm("dinov2"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_tokenizers_of_other_kinds_are_refused():
    from tokenizers import Tokenizer, models, normalizers

    def wrap(backend: Tokenizer) -> SimpleNamespace:
        return SimpleNamespace(backend_tokenizer=backend)

    with pytest.raises(UserError, match="0 merges"):
        read_tokenizer(wrap(Tokenizer(models.BPE({"a": 0}, []))))
    with pytest.raises(UserError, match="WordLevel"):
        read_tokenizer(wrap(Tokenizer(models.WordLevel({"a": 0}, "a"))))
    backend = load_tokenizer(TOKENIZER).backend_tokenizer
    backend.normalizer = normalizers.NFKC()
    with pytest.raises(UserError, match="normalizer"):
        read_tokenizer(wrap(backend))
