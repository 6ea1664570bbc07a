"""Ask a trained model about pictures, or measure how well it answers.

python eval_vlm.py --model_mode 1                      # every picture in dataset/eval_images
python eval_vlm.py --weights out/mine_512.pth --image a.jpg --prompt "What is this?"
python eval_vlm.py --image a.jpg b.jpg --prompt "What changes?"
python eval_vlm.py --image a.jpg --attention out.png   # and what each word of the answer looked at
python eval_vlm.py --chat --image a.jpg                # a dialogue that keeps the picture
python eval_vlm.py --data rows.jsonl --images_path folder  # loss and exact-answer accuracy
python eval_vlm.py --data rows.jsonl --images_path folder --metrics  # and scores of captions
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import BadSampleError, MissingFileError, UserError, list_reasons, run_command
from common.files import IMAGE_SUFFIXES
from common.flags import parse_flags
from common.threads import describe_threads
from dataset.mixture import find_sources, open_data
from inference.config import EvalConfig
from inference.paths import find_model
from model.files import find_own, read_info

if TYPE_CHECKING:
    from inference import VLM
    from inference.chat import Chat

# The published questions about one picture, and about several.
PROMPT, PROMPT_FOR_SEVERAL = "描述一下这个图像的内容。", "比较一下两张图像的异同点。"
# Of --chat.
COMMANDS = "/image FILE adds a picture, /new starts anew, Ctrl-C stops an answer, /exit ends"


def main() -> None:
    # Flags and files are checked before PyTorch and transformers, which take seconds to import.
    config = parse_flags(EvalConfig(), __doc__)
    model = find_model(config)
    groups = find_pictures(config)
    if config.data:
        find_sources(config.data, config.images_path)
    from inference import load_vlm
    from inference.quantize import count_weights

    vlm = load_vlm(**model)
    n_weights, device = count_weights(vlm.model.config), vlm.model.tok_embeddings.weight.device
    threads = f" with {describe_threads()}" if device.type == "cpu" else ""
    print(
        f"model: {vlm.weights}, {n_weights / 1e6:.2f} M parameters without the vision encoder, "
        f"on {device}{threads}"
    )
    if config.data:
        measure(config, vlm)
    elif config.chat:
        converse(config, vlm)
    else:
        ask_about_all(config, vlm, groups)


def find_pictures(config: EvalConfig) -> list[list[Path]]:
    """The pictures to ask about, those of one question together.

    MissingFileError where one that is asked for by name is missing, or there are none.
    """
    pictures = [Path(image) for image in config.image]
    for picture in pictures:
        if not picture.is_file():
            raise MissingFileError(f"no picture {picture}: correct --image")
    if pictures or config.data or config.chat:
        return [pictures]

    # a folder: each picture, or those of each folder in it
    has_several = config.model_mode == 2
    default = "dataset/eval_multi_images" if has_several else "dataset/eval_images"
    folder = Path(config.images_dir) if config.images_dir else find_own(default)
    if not folder.is_dir():
        raise MissingFileError(
            f"no folder {folder}: put pictures there, or pass --image FILE or --images_dir FOLDER"
        )
    groups = []
    if has_several:
        groups = [list_pictures(path) for path in sorted(folder.iterdir()) if path.is_dir()]
        groups = [group for group in groups if group]
    groups = groups or [[picture] for picture in list_pictures(folder)]
    if not groups:
        raise MissingFileError(f"no pictures in {folder}: put some there, or pass --image FILE")
    return groups


def list_pictures(folder: Path) -> list[Path]:
    """Its pictures, by their names."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def ask_about_all(config: EvalConfig, vlm: VLM, groups: list[list[Path]]) -> None:
    """Ask the same question about each group of pictures: one that the model was trained on.

    With --attention, what it looked at is drawn afterwards. UserError where none can be read.
    """
    chats, n_skipped = [], 0
    for pictures in groups:
        print(f"\n[{', '.join(picture.name for picture in pictures)}]", flush=True)
        name, published = "question", PROMPT
        if len(pictures) > 1:
            name, published = "question_for_several", PROMPT_FOR_SEVERAL
        prompt = config.prompt or read_info(vlm.weights).get(name) or published
        try:
            chat = vlm.start_chat()
            print_answer(config, chat, prompt, pictures)
            chats.append((chat, pictures))
        except BadSampleError as error:
            # A picture that was named has to be readable; one of a folder is left out.
            if config.image:
                raise
            print(f"skipped: {error}")
            n_skipped += 1
    if n_skipped == len(groups):
        raise UserError("none of these pictures could be read")
    if config.attention:
        draw_attention(vlm, chats, Path(config.attention))


