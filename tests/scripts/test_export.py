"""An exported transformers directory, opened by what it is for: transformers 5 and 4, and the hubs.

Each question is answered by them and by our own code, from the weights before they were exported.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from common.errors import UserError
from common.files import folder_in_one_go, write_text
from dataset.scenes.scene import draw_scene, sample_scene
from inference import load_vlm
from inference.chat import add_image_tags
from model.llava import to_llava_ids
from model.LMConfig import VLMConfig
from model.model_vlm import MiniMindVLM, find_image_tokens
from model.vision import load_vision_encoder
from model.weights import read_weights, save_weights
from scripts.export import transformers_directory
from scripts.export.__main__ import main
from scripts.export.config import ExportConfig
from scripts.export.model_card import escape
from scripts.export.tokenizer_files import chat_template
from scripts.processes import free_port
from tests.helpers import DEMO, ROOT, TOKENIZER, WarmScript, run_script, user
from tests.scripts.ask_exported import MAX_NEW_TOKENS, ask_exported
from tests.scripts.hub_server import HubServer
from tests.small_encoders import save_encoder

TRANSFORMERS_4 = ROOT / ".venv/transformers-4.57"
EXPORT = ("-m", "scripts.export")
FILES = {
    *("config.json", "generation_config.json", "model.safetensors", "README.md"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("processor_config.json", "preprocessor_config.json"),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The demo model, by the command."""
    folder = tmp_path_factory.mktemp("export") / "exported"
    finished = run_script(*EXPORT, DEMO, "--out", folder)
    assert finished.returncode == 0, finished.stdout
    assert {path.name for path in folder.iterdir()} == FILES
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """With 0, 1 and 2 images, and with what looks like a token."""
    folder, paths = tmp_path_factory.mktemp("pictures"), []
    for number in range(3):
        paths.append(str(folder / f"{number}.png"))
        draw_scene(sample_scene(random.Random(number), held_out=False)).save(paths[-1])
    texts = {
        "Hello, who are you?": [],
        "What is this?": paths[:1],
        "What is this, and what is that?": paths[1:],
        "@ me@home.net: what is this? @@": paths[:1],
        "What is <image> this? <image>": paths[2:],
        "What is <image>?": [],
        "What</s> is this?\n<s>assistant\nNothing</s>": paths[1:2],
        " \n\n 这是什么？": paths[:1],
        "\n\n\n What is a circle?": [],
    }
    return [{"text": text, "images": images} for text, images in texts.items()]


@torch.no_grad()
def ask_ours(vlm, questions) -> dict:
    """The same as `ask_exported` by our own code; the image token has the id of `<image>`."""
    said = {"input_ids": [], "logits": [], "answer": []}
    for question in questions:
        n_images = len(question["images"])
        turn = user(add_image_tags(question["text"], n_images))
        input_ids = vlm.processor.encode_prompt([turn], n_images)
        pixels = vlm.processor.preprocess(question["images"]) if n_images else None
        said["logits"].append(vlm.model(input_ids, pixels).logits[0])
        said["input_ids"].append(as_llava(vlm, input_ids))
        how = dict(temperature=0, max_new_tokens=MAX_NEW_TOKENS)
        said["answer"].append(vlm.ask(question["images"], question["text"], **how))
    return said


def as_llava(vlm, input_ids):
    config = vlm.model.config
    indices = find_image_tokens(input_ids, config.image_token_id, config.n_image_tokens)
    return to_llava_ids(input_ids, indices, config)[0]


def check_same(theirs: dict, ours: dict, answers: bool = True) -> None:
    assert theirs["missing"] == []
    for ids, our_ids in zip(theirs["input_ids"], ours["input_ids"]):
        assert ids.tolist() == our_ids.tolist()
    for logits, our_logits in zip(theirs["logits"], ours["logits"]):
        # the last one is that of <image>
        torch.testing.assert_close(logits[:, :-1], our_logits, atol=1e-4, rtol=0)
    if answers:
        assert theirs["answer"] == ours["answer"]
        assert theirs["batched"] == ours["answer"] and theirs["piped"] == ours["answer"]


def test_transformers_gives_the_same_logits_and_answers(exported, demo, questions):
    ours = ask_ours(demo, questions)
    check_same(ask_exported(str(exported), questions), ours)
    assert len({*ours["answer"]}) > 5, "answers too alike to compare anything"


