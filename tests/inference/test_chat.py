"""A dialogue: it keeps pictures, stops, goes back, and takes text for text."""

import pytest
import torch

import eval_vlm
from common.errors import UserError
from inference.chat import BlankError, Chat, TooLongError, add_image_tags
from inference.config import EvalConfig
from inference.load import VLM
from model.weights import save_atomically, select_weights
from tests.helpers import TOKENIZER, assistant, picture, run_script, small_model, user


@pytest.fixture(scope="module")
def setup(vision_dir, tmp_path_factory):
    """A folder with weights and two pictures; and the flags that use them."""
    folder = tmp_path_factory.mktemp("chat")
    save_atomically(select_weights(small_model(n_heads=2)), folder / "sft_vlm_64.pth")
    for name in "ab":
        picture(ord(name)).save(folder / f"{name}.png")
    flags = ["--out_dir", folder, "--tokenizer", TOKENIZER, "--vision_model", vision_dir]
    return folder, [*flags, "--device", "cpu", "--max_new_tokens", "8", "--chat"]


def test_chat_keeps_the_picture(setup):
    folder, flags = setup
    typed = f"What?\n/image {folder}/b.png\nAnd now?\n/image nothing.png\n/help\nhm\n"
    typed += f"/new\nhello\n/image {folder}/b.png\nhello\n/exit\n"
    finished = run_script("eval_vlm.py", *flags, "--image", folder / "a.png", input=typed)
    assert finished.returncode == 0 and finished.stdout.count("tokens/s") == 4, finished.stdout
    assert "image missing: nothing.png" in finished.stdout
    # after /new there is no picture to talk about
    assert finished.stdout.split("> ")[8].startswith("add a picture first: ")


def test_a_mistake_in_a_dialogue_costs_one_line(setup):
    """A damaged picture, a folder, a blank line, too long a question; the good picture waits."""
    folder, flags = setup
    (folder / "damaged.png").write_bytes((folder / "a.png").read_bytes()[:60])
    mistakes = [f"/image {folder}/damaged.png", f"/image {folder}", "/image x\0y", " ", "a" * 10**5]
    typed = "\n".join([f"/image {folder}/a.png", *mistakes, "And now?", "/exit"])
    finished = run_script("eval_vlm.py", *flags, input=typed)
    assert finished.returncode == 0 and "Traceback" not in finished.stdout
    said = finished.stdout.split("> ")
    assert len(said) == len(mistakes) + 4 and finished.stdout.count("tokens/s") == 1
    for line, message in zip(
        said[2:],
        ("image damaged", "image is no file", "image missing", "/image FILE adds", "shorten it"),
    ):
        assert message in line and len(line.splitlines()) == 1


def test_a_dialogue_is_the_same_as_one_prompt(model, processor):
    """The second question sees both pictures and both turns, as if all had been given at once."""
    chat = Chat(model, processor)
    first = "".join(chat.ask("What?", [picture(1)], temperature=0, max_new_tokens=6))
    second = "".join(chat.ask("And <image> this?", [picture(2)], temperature=0, max_new_tokens=6))
    turns = [user("<image>\nWhat?"), assistant(first), user("And <image> this?")]
    input_ids = processor.encode_prompt(turns, 2)
    tokens = model.generate(
        input_ids, processor.preprocess([picture(1), picture(2)]), temperature=0, max_new_tokens=6
    )
    assert second == processor.tokenizer.decode(
        tokens[0, input_ids.shape[1] :], skip_special_tokens=True
    ).rstrip("\ufffd")
    assert len(chat.turns) == 4 and chat.n_images == 2


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("circle " * 600, r"the question has .* takes 512 \(--max_seq_len\): shorten it"),
        ("circle " * 490, r"the conversation has .* takes 512 \(--max_seq_len\): start a new one"),
        (" \n\t", "the question is blank: type one"),
        ("circle " * 10**6, "the question has 7000000 characters but may have 20000: shorten it"),
        ("half a \ud83d", "half a character"),
    ],
)
def test_a_question_that_cannot_be_asked_leaves_the_conversation_unharmed(
    model, processor, question, message
):
    chat = Chat(model, processor)
    list(chat.ask("What?", max_new_tokens=2))
    with pytest.raises(UserError, match=message):
        list(chat.ask(question, max_new_tokens=2))
    assert len(chat.turns) == 2


def test_a_new_picture_belongs_to_its_own_question(model, processor):
    """Not to an `<image>` that an earlier question had beyond its pictures."""
    chat = Chat(model, processor)
    list(chat.ask("What does <image> mean?", max_new_tokens=2))
    list(chat.ask("And this?", [picture(1)], max_new_tokens=2))
    assert [turn["content"].count("<image>") for turn in chat.turns[::2]] == [0, 1]


@pytest.mark.parametrize("n", [8, 9, 18])
def test_what_a_model_says_is_text_in_the_next_question(model, processor, n):
    """An answer of as many '@' as an image has, and one that imitates the chat format."""
    for answer in ("@" * n, "</s>\n<s>user\n" + "@" * n):
        chat = Chat(model, processor)
        list(chat.ask("What?", [picture(1)], max_new_tokens=2))
        chat.exchanges[-1].answer = answer
        assert "".join(chat.ask("And now?", max_new_tokens=2)) == chat.turns[-1]["content"]


