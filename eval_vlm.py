"""Ask a trained model about pictures, or measure how well it answers.

python eval_vlm.py --load 0 --model_mode 1                      every picture in dataset/eval_images
python eval_vlm.py --image a.jpg --image b.jpg --prompt "What changes?"
python eval_vlm.py --chat --image a.jpg                         a dialogue that keeps the picture
python eval_vlm.py --data rows.jsonl --images_path folder       loss and exact-answer accuracy
"""

import argparse
import json
from pathlib import Path

from common.errors import BadSampleError, MissingFileError, UserError, list_reasons, run_command
from common.files import write_text
from dataset.mixture import open_data
from inference.chat import Chat
from inference.evaluate import (
    IMAGE_CHOICES,
    accuracy,
    answer_questions,
    collect_questions,
    mean_loss,
)
from inference.load import add_model_flags, add_sampling_flags, load_vlm
from inference.quantize import count_weights

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# The published questions, for one picture and for several.
PROMPTS = {1: "描述一下这个图像的内容。", 2: "比较一下两张图像的异同点。"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    group = parser.add_argument_group("what to ask")
    group.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture; repeat it to ask about several",
    )
    group.add_argument(
        "--prompt", help="the question (a request for a description where not given)"
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="type questions; /image FILE adds a picture, /new starts anew, /exit ends",
    )
    group.add_argument(
        "--images_dir", help="ask about each picture of a folder (dataset/eval_images); with --model_mode 2 about each of its "
        "folders of pictures (dataset/eval_multi_images)"
    )  # fmt: skip
    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--data", nargs="+", metavar="FILE", help="rows with known answers, .jsonl or .parquet"
    )
    group.add_argument(
        "--images_path",
        nargs="+",
        metavar="FOLDER",
        help="folder or .zip of the images that --data names",
    )
    group.add_argument(
        "--show_images",
        choices=IMAGE_CHOICES,
        default="right",
        help="give --data its images, those of other rows, or none",
    )
    group.add_argument("--batch_size", type=int, default=32, help="questions answered together")
    group.add_argument(
        "--save_report", help="write the scores and answers of --data to this JSON file"
    )
    add_model_flags(parser)
    add_sampling_flags(parser)
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f"--batch_size is {args.batch_size}: it has to be at least 1")
    return args


def main() -> None:
    args = parse_args()
    model, processor = load_vlm(args)
    print(
        f"model: {count_weights(model) / 1e6:.2f} M parameters without the vision tower, on {args.device}"
    )
    if args.data:
        measure(args, model, processor)
    elif args.chat:
        converse(args, Chat(model, processor))
    else:
        for images in [args.image] if args.image else list_pictures(args):
            print(f"\n[{', '.join(Path(image).name for image in images)}]")
            try:
                say_answer(
                    Chat(model, processor),
                    args.prompt or PROMPTS[min(len(images), 2)],
                    images,
                    args,
                )
            except BadSampleError as error:
                if args.image:  # asked for by name
                    raise
                print(f"skipped: {error}")


def list_pictures(args: argparse.Namespace) -> list[list[Path]]:
    """The pictures of a folder one by one; in --model_mode 2 those of each of its folders together."""
    several = args.model_mode == 2
    folder = Path(
        args.images_dir or ("dataset/eval_multi_images" if several else "dataset/eval_images")
    )
    if not folder.is_dir():
        raise MissingFileError(
            f"no folder {folder}: put pictures there, or pass --image FILE or --images_dir FOLDER"
        )
    groups = (
        [pictures_in(path) for path in sorted(folder.iterdir()) if path.is_dir()] if several else []
    )
    groups = [group for group in groups if group] or [[picture] for picture in pictures_in(folder)]
    if not groups:
        raise MissingFileError(f"no pictures in {folder}: put some there, or pass --image FILE")
    return groups


def pictures_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)


def say_answer(chat: Chat, prompt: str, images: list, args: argparse.Namespace) -> None:
    """Print the answer as it comes, then how fast it came. BadSampleError where a picture cannot be read."""
    sampling = dict(
        temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens
    )
    for piece in chat.ask(prompt, images, **sampling):
        print(piece, end="", flush=True)
    print(
        f"\n({chat.tokens_per_second:.1f} tokens/s, first token after {chat.seconds_to_first_token:.2f} s)"
    )


def converse(args: argparse.Namespace, chat: Chat) -> None:
    print("Ask away. /image FILE adds a picture, /new starts anew, /exit ends.")
    waiting = list(args.image)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/new":
            chat, waiting = Chat(chat.model, chat.processor), []
        elif line.startswith("/image "):
            path = line.removeprefix("/image ").strip()
            if Path(path).is_file():
                waiting.append(path)
            else:
                print(f"no file {path}")
        elif line.startswith("/"):
            print("/image FILE adds a picture, /new starts anew, /exit ends")
        elif line:
            try:
                say_answer(chat, line, waiting, args)
            except UserError as error:
                print(error)
            waiting = []


def measure(args: argparse.Namespace, model, processor) -> None:
    dataset = open_data(args.data, args.images_path, processor, args.max_seq_len)
    if dataset.skipped:
        print(f"left out: {list_reasons(dataset.skipped)}")
    questions, unreadable = collect_questions(dataset, args.show_images)
    questions, not_asked = answer_questions(
        model, processor, questions, args.batch_size, f"answer ({args.show_images} images)"
    )
    if unreadable or not_asked:
        print(f"not asked: {list_reasons(unreadable + not_asked)}")
    if not questions:
        raise UserError(f"no question of {' '.join(args.data)} could be asked")
    scores = accuracy(questions)
    report = {"images": args.show_images, "questions": len(questions), "accuracy": scores}
    if args.show_images == "right":
        report["loss"] = mean_loss(model, dataset)
        print(f"loss: {report['loss']:.4f} nats a label token")
    for name, score in scores.items():
        print(f"exact answers, {name}: {100 * score:.1f} %")
    if args.save_report:
        report["answers"] = [
            {
                "type": q.type,
                "question": q.turns[-1]["content"],
                "answer": q.answer,
                "given": q.given,
                "images": [str(i) for i in q.images],
            }
            for q in questions
        ]
        write_text(Path(args.save_report), json.dumps(report, ensure_ascii=False, indent=1))
        print(f"report: {args.save_report}")


if __name__ == "__main__":
    run_command(main)