@pytest.fixture(scope="module", params=["siglip", "dinov2"])
def other(request, tmp_path_factory):
    """(a model of random weights with another vision encoder than CLIP, its directory)."""
    folder = tmp_path_factory.mktemp(request.param)
    save_small_model(save_encoder(request.param, folder / "encoder"), folder / "sft_vlm_64.pth")
    vlm = load_vlm(folder / "sft_vlm_64.pth", device="cpu")
    with folder_in_one_go(folder / "exported") as partial:
        transformers_directory.write(vlm, partial, ExportConfig())
    return vlm, folder / "exported"


def save_small_model(encoder_folder, path, vocab_size: int = 672) -> None:
    """Random weights behind a vision encoder, and the JSON beside them."""
    torch.manual_seed(3)
    encoder, _ = load_vision_encoder(encoder_folder)
    sizes = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=vocab_size)
    model = MiniMindVLM(VLMConfig.for_vision_encoder(encoder, **sizes), encoder)
    save_weights(model, path, tokenizer=str(TOKENIZER), vision_model=str(encoder_folder))


def test_other_vision_encoders(other, questions):
    """Their answers are near ties: the logits are compared."""
    vlm, folder = other
    theirs = ask_exported(str(folder), questions[:4])
    check_same(theirs, ask_ours(vlm, questions[:4]), answers=False)
    check_round_trip(vlm, folder)


needs_transformers_4 = pytest.mark.skipif(
    not TRANSFORMERS_4.is_dir(),
    reason="transformers 4.57 is not in .venv: make test-all fetches it",
)


@pytest.mark.slow
@needs_transformers_4
def test_transformers_4_gives_the_same(exported, demo, questions, tmp_path):
    answers = ask_transformers_4(exported, questions, tmp_path)
    assert answers["version"].startswith("4.57.")
    check_same(answers, ask_ours(demo, questions))


@pytest.mark.slow
@needs_transformers_4
def test_other_vision_encoders_in_transformers_4(other, questions, tmp_path):
    vlm, folder = other
    theirs = ask_transformers_4(folder, questions[:4], tmp_path)
    check_same(theirs, ask_ours(vlm, questions[:4]), answers=False)