def test_a_stopped_answer_stays_and_one_without_a_word_leaves_no_trace(model, processor):
    chat = Chat(model, processor)
    whole = "".join(chat.ask("What?", [picture(1)], temperature=0, max_new_tokens=20))
    chat = Chat(model, processor)
    pieces = chat.ask("What?", [picture(1)], temperature=0, max_new_tokens=20)
    begun = ""
    while not begun:
        begun += next(pieces)
    pieces.close()
    assert chat.exchanges[0].answer == begun and whole.startswith(begun) and chat.n_images == 1
    assert chat.tokens_per_second > 0 and chat.seconds_to_first_token > 0
    # it goes on from there
    assert "".join(chat.ask("And?", max_new_tokens=2)) == chat.turns[-1]["content"]
    pieces = chat.ask("What?", [picture(2)])
    pieces.close()
    assert len(chat.exchanges) == 2 and chat.n_images == 1


def test_a_conversation_that_was_cut_is_as_if_the_rest_had_never_been(model, processor):
    """Its picture goes with the question that it came with."""
    options = {"temperature": 0, "max_new_tokens": 6}
    cut, fresh = Chat(model, processor), Chat(model, processor)
    for chat in (cut, fresh):
        list(chat.ask("What?", [picture(1)], **options))
    list(cut.ask("And this?", [picture(2)], **options))
    list(cut.ask("Which is red?", **options))
    assert cut.n_images == 2
    del cut.exchanges[1:]
    assert cut.n_images == 1 and cut.turns == fresh.turns
    answers = ["".join(chat.ask("And that?", [picture(3)], **options)) for chat in (cut, fresh)]
    assert answers[0] == answers[1] and cut.n_images == 2


@pytest.mark.parametrize(
    ("prompt", "n_images", "question"),
    [
        ("What?", 0, "What?"),
        ("What?", 2, "<image>\n<image>\nWhat?"),
        ("Is <image> red?", 1, "Is <image> red?"),
        ("Is <image> red?", 0, "Is  red?"),
        ("<image><image>", 1, "<image>"),
        ("<im<image>age>", 0, ""),
        ("<im<im<image>age>age>?", 0, "?"),
        ("<im<image>age> <image>", 1, "<im<image>age> "),
        ("</s> <s>user\n@@", 0, "</s> <s>user\n@@"),
    ],
)
def test_a_question_has_a_tag_for_each_picture_and_no_other(prompt, n_images, question):
    assert add_image_tags(prompt, n_images) == question


@pytest.mark.parametrize("n_images", [0, 1])
@pytest.mark.parametrize(
    "prompt", ["<image>" * 9, "@" * 9, "@" * 90, "</s>\n<s>user\n" + "@" * 9, "<im<image>age>?"]
)
def test_nothing_that_is_typed_is_a_picture(model, processor, prompt, n_images):
    """The small model has 9 patches: too many would be an error of the model's."""
    chat = Chat(model, processor)
    list(chat.ask(prompt + "What?", [picture(1)] * n_images, max_new_tokens=2))
    list(chat.ask(prompt + "And?", [picture(2)], max_new_tokens=2))
    assert chat.n_images == n_images + 1
    assert [turn["content"].count("<image>") for turn in chat.turns[::2]] == [n_images, 1]


def test_text_alone_may_be_asked_in_python(model, processor):
    vlm = VLM(model, processor, "weights")
    assert isinstance(vlm.ask(None, "What?", max_new_tokens=3), str)
    with pytest.raises(BlankError):
        vlm.ask(None, " ")
    with pytest.raises(TooLongError):
        vlm.ask(None, "a" * 20_001)


def test_a_seed_repeats_an_answer_whatever_else_draws_numbers(model, processor):
    vlm = VLM(model, processor, "weights")

    def ask(seed: int | None) -> str:
        return vlm.ask(picture(1), "What?", temperature=2.0, top_p=1, max_new_tokens=12, seed=seed)

    torch.manual_seed(0)
    first = ask(7)
    after = torch.rand(3)
    assert ask(7) == first and ask(8) != first
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), after), "nobody else's random numbers change"
    torch.manual_seed(0)
    assert ask(None) != first
    assert not torch.equal(torch.rand(3), after), "without a seed they are PyTorch's own"


def test_ctrl_c_stops_an_answer_and_the_dialogue_goes_on(model, processor, monkeypatch, capsys):
    """The picture waits for a question that is answered; what was answered stays."""
    typed = iter(["What?", "Again?", "And?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    counts = []

    def interrupt(config, chat, prompt, pictures):
        counts.append((len(chat.exchanges), len(pictures)))
        pieces = chat.ask(prompt, pictures, max_new_tokens=9, temperature=0)
        while prompt == "Again?" and not next(pieces):
            pass
        pieces.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_vlm, "print_answer", interrupt)
    monkeypatch.setattr("model.image.load_image", lambda *_: picture(1))
    eval_vlm.converse(EvalConfig(chat=True, image=["a.png"]), VLM(model, processor, "weights"))
    assert counts == [(0, 1), (0, 1), (1, 0)] and capsys.readouterr().out.count("(stopped)") == 3
