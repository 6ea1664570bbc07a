"""The models that the page offers, and those of them that are in memory."""

from __future__ import annotations

import gc
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from inference.config import WebConfig
from inference.paths import (
    RUN_OPTIONS,
    choose_weights,
    find_model_files,
    list_model_paths,
    read_scores,
)
from model.files import is_demo_encoder

if TYPE_CHECKING:
    from inference.load import VLM

MOST_OPEN = 2  # models in memory
STAGES = ("sft", "sft_multi", "pretrain")  # the best first
# In a file name of the published form.
_NAME = re.compile(r"(?P<stage>pretrain|sft)_vlm(?P<several>_multi)?(_best)?_(?P<dim>\d+)")
# The output head has the weights of the embeddings, the second layer of a LLaVA's projector none
# of its own.
_NOT_COUNTED = re.compile(r"^(output|lm_head|vision_encoder)\.|vision_tower\.|\.linear_2\.")


@dataclass(frozen=True)
class ModelEntry:
    """What the page says of a model.

    Args:
        name: of its file or directory; each is there once.
        path: where it is.
        n_parameters: without the vision encoder; None if that cannot be told.
        n_bytes: on disk.
        trained_at: when the file was written.
        stage: "pretrain", "sft" or "sft_multi" (several pictures); "" if that is not known.
        score: the part of answers that were exactly right, and what else is known: exact, cider,
            data, questions, date; None if it was not measured.
        knows: "scenes" if its vision encoder has seen nothing but the demo's drawn shapes.
        problem: why it cannot be opened; None if nothing is known against it.
        version: changes when it does, by itself or as its JSON describes it.
    """

    name: str
    path: Path
    n_parameters: int | None = None
    n_bytes: int = 0
    trained_at: datetime | None = None
    stage: str = ""
    score: dict[str, Any] | None = None
    knows: str | None = None
    problem: str | None = None
    version: tuple = ()


@dataclass
class OpenModel:
    """A model in memory, and how many are working with it."""

    vlm: VLM
    n_users: int = 0


class ModelShelf:
    """Lists the models that the flags name, opens them on demand and keeps a few in memory.

    Args:
        config: --weights, --out_dir and --transformers_dir say where models are; --tokenizer,
            --vision_model, --max_seq_len, --device and --dtype are for all of them.
        most_open: models that are in memory at a time, those in use not counted out.
    """

    def __init__(self, config: WebConfig, most_open: int = MOST_OPEN):
        self.config, self.most_open = config, most_open
        self._described: dict[Path, ModelEntry] = {}
        # What came out when a model was opened, by path and version.
        self._problems: dict[tuple, str] = {}
        self._open: OrderedDict[tuple, OpenModel] = OrderedDict()
        # Held while a model is loaded, so that two who want it load it once.
        self._lock = RLock()

    # What there is.

    def list(self) -> list[ModelEntry]:
        """All models, as they are on disk now; those that cannot be opened have a problem."""
        entries = [self._describe(path) for path in list_model_paths(self.config)]
        # two of one name are told apart by their folders
        counts = Counter(entry.name for entry in entries)
        return [
            replace(entry, name=str(entry.path)) if counts[entry.name] > 1 else entry
            for entry in entries
        ]

    def _describe(self, path: Path) -> ModelEntry:
        """The entry of a model, whose file is looked at again if it changes or was not in order."""
        version = read_version(path)
        entry = self._described.get(path)
        if entry is None or entry.version != version or entry.problem:
            entry = describe_model(self.config, path, version)
            self._described[path] = entry
        problem = entry.problem or self._problems.get((path, version))
        return replace(entry, problem=problem, score=read_scores(path) or None)

    def default(self) -> ModelEntry:
        """The model that the flags name, or the best there is; UserError where none can be used."""
        entries = self.list()
        try:
            path = find_model_files(choose_weights(self.config), dim=self.config.dim).weights
            named = [entry for entry in entries if entry.path.resolve() == path.resolve()]
        except UserError:
            named = []
        usable = [entry for entry in entries if not entry.problem]
        usable.sort(key=lambda entry: STAGES.index(entry.stage) if entry.stage in STAGES else 9)
        for entry in (*named, *usable):
            return entry
        problems = [entry.problem for entry in entries] or ["there is none"]
        raise UserError(f"no model can be opened here: {'; '.join(problems)}")

    def choose_for(
        self, n_pictures: int, chosen: ModelEntry | None = None
    ) -> tuple[ModelEntry, ModelEntry | None]:
        """The model for a conversation about so many pictures.

        Args:
            n_pictures: of the whole conversation.
            chosen: by the visitor; None if it is left to us.

        Returns (the model, one beside it that has learned to compare pictures: only where there
        are several, and the visitor chose another).
        """
        entry = chosen or self.default()
        better = self._find_multi(entry) if n_pictures > 1 else None
        return (better or entry, None) if chosen is None else (entry, better)

    def _find_multi(self, entry: ModelEntry) -> ModelEntry | None:
        """sft_vlm_multi_512.pth for sft_vlm_512.pth in the same folder."""
        parts = _NAME.fullmatch(entry.path.stem)
        if entry.stage != "sft" or not parts:
            return None
        path = entry.path.with_name(f"sft_vlm_multi_{parts['dim']}.pth")
        beside = (other for other in self.list() if other.path == path and not other.problem)
        return next(beside, None)

    # What is open.

    def is_open(self, entry: ModelEntry) -> bool:
        """Whether `using` has nothing to load."""
        return (entry.path, entry.version) in self._open

    @contextmanager
    def using(self, entry: ModelEntry) -> Iterator[VLM]:
        """The model, which stays in memory at least that long. UserError if it cannot be opened."""
        with self._lock:
            opened = self._get(entry)
            opened.n_users += 1
        try:
            yield opened.vlm
        finally:
            with self._lock:
                opened.n_users -= 1

    def open(self, entry: ModelEntry) -> VLM:
        """The same for who works with it alone, as tests and scripts do."""
        with self.using(entry) as vlm:
            return vlm

    def _get(self, entry: ModelEntry) -> OpenModel:
        # in memory
        key = (entry.path, entry.version)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        # make room first: both at once may be too much
        for other, opened in list(self._open.items()):
            if len(self._open) < self.most_open:
                break
            if not opened.n_users:
                del self._open[other], opened
        gc.collect()

        # load
        from inference.load import load_vlm

        names = ("tokenizer", "vision_model", *RUN_OPTIONS)
        options = {name: getattr(self.config, name) for name in names}
        try:
            self._open[key] = OpenModel(load_vlm(entry.path, **options))
        except UserError as error:
            # So the list shows it until the file changes.
            self._problems[key] = str(error)
            raise
        # Streamlit looks through all objects for garbage after each click, 0.6 s in which no answer
        # goes on. A model and what was imported for it are none; without users it is freed anyway.
        gc.freeze()
        return self._open[key]


