"""A web page to talk with a model about pictures.

    python web_demo_vlm.py --out_dir out/demo        # then open http://localhost:8000

The page itself is inference/web/page.py; here Streamlit is started, and examples are found.
"""

import importlib.util
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice, product
from typing import TYPE_CHECKING

from common.errors import BadSampleError, MissingFileError, UserError, run_command
from common.flags import parse_flags
from inference.config import MAX_UPLOAD_MB, WebConfig
from inference.paths import find_model, list_models
from model.files import find_own, find_tokenizer, find_vision_model

if TYPE_CHECKING:
    from inference.web.gallery import Example
    from inference.web.models import ModelEntry

DEFAULTS = WebConfig(max_new_tokens=256)
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
MAX_MESSAGE_MB = 64  # between the page and a browser
# Examples that are tried: scenes of each type of question, rows of a file.
SCENES_TRIED, ROWS_TRIED = 4, 100
# Colors of the page, light and dark.
THEMES = {
    "light": {
        "primaryColor": "#0f766e",
        "backgroundColor": "#fdfdfc",
        "secondaryBackgroundColor": "#f3f3f0",
        "textColor": "#20262b",
    },
    "dark": {
        "primaryColor": "#2aa79b",
        "backgroundColor": "#15181b",
        "secondaryBackgroundColor": "#212529",
        "textColor": "#e6e8ea",
    },
}


def main() -> None:
    config = parse_flags(DEFAULTS, __doc__)
    # Streamlit runs this file again, in a process of its own.
    if "streamlit" in sys.modules:
        from inference.web.page import show_page

        show_page(config, find_examples)
        return

    # Flags and files are checked before Streamlit starts.
    check_files(config)
    if importlib.util.find_spec("streamlit") is None:
        raise UserError("the web page needs Streamlit: pip install streamlit")
    sys.exit(serve(config))


def check_files(config: WebConfig) -> None:
    """MissingFileError for what the flags name and is not there; of --out_dir any model will do.

    Where nothing is named and nothing was trained it is the demo's model, and a line says so.
    """
    # the other parts, if they are named
    if config.tokenizer:
        find_tokenizer(config.tokenizer)
    if config.vision_model:
        find_vision_model(config.vision_model)

    # the model
    chosen = ("weights", "load", "model_mode", "dim", "backend")
    is_named = any(getattr(config, name) != getattr(DEFAULTS, name) for name in chosen)
    if not is_named and list_models(find_own(config.out_dir)):
        return
    try:
        find_model(config)
    except MissingFileError:
        if is_named or config.out_dir != DEFAULTS.out_dir:
            raise
        from inference.web.models import ModelShelf

        entry = ModelShelf(config).default()
        print(f"no weights in {config.out_dir}/: this is {entry.path}", flush=True)


def serve(config: WebConfig) -> int:
    """Start Streamlit on this very file; returns its exit status."""
    # what is safe where others can reach the page, and quiet
    options = {
        "server.address": config.host,
        "server.port": config.port,
        "server.headless": "true",
        "server.enableXsrfProtection": "true",
        "server.maxUploadSize": MAX_UPLOAD_MB,
        "server.maxMessageSize": MAX_MESSAGE_MB,
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",
        "logger.hideWelcomeMessage": "true",
        "logger.level": "warning",
    }
    for theme, colors in THEMES.items():
        options |= {f"theme.{theme}.{name}": color for name, color in colors.items()}
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "streamlit", "run", *flags, __file__, "--", *sys.argv[1:]]

    # start
    if config.host not in LOCAL_HOSTS:
        print(
            f"warning: --host {config.host}: everybody who can reach this machine can use the page "
            "and load the models it lists; there is no password",
            file=sys.stderr,
            flush=True,
        )
    print(f"starting on http://{config.host}:{config.port} (Ctrl-C ends it)", flush=True)
    process = subprocess.Popen(command)
    # Who ends this process means the page; Ctrl-C reaches both.
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        return 0


def find_examples(config: WebConfig, entry: "ModelEntry") -> "Iterator[Example]":
    """Examples to try with a model: rows of --examples, or scenes if it was trained on them."""
    if config.examples:
        return read_examples(config)
    return draw_examples() if entry.knows == "scenes" else iter(())


def draw_examples(seed: int = 0) -> "Iterator[Example]":
    """Scenes that no training has met, with a question of each type in each language."""
    from dataset.scenes.scene import Scene, draw_scene
    from dataset.scenes.text import LANGUAGES, PAIR_TYPES
    from dataset.scenes.write import EVAL_TYPES, eval_row
    from inference.web.conversation import Picture
    from inference.web.gallery import Example

    pictures: dict[Scene, Picture] = {}
    kinds = (*EVAL_TYPES, *PAIR_TYPES)
    for language, attempt, kind in product(LANGUAGES, range(SCENES_TRIED), kinds):
        # the same scene in each language
        rng = random.Random(f"{seed}-example-{attempt}-{kind}")
        row, scenes = eval_row(rng, language, kind)
        question, answer = (turn["content"] for turn in row["conversations"])
        for scene in scenes:
            if scene not in pictures:
                pictures[scene] = Picture.open(f"{kind}.png", draw_scene(scene))
        shown = tuple(pictures[scene] for scene in scenes)
        yield Example(drop_tags(question), shown, answer, language, kind)


def read_examples(config: WebConfig) -> "Iterator[Example]":
    """The first question of each row; a row that cannot be used is left out."""
    from dataset.mixture import find_sources
    from dataset.rows import open_rows
    from inference.web.conversation import Picture
    from inference.web.gallery import Example
    from model.processing import check_conversation

    for source in find_sources(config.examples, config.examples_images):
        rows = open_rows(source.path, source.images)
        for key, _, row in islice(rows.scan(), ROWS_TRIED):
            try:
                if isinstance(row, BadSampleError):
                    raise row
                (_, question), (_, answer) = check_conversation(row.conversations)[:2]
                pictures = [Picture.open(f"{key}", image) for image in rows.images(row)]
            except (BadSampleError, ValueError) as error:
                print(f"examples: left out, {error}", flush=True)
                continue
            question = drop_tags(question)
            language = guess_language(question)
            yield Example(question, tuple(pictures), answer, language, f"{source.path} {key}")


def drop_tags(question: str) -> str:
    """A question as a visitor would type it."""
    from common.text import IMAGE_TAG

    return question.replace(IMAGE_TAG, "").strip()


def guess_language(text: str) -> str:
    """ "ja" for a text with kana, "zh" for one with other Chinese characters, else "en"."""
    if any("\u3040" <= character <= "\u30ff" for character in text):
        return "ja"
    return "zh" if any("\u4e00" <= character <= "\u9fff" for character in text) else "en"


if __name__ == "__main__":
    run_command(main)