def draw_attention(vlm: VLM, chats: list[tuple[Chat, list[Path]]], path: Path) -> None:
    """Write a .png of what the model looked at when it answered.

    Args:
        vlm: the model.
        chats: one question and answer each, with the pictures.
        path: of the .png.

    UserError where all answers are empty.
    """
    from inference.attention_page import look_at_answer, write_page

    answers = []
    for chat, pictures in chats:
        question, answer = chat.turns
        # nothing was said, so there is nothing to draw
        if answer["content"].strip():
            pixel_values = vlm.processor.preprocess(pictures)
            features = chat.image_features
            looked = look_at_answer(vlm, [question], answer["content"], pixel_values, features)
            answers.append(looked)
    if not answers:
        raise UserError(f"nothing to draw to {path}: the model answered without a word")
    write_page(path, answers)
    print(f"attention: {path}")


def print_answer(config: EvalConfig, chat: Chat, prompt: str, pictures: list) -> None:
    """Print the answer as it comes, then how fast it came.

    Args:
        config: has the options of sampling.
        chat: the conversation so far.
        prompt: the question.
        pictures: new ones.

    BadSampleError where a picture cannot be read.
    """
    for piece in chat.ask(prompt, pictures, **config.sampling):
        print(piece, end="", flush=True)
    print(
        f"\n({chat.tokens_per_second:.1f} tokens/s, first token after "
        f"{chat.seconds_to_first_token:.2f} s)"
    )


def converse(config: EvalConfig, vlm: VLM) -> None:
    """Answer what is typed until /exit, or the end of the input; a mistake costs one line."""
    from inference.chat import NO_PICTURE, PICTURE_SIDE
    from model.image import load_image

    print(f"Ask away. {COMMANDS}.")
    chat, new_pictures = vlm.start_chat(), [load_image(path, PICTURE_SIDE) for path in config.image]
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        try:
            if line == "/exit":
                return
            if line == "/new":
                chat, new_pictures = vlm.start_chat(), []
            elif line.startswith("/image "):
                path = line.removeprefix("/image ").strip()
                new_pictures.append(load_image(path, PICTURE_SIDE))
            elif line.startswith("/") or not line:
                print(COMMANDS)
            elif not (chat.n_images or new_pictures):
                print(f"{NO_PICTURE} (/image FILE)")
            else:
                n_before = len(chat.exchanges)
                try:
                    print_answer(config, chat, line, new_pictures)
                except KeyboardInterrupt:
                    print("\n(stopped)")
                # A question that came to nothing leaves its pictures to the next one.
                if len(chat.exchanges) > n_before:
                    new_pictures = []
        except UserError as error:
            print(error)


def measure(config: EvalConfig, vlm: VLM) -> None:
    """Print how well rows with known answers are answered."""
    from inference.evaluate import Evaluation
    from inference.metrics import check_package
    from inference.questions import NO_TYPE, choose_requests, count_unmoved
    from inference.report import find_captions, make_reports, print_reports, save_answers
    from inference.report_page import save_reports

    # read
    max_length = vlm.model.config.max_seq_len
    dataset = open_data(config.data, config.images_path, vlm.processor, max_length)
    print(f"format: {', '.join(dataset.formats)}")
    if dataset.repaired:
        print(f"repaired: {list_reasons(dataset.repaired)}")
    if dataset.skipped:
        print(f"left out: {list_reasons(dataset.skipped)}")
    requests = choose_requests(config.prompt, read_info(vlm.weights).get("question"))
    evaluation = Evaluation(vlm, dataset, config.batch_size, requests, **config.sampling)
    questions = evaluation.collect()
    if config.metrics and find_captions(questions):
        check_package()

    with save_answers(config.save_report) as save_answer:
        # ask; a question that cannot be asked with one choice of images counts for none
        for images in config.shown:
            for question in evaluation.answer(questions, images):
                save_answer(question, images)
            questions = [question for question in questions if images in question.given]
        for images in config.shown:
            if config.metrics or images == "right":
                evaluation.measure_loss(questions, images)
                questions = [question for question in questions if images in question.loss]

        # say what was not as it should be
        if evaluation.left_out.reasons:
            print(f"not asked: {evaluation.left_out}")
        if evaluation.untyped.reasons:
            print(f"of type {NO_TYPE}: {evaluation.untyped}")
        if not questions:
            raise UserError(f"no question of {' '.join(config.data)} could be asked")
        if "wrong" in config.shown and (n_unmoved := count_unmoved(questions)):
            print(f"wrong image: {n_unmoved} questions got their own, since there is no other")

        # score
        reports = make_reports(questions, config.shown, config.metrics)
        print_reports(reports)

        # report
        if config.save_report:
            path = Path(config.save_report)
            save_reports(path, reports, questions, dataset, vlm.weights, config.data)


if __name__ == "__main__":
    run_command(main)