def read_version(path: Path) -> tuple:
    """Changes when a model does, or the JSON that describes it."""
    version = []
    for file in (path, path.with_suffix(".json"), path / "config.json", path / "model.safetensors"):
        with suppress(OSError):
            status = file.stat()
            version += [file.name, status.st_mtime_ns, status.st_size]
    return tuple(version)


def describe_model(config: WebConfig, path: Path, version: tuple) -> ModelEntry:
    """Look at a model without loading it."""
    is_folder = path.is_dir()
    entry = ModelEntry(path.name if is_folder else path.stem, path, version=version)
    try:
        # on disk
        files = [file for file in path.iterdir() if file.is_file()] if is_folder else [path]
        trained_at = datetime.fromtimestamp(max(file.stat().st_mtime for file in files))
        entry = replace(
            entry, n_bytes=sum(file.stat().st_size for file in files), trained_at=trained_at
        )
        # what it brings along
        parts = find_model_files(path, config.tokenizer, config.vision_model)
        entry = replace(
            entry,
            stage=name_stage(entry.name, parts.info),
            knows="scenes" if parts.vision_model and is_demo_encoder(parts.vision_model) else None,
        )
        return replace(entry, n_parameters=count_parameters(path))
    except UserError as error:
        return replace(entry, problem=str(error))
    except OSError as error:
        return replace(entry, problem=f"{path} cannot be read ({error.strerror})")


def count_parameters(path: Path) -> int | None:
    """Of a .pth file or a transformers directory, without the vision encoder; None for graphs.

    Only shapes are read. UserError where that already shows that it is no model that sees.
    """
    from inference.load import check_eyes
    from model.tensor_files import read_tensors
    from model.weights import read_sizes, read_weights

    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files and (path / "onnx").is_dir():
            return None
        weights = {}
        for file in files:
            weights |= read_tensors(file, only_shapes=True)
    else:
        weights = read_weights(path, only_shapes=True)
        read_sizes(weights, path)
        check_eyes(weights, path)
    return sum(weight.numel() for name, weight in weights.items() if not _NOT_COUNTED.search(name))


def name_stage(name: str, info: dict) -> str:
    """What a model was trained for last: by its JSON, else by its name; "" if neither says it."""
    parts = _NAME.fullmatch(name)
    stage = info.get("stage") or (parts and parts["stage"]) or ""
    has_several = "question_for_several" in info or "_multi" in name
    return "sft_multi" if stage == "sft" and has_several else stage
