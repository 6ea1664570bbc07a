"""eval_vlm.py and the web page as a user starts them."""

import json
import os
import time
import urllib.request
import zipfile

import pytest
import torch

from common.errors import UserError
from inference.chat import Chat
from inference.evaluate import Question, _shuffle_images, accuracy
from model.llava import to_llava
from model.weights import save_atomically, weights_to_save
from tests.helpers import (
    TOKENIZER,
    free_port,
    picture,
    run_script,
    small_image_processor,
    small_model,
    start_script,
    write_rows,
)


@pytest.fixture(scope="module")
def setup(vision_dir, tmp_path_factory):
    """A folder with weights of all three modes, two pictures, a pair of pictures; and the flags that use it."""
    folder = tmp_path_factory.mktemp("eval")
    model = small_model(n_heads=2)
    for name in ("pretrain_vlm", "sft_vlm", "sft_vlm_multi"):
        save_atomically(weights_to_save(model), folder / f"{name}_64.pth")
    (folder / "pictures/pair").mkdir(parents=True)
    for name in ("a.png", "b.png", "pair/0.png", "pair/1.png"):
        picture(len(name)).save(folder / "pictures" / name)
    flags = [
        "--out_dir",
        folder,
        "--dim",
        "64",
        "--n_layers",
        "2",
        "--tokenizer",
        TOKENIZER,
        "--vision_model",
        vision_dir,
    ]
    return folder, [*flags, "--device", "cpu", "--max_new_tokens", "8"]


@pytest.mark.parametrize("mode", ["0", "1"])
def test_every_picture_of_a_folder(setup, mode):
    folder, flags = setup
    (folder / "pictures/broken.jpg").write_bytes(b"nothing")
    finished = run_script(
        "eval_vlm.py",
        "--load",
        "0",
        "--model_mode",
        mode,
        *flags,
        "--images_dir",
        folder / "pictures",
    )
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.count("tokens/s, first token after") == 2
    assert "[a.png]" in finished.stdout and "skipped: image damaged" in finished.stdout


def test_multi_image_mode_asks_about_a_folder_at_once(setup):
    folder, flags = setup
    finished = run_script(
        "eval_vlm.py", "--model_mode", "2", *flags, "--images_dir", folder / "pictures"
    )
    assert (
        finished.returncode == 0
        and "[0.png, 1.png]" in finished.stdout
        and finished.stdout.count("tokens/s") == 1
    )


def test_images_and_prompt_by_flag(setup):
    folder, flags = setup
    pictures = ["--image", folder / "pictures/a.png", "--image", folder / "pictures/b.png"]
    finished = run_script("eval_vlm.py", *flags, *pictures, "--prompt", "What changes?")
    assert (
        finished.returncode == 0
        and "[a.png, b.png]" in finished.stdout
        and "Traceback" not in finished.stdout
    )


def test_a_picture_asked_for_by_name_has_to_be_readable(setup):
    folder, flags = setup
    (folder / "bad.png").write_bytes(b"nothing")
    finished = run_script("eval_vlm.py", *flags, "--image", folder / "bad.png")
    assert (
        finished.returncode == 2
        and "error: image damaged" in finished.stdout
        and "Traceback" not in finished.stdout
    )


def test_chat_keeps_the_picture(setup):
    folder, flags = setup
    typed = f"What?\n/image {folder}/pictures/b.png\nAnd now?\n/image nothing.png\n/help\nhm\n/new\nhello\n/exit\n"
    finished = run_script(
        "eval_vlm.py", *flags, "--chat", "--image", folder / "pictures/a.png", input=typed
    )
    assert finished.returncode == 0 and finished.stdout.count("tokens/s") == 4, finished.stdout
    assert "no file nothing.png" in finished.stdout