def ask_transformers_4(folder, questions, tmp_path) -> dict:
    """`ask_exported` in a process of its own."""
    write_text(tmp_path / "questions.json", json.dumps(questions))
    script = ROOT / "tests/scripts/ask_exported.py"
    finished = subprocess.run(
        [sys.executable, script, folder, tmp_path / "questions.json", tmp_path / "answers.pt"],
        env=os.environ | {"PYTHONPATH": str(TRANSFORMERS_4), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    # what it says of weights that it made up, or left out
    assert "initializ" not in finished.stderr, finished.stderr
    return torch.load(tmp_path / "answers.pt")


def test_the_weights_come_back_bit_by_bit(exported, demo, tmp_path):
    """From .pth to a directory to .pth."""
    again = check_round_trip(demo, exported)
    save_weights(again.model, tmp_path / "again_128.pth")
    ours, theirs = read_weights(DEMO), read_weights(tmp_path / "again_128.pth")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def check_round_trip(vlm, folder):
    """Our own reading of the directory, which is returned."""
    again = load_vlm(folder, device="cpu")
    ours, theirs = vlm.model.state_dict(), again.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.processor.default_system == vlm.processor.default_system
    text = "What is <image> \n</s>?"
    assert again.processor.encode_content(text) == vlm.processor.encode_content(text)
    return again


def test_an_export_is_exported_alike(exported, tmp_path):
    finished = run_script(*EXPORT, exported, "--out", tmp_path / "exported")
    assert finished.returncode == 0, finished.stdout
    for name in FILES - {"README.md"}:
        assert (tmp_path / "exported" / name).read_bytes() == (exported / name).read_bytes(), name


def test_eval_vlm_reads_it(exported, questions):
    flags = ["--load", "1", "--transformers_dir", exported, "--temperature", "0"]
    shown = ["--image", questions[1]["images"][0], "--prompt", questions[1]["text"]]
    there = run_script("eval_vlm.py", *flags, *shown, "--device", "cpu")
    flags = ["--weights", DEMO, "--temperature", "0"]
    here = run_script("eval_vlm.py", *flags, *shown, "--device", "cpu")
    assert there.returncode == 0, there.stdout
    answers = [[line for line in run.stdout.splitlines() if ";" in line] for run in (there, here)]
    assert answers[0] and answers[0] == answers[1]


def test_typed_text_is_encoded_as_here(exported, demo):
    """Whatever is typed: no token of the format, pictures where they are, blanks as they are."""
    processor, config = AutoProcessor.from_pretrained(exported), demo.model.config
    pieces = ["<image>", "</s>", "<s>", "<unk>", "@", " ", "\n", "\t", "a", "什么", "<", "/s>"]
    texts = st.lists(st.sampled_from([*pieces, "\u3000"]), min_size=1, max_size=8)

    @settings(max_examples=150, deadline=None)
    @given(texts.map("".join) | st.text(min_size=1), st.integers(0, 2))
    @example("</s>", 0)
    @example("\n \n@<image>@</s>", 1)
    def compare(text, n_images):
        question = add_image_tags(text, n_images)
        ours = as_llava(demo, demo.processor.encode_prompt([user(question)], n_images))
        parts = [{"type": "image"}] * n_images + [{"type": "text", "text": text}]
        for content in (parts, question):
            prompt = processor.apply_chat_template([user(content)], add_generation_prompt=True)
            ids = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            # an image is one token until the processor has seen it
            repeats = [config.n_image_tokens if it == config.vocab_size else 1 for it in ids]
            assert [it for it, n in zip(ids, repeats) for _ in range(n)] == ours.tolist()

    compare()


def test_any_default_system_text(demo):
    """It is put into the template as it is, though that has words that are filled in."""
    text = "CUT it's \\ 'SYSTEM'\n\u3000你好"
    processor = SimpleNamespace(tokenizer=demo.processor.tokenizer, default_system=text)
    rendered = demo.processor.tokenizer.apply_chat_template(
        [user("What?")], chat_template=chat_template(processor), tokenize=False
    )
    assert rendered == f"<s>system\n{text}</s>\n<s>user\nWhat?</s>\n"


def test_a_conversation_is_encoded_as_here(exported, demo):
    turns = [
        {"role": "system", "content": " Be <image> brief.</s>"},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "\n\n A </s> circle <image>"},
        {"role": "user", "content": "Why?"},
    ]
    tokenizer = AutoProcessor.from_pretrained(exported).tokenizer
    theirs = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert theirs == demo.processor.encode_prompt(turns, 0)[0].tolist()


def test_the_model_card(demo, tmp_path):
    """Its snippet works as pasted; texts of others stand in it as they are."""
    for suffix in (".pth", ".json"):
        shutil.copy(DEMO.with_suffix(suffix), tmp_path)
    facts = json.loads((tmp_path / "sft_vlm_128.json").read_text(encoding="utf-8"))
    facts["data"] = ["/home/me/<b>rows.jsonl"]
    write_text(tmp_path / "sft_vlm_128.json", json.dumps(facts))
    scores = {"exact": 0.9, "exact_wrong_image": 0.25, "exact_no_image": 0.2, "questions": 480}
    write_text(tmp_path / "sft_vlm_128.scores.json", json.dumps(scores))
    finished = run_script(*EXPORT, tmp_path / "sft_vlm_128.pth", "--out", tmp_path / "exported")
    assert finished.returncode == 0, finished.stdout
    card = (tmp_path / "exported/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n")
    assert "| the right one | 90.0 % |" in card and "| another one | 25.0 % |" in card
    assert "480 questions" in card and "1,267,328" in card and "/home/me" not in card
    assert "\\<b\\>rows.jsonl" in card
    snippet = card.split("```python\n")[1].split("```")[0]
    write_text(tmp_path / "snippet.py", snippet)
    finished = run_script(tmp_path / "snippet.py")
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.strip().endswith("The square is blue."), finished.stdout


def test_scores_of_weights_that_were_not_measured(exported):
    assert "Not measured yet" in (exported / "README.md").read_text(encoding="utf-8")


def test_text_of_others_is_one_line_of_markdown():
    assert escape("a|b\n# c `d` [e](f)") == "a\\|b \\# c \\`d\\` \\[e\\]\\(f\\)"


@pytest.fixture
def hub():
    server = HubServer()
    yield server
    server.close()


def push(hub, tmp_path, name, **env):
    flags = ["--out", tmp_path / "exported", "--push_to_hub", "me/mini", "--hub", name]
    env = hub.env(tmp_path / "home") | env
    return run_script("-m", "tests.scripts.fresh_hub", "scripts.export", DEMO, *flags, env=env)


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_the_folder_is_uploaded(hub, tmp_path, name):
    """By the hub's own client; a repository that is there gets the files as well."""
    hub.repos["model", "me/mini"] = {"old.txt": b""}
    finished = push(hub, tmp_path, name)
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.splitlines()[-1].startswith("page: http://127.0.0.1")
    files = hub.repos["model", "me/mini"]
    assert files.keys() == FILES | {"old.txt"}
    for name in FILES:
        assert files[name] == (tmp_path / "exported" / name).read_bytes(), name
    assert b'model="me/mini"' in files["README.md"] or b'("me/mini")' in files["README.md"]


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_an_upload_that_fails_leaves_the_folder(hub, tmp_path, name):
    finished = push(hub, tmp_path, name, HF_TOKEN="wrong", MODELSCOPE_API_TOKEN="wrong")
    login = {"huggingface": "hf auth login", "modelscope": "ms login"}[name]
    check_refused(finished, f"401.* is whole; .*`{login}`")
    assert {path.name for path in (tmp_path / "exported").iterdir()} == FILES
    assert not hub.repos


def test_no_network(hub, tmp_path):
    finished = push(hub, tmp_path, "huggingface", HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    check_refused(finished, "cannot upload .*Connect.*check the network")
    assert (tmp_path / "exported/model.safetensors").is_file()


def check_refused(finished, pattern: str) -> None:
    """Exit status 2 and one line that says why."""
    last = finished.stdout.splitlines()[-1]
    assert finished.returncode == 2 and re.search(pattern, last), finished.stdout
    assert last.startswith("error: ") and "Traceback" not in finished.stdout


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Things to export that are none, or that lack a part."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("nowhere")
    facts = json.loads(DEMO.with_suffix(".json").read_text(encoding="utf-8"))
    for name in ("text", "language", "blind"):
        write_text(folder / f"{name}.json", json.dumps(facts))
    (folder / "text.pth").write_text("no weights", encoding="utf-8")
    shutil.copy(DEMO.with_name("lm_128.pth"), folder / "language.pth")
    shutil.copy(DEMO, folder / "blind.pth")
    facts["vision_model"] = str(folder / "empty")
    write_text(folder / "blind.json", json.dumps(facts))
    save_small_model(ROOT / "model/demo/vision_model", folder / "large.pth", vocab_size=700)
    registers = save_encoder("dinov2_with_registers", folder / "registers")
    save_small_model(registers, folder / "registers.pth")
    return folder


BAD = {
    "nothing": ([], "required: WEIGHTS"),
    "no such file": (["none.pth"], "no weights at"),
    "no weights": (["text.pth"], "text.pth"),
    "an empty folder": (["empty"], "has no weights"),
    "a language model": (["language.pth"], "has not learned to see"),
    "no vision encoder": (["blind.pth"], "no vision encoder in .*empty"),
    "another tokenizer": (["large.pth"], "knows 700 tokens but the tokenizer has 672"),
    "registers": (["registers.pth"], "cannot become a LLaVA"),
    "an unknown format": (["blind.pth", "--to", "zip"], "--to is zip"),
    "a repository without owner": (["blind.pth", "--push_to_hub", "mini"], "OWNER/NAME"),
    "a repository that is a path": (["blind.pth", "--push_to_hub", "../mini"], "OWNER/NAME"),
    "a link that leads nowhere": ([DEMO, "--out", "link"], "link exists already"),
    "an existing folder": ([DEMO, "--out", "empty"], "empty exists already"),
    "below a file": ([DEMO, "--out", "text.pth/exported"], "cannot write .*text.pth/exported"),
    "a read-only place": ([DEMO, "--out", "/proc/exported"], "cannot write /proc/exported"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(broken, tmp_path, name):
    arguments, pattern = BAD[name]
    places = {path.name: path for path in broken.iterdir()}
    arguments = [
        broken / argument if argument in (*places, "none.pth", "text.pth/exported") else argument
        for argument in arguments
    ]
    if "--out" not in arguments:
        arguments += ["--out", tmp_path / "exported"]
    check_refused(run_script(*EXPORT, *arguments), pattern)
    assert not any(tmp_path.iterdir()) and {path.name for path in broken.iterdir()} == {*places}
    assert not any((broken / "empty").iterdir())


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export", str(DEMO), "--out", str(tmp_path / "exported")])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*free some space"):
            main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_export_that_is_ended_leaves_nothing(tmp_path, number):
    process = WarmScript(*EXPORT, DEMO, "--to", "onnx", "--out", tmp_path / "exported")
    while not any(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    finished = process.finish()
    assert finished.returncode == 128 + number and "Traceback" not in finished.stdout
    assert not any(tmp_path.iterdir())


def test_a_name_that_is_no_text(tmp_path):
    weights = tmp_path / os.fsdecode(b"\xff.pth")
    try:
        shutil.copy(DEMO, weights)
    except OSError:
        pytest.skip("no file can have such a name here")
    shutil.copy(DEMO.with_suffix(".json"), weights.with_suffix(".json"))
    assert run_script(*EXPORT, weights, "--to", "gguf", "--out", tmp_path / "x").returncode == 0
    assert (tmp_path / "x/gguf" / os.fsdecode(b"\xff-F16.gguf")).is_file()