def test_a_dialogue_is_the_same_as_one_prompt(model, processor):
    """The second question sees both pictures and both turns, as if all had been given at once."""
    chat = Chat(model, processor)
    first = "".join(chat.ask("What?", [picture(1)], temperature=0, max_new_tokens=6))
    second = "".join(chat.ask("And <image> this?", [picture(2)], temperature=0, max_new_tokens=6))
    turns = [
        {"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": first},
        {"role": "user", "content": "And <image> this?"},
    ]  # fmt: skip
    input_ids = processor.encode_prompt(turns, 2)
    tokens = model.generate(
        input_ids, processor.preprocess([picture(1), picture(2)]), temperature=0, max_new_tokens=6
    )
    assert second == processor.tokenizer.decode(
        tokens[0, input_ids.shape[1] :], skip_special_tokens=True
    ).rstrip("\ufffd")
    assert len(chat.turns) == 4 and len(chat.images) == 2


def test_a_conversation_too_long_is_refused_and_unharmed(model, processor):
    chat = Chat(model, processor)
    list(chat.ask("What?", max_new_tokens=2))
    with pytest.raises(UserError, match=r"the model takes 512 \(--max_seq_len\): start a new one"):
        list(chat.ask("circle " * 600, max_new_tokens=2))
    assert len(chat.turns) == 2


def test_loss_and_accuracy_of_a_file(setup, rows_dir):
    folder, flags = setup
    data = ["--data", rows_dir / "rows.jsonl", "--images_path", rows_dir / "images"]
    finished = run_script("eval_vlm.py", *flags, *data, "--save_report", folder / "report.json")
    assert finished.returncode == 0, finished.stdout
    report = json.loads((folder / "report.json").read_text())
    assert (
        report["questions"] == 24 and 0 <= report["accuracy"]["overall"] <= 1 and report["loss"] > 1
    )
    blind = run_script("eval_vlm.py", *flags, *data, "--show_images", "none")
    assert blind.returncode == 0 and "exact answers, overall" in blind.stdout


def test_unreadable_pictures_cost_their_questions_only(setup, tmp_path):
    _, flags = setup
    for seed, name in enumerate(("a.png", "b.png")):
        picture(seed).save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for name in ("a.png", "b.png", "cut.png"):
            archive.write(tmp_path / name, name)
    whole = (tmp_path / "b.png").read_bytes()
    broken = whole[:50] + bytes(10) + whole[60:]
    (tmp_path / "pictures.zip").write_bytes(
        (tmp_path / "pictures.zip").read_bytes().replace(whole, broken)
    )
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "red"}]
    write_rows(
        tmp_path / "rows.jsonl",
        [{"image": name, "conversations": turns} for name in ("a.png", "b.png", "cut.png")],
    )
    data = [
        "--data",
        tmp_path / "rows.jsonl",
        "--images_path",
        tmp_path / "pictures.zip",
        "--save_report",
        tmp_path / "r.json",
    ]
    finished = run_script("eval_vlm.py", *flags, *data)
    assert finished.returncode == 0 and "not asked: 2 image damaged" in finished.stdout, (
        finished.stdout
    )
    assert (
        json.loads((tmp_path / "r.json").read_text())["questions"] == 1
        and "loss:" in finished.stdout
    )


def test_exact_answers_look_at_words_only():
    def question(given, answer, type="color"):
        return Question([], [], answer, type, given)

    questions = [
        question("Red.", "red"),
        question(" 红色。", "红色"),
        question("red circle", "red"),
        question("2", "2", "count"),
    ]
    assert accuracy(questions) == {"overall": 0.75, "color": 2 / 3, "count": 1.0}


def test_wrong_images_are_anothers_and_as_many():
    images = [["a"], ["b"], ["c", "d"], ["e"], ["f", "g"], []]
    shuffled = _shuffle_images(images, seed=0)
    assert [len(group) for group in shuffled] == [len(group) for group in images]
    assert all(new != old for new, old in zip(shuffled[:5], images[:5])) and sorted(
        map(str, shuffled)
    ) == sorted(map(str, images))


def test_load_1_reads_a_transformers_directory(setup, vision_dir, tokenizer, tmp_path):
    folder, flags = setup
    model = small_model(n_heads=8)
    to_llava(model).save_pretrained(tmp_path / "llava")
    small_image_processor().save_pretrained(tmp_path / "llava")
    published = (
        tmp_path / "MiniMind2-V"
    )  # own key names, a config of its own type, code that must not run
    published.mkdir()
    torch.save(weights_to_save(model), published / "pytorch_model.bin")
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 8, "vocab_size": 672, "max_seq_len": 512}
    config = {"model_type": "minimind-v", "auto_map": {"AutoConfig": "evil.Config"}} | sizes
    (published / "config.json").write_text(json.dumps(config))
    ask = ["--image", folder / "pictures/a.png", "--prompt", "What?", "--temperature", "0"]
    answers = [run_script("eval_vlm.py", *flags, *ask).stdout.splitlines()[2]]
    for directory in (tmp_path / "llava", published):
        finished = run_script(
            "eval_vlm.py", "--load", "1", "--transformers_dir", directory, *flags, *ask
        )
        assert finished.returncode == 0, finished.stdout
        answers.append(finished.stdout.splitlines()[2])
    assert answers[0] == answers[1] == answers[2] != ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--model_mode", "0", "--dim", "512"], "error: no weights at"),
        (
            ["--n_layers", "3"],
            "is of dim 64 with 2 layers, not of dim 64 with 3: pass --dim 64 --n_layers 2",
        ),
        (["--images_dir", "nowhere"], "error: no folder nowhere: put pictures there"),
        (
            ["--load", "1", "--transformers_dir", "nowhere"],
            "error: no transformers directory at nowhere",
        ),
        (["--device", "cuda:7"], "error: --device cuda:7 cannot be used"),
    ],
)
def test_mistakes_cost_one_line(setup, changes, message):
    finished = run_script("eval_vlm.py", *setup[1], *changes)
    assert finished.returncode == 2 and message in finished.stdout.splitlines()[-1], finished.stdout


def test_the_web_page_starts_and_listens_on_this_machine_only(setup):
    _, flags = setup
    port = free_port()
    flags = [str(flag) for flag in flags if flag not in ("--max_new_tokens", "8")]
    server = start_script("web_demo_vlm.py", "--port", port, *flags, start_new_session=True)
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(
                    f"http://localhost:{port}/_stcore/health", timeout=2
                ) as reply:
                    assert reply.read() == b"ok"
                    break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail("no answer from the page")
        listening = open("/proc/net/tcp").read().splitlines()[1:]
        addresses = {
            line.split()[1].split(":")[0]
            for line in listening
            if line.split()[1].endswith(f":{port:04X}")
        }
        assert addresses <= {"0100007F"}, "listens beyond this machine"
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=20)


def test_the_web_page_answers_and_shows_errors(setup):
    from streamlit.testing.v1 import AppTest

    _, flags = setup
    flags = [str(flag) for flag in flags if flag not in ("--max_new_tokens", "8")]
    script = "import sys\nsys.argv = {argv!r}\nimport web_demo_vlm\nweb_demo_vlm.page(web_demo_vlm.parse_args())\n"
    page = AppTest.from_string(
        script.format(argv=["web_demo_vlm.py", *flags]), default_timeout=60
    ).run()
    assert not page.exception and page.title[0].value == "MiniMind-V"
    page.sidebar.slider[2].set_value(16).run()
    page.chat_input[0].set_value("What color?").run()
    assert not page.exception and [message.name for message in page.chat_message] == [
        "user",
        "assistant",
    ]
    page.chat_input[0].set_value("And now?").run()
    assert [message.name for message in page.chat_message] == ["user", "assistant"] * 2, (
        "the conversation goes on"
    )
    broken = AppTest.from_string(
        script.format(argv=["web_demo_vlm.py", *flags, "--dim", "128"]), default_timeout=60
    ).run()
    assert "no weights at" in broken.error[0].value
