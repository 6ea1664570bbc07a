"""What a run lets one watch: curve, sample answers, TensorBoard, W&B; a resumed run goes on."""

import json
import struct
import sys

import pytest
import torch

from common.errors import UserError
from inference import load_vlm
from inference.load import VLM
from scripts.processes import as_flags
from tests.helpers import read_log, rows_with_damaged_pictures, run_script, small_model, write_rows
from trainer import run_log
from trainer.build import build_model
from trainer.config import TrainConfig
from trainer.dashboard import open_dashboards
from trainer.image_encoder import ImageEncoder
from trainer.loop import train
from trainer.runtime import Runtime, start_runtime
from trainer.validation import MAX_NEW_TOKENS, answer_samples

NAME = "sft_vlm_64"
# Of the first run, then of the one that goes on from step 3.
VAL_STEPS = [0, 2, 3, 4, 6]


@pytest.fixture(scope="module")
def watched(options, tmp_path_factory):
    """(folder, what both runs printed): four steps, of which the last is lost, then the rest."""
    out_dir = tmp_path_factory.mktemp("watched")
    watching = dict(use_tensorboard=True, use_wandb=True, val_data=options["data_path"])
    saving = dict(val_interval=2, save_interval=1, keep_run_states=3, out_dir=out_dir)
    flags = as_flags(**options, **watching, **saving)
    first = run_script("train_sft_vlm.py", *flags, "--max_steps", "4")
    assert first.returncode == 0, first.stdout
    (out_dir / f"{NAME}.resume/step-00000004.pth").unlink()
    second = run_script("train_sft_vlm.py", *flags, "--resume")
    assert second.returncode == 0 and "step-00000003.pth, 3 steps" in second.stdout, second.stdout
    return out_dir, first.stdout, second.stdout


def read_wandb(path):
    """The records of an offline run: LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        # The 7 bytes before a piece never cross the border of a block.
        left_in_block = 32768 - place % 32768
        if left_in_block < 7:
            place += left_in_block
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield Record.FromString(record)
            record = b""


def test_tensorboard_has_each_step_once(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out_dir, first, _ = watched
    events = EventAccumulator(str(out_dir / f"{NAME}.tensorboard")).Reload()
    for event, name in (("train", "loss"), ("train", "learning_rate"), ("validation", "val_loss")):
        shown = [(one.step, one.value) for one in events.Scalars(name)]
        logged = [(line["step"], line[name]) for line in read_log(out_dir, event)]
        assert shown == [(step, pytest.approx(value)) for step, value in logged], name
    samples = [line for line in read_log(out_dir, "sample") if line["row"] == 8]
    shown = events.Tensors("samples/row_8/text_summary")
    # (This reader lists a text that is logged again twice; TensorBoard shows the newer one.)
    assert {one.step for one in shown} == {line["step"] for line in samples} == {*VAL_STEPS}
    text = shown[-1].tensor_proto.string_val[0].decode()
    assert f"given: {samples[-1]['given'].strip()}" in text and samples[-1]["question"] in text
    assert f"watch it: tensorboard --logdir {out_dir}" in first


def test_wandb_goes_on_in_the_same_run(watched):
    out_dir = watched[0]
    ids = {line["wandb_id"] for line in read_log(out_dir, "start")}
    folders = sorted((out_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len(ids) == 1
    assert {folder.name.split("-")[-1] for folder in folders} == ids
    losses = {}
    for folder in folders:
        for record in read_wandb(next(folder.glob("*.wandb"))):
            items = {item.nested_key[0]: item.value_json for item in record.history.item}
            if "loss" in items:
                losses[int(items["_step"])] = float(items["loss"])
    assert losses == {line["step"]: line["loss"] for line in read_log(out_dir, "train")}
    assert list(folders[1].rglob("samples_*.table.json"))


def test_a_resumed_log_counts_on(watched):
    lines = [json.loads(line) for line in (watched[0] / f"{NAME}.log.jsonl").open()]
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if line["event"] == "validation"] == VAL_STEPS
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    starts = [index for index, line in enumerate(lines) if line["event"] == "start"]
    assert [lines[index]["step"] for index in starts] == [0, 3]
    assert seconds[starts[1]] >= seconds[starts[1] - 1] > seconds[0]


def test_a_run_that_is_watched_prints_calmly(watched):
    """Libraries that start and end say nothing of their own but W&B, which prefixes its lines."""
    for printed in watched[1:]:
        ours = [line for line in printed.splitlines() if not line.startswith("wandb: ")]
        assert "warn" not in printed.lower() and "Traceback" not in printed, printed
        assert all(len(line) <= 100 for line in ours if line.startswith("  "))
    assert "step 0: validation loss" in watched[1] and "step 0:" not in watched[2]
    for line in ("  asked  What color is the circle?", "  right  red b", "  given  red"):
        assert line in watched[2]


def ask_again(vlm, rows_dir, index: int, shift: int = 0) -> tuple[str, str, str]:
    """(question, right answer, answer of inference) of a row, or with pictures of a later row."""
    lines = (rows_dir / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    row, other = json.loads(lines[index]), json.loads(lines[(index + shift) % len(lines)])
    question, answer = (turn["content"] for turn in row["conversations"])
    names = filter(None, other.get("image", "").split(", "))
    images = [rows_dir / "images" / name for name in names]
    given = vlm.ask(images, question, temperature=0, max_new_tokens=MAX_NEW_TOKENS)
    return question.replace("<image>\n", ""), answer, given


def test_sample_answers_are_those_of_inference(watched, rows_dir):
    """Rows of no, two and one image, asked again of the weights that the run has left."""
    vlm = load_vlm(watched[0] / f"{NAME}.pth", device="cpu")
    lines = read_log(watched[0], "sample")
    samples = [line for line in lines if line["step"] == 6]
    assert [sample["row"] for sample in samples] == [0, 8, 16]
    for sample in samples:
        expected = ask_again(vlm, rows_dir, sample["row"])
        assert (sample["question"], sample["answer"], sample["given"]) == expected
    before = [line["given"] for line in lines if line["step"] == 0]
    assert before != [sample["given"] for sample in samples], "it has not learned anything"


def test_sample_answers_look_at_the_pictures(rows, rows_dir, processor):
    """A network of loud patches and strong attention: other pictures, other answers."""
    model = small_model()
    model.vision_proj.vision_proj[0].weight.data *= 30
    for layer in model.layers:
        layer.attention.wv.weight.data *= 10
        layer.attention.wo.weight.data *= 10
    vlm = VLM(model, processor, rows_dir)
    runtime = Runtime(torch.device("cpu"), torch.float32)
    images = ImageEncoder(model.vision_encoder, processor.image_processor, runtime.device)
    samples = answer_samples(model, images, rows(processor), runtime)
    assert [sample[1:] for sample in samples] == [
        ask_again(vlm, rows_dir, sample.row) for sample in samples
    ]
    for sample in samples[1:]:
        assert sample.given != ask_again(vlm, rows_dir, sample.row, shift=3)[2]


@pytest.fixture
def in_process(options, tmp_path):
    """Trains in this process, in tmp_path, with changed options; returns the TrainResult."""

    def in_process(data, **changes):
        values = options | dict(out_dir=tmp_path, save_name="sft_vlm") | changes
        values = {n: v if isinstance(v, int | float) else str(v) for n, v in values.items()}
        values |= {name: [values[name]] for name in ("data_path", "images_path")}
        config = TrainConfig(**values)
        runtime = start_runtime(config)
        model, processor = build_model(config, runtime)
        return train(model, data(processor), config, data(processor), runtime)

    return in_process


@pytest.fixture
def rows(rows_dir):
    """The rows of the tests, for a processor."""
    from dataset.vlm_dataset import VLMDataset

    return lambda processor: VLMDataset(
        rows_dir / "rows.jsonl", rows_dir / "images", processor, 300
    )


def test_the_curve_is_drawn_during_the_run_and_goes_on(in_process, rows, tmp_path, monkeypatch):
    drawn, draw_curve = [], run_log.draw_curve

    def draw_and_note(path, train_points, val_points):
        draw_curve(path, train_points, val_points)
        assert path.read_bytes()[:4] == b"\x89PNG" and path.read_bytes()[-8:-4] == b"IEND"
        drawn.append([[step for step, _ in points] for points in (train_points, val_points)])

    monkeypatch.setattr(run_log, "draw_curve", draw_and_note)
    monkeypatch.setattr(run_log, "CURVE_SECONDS", 0)
    monkeypatch.setattr(run_log, "CURVE_SHARE", 1e9)
    in_process(rows, max_steps=2)
    assert [steps for steps, _ in drawn] == [[1], [1, 2], [1, 2], [1, 2]]
    drawn.clear()
    in_process(rows, max_steps=4, resume="yes")
    assert drawn[0] == [[1, 2, 3], [0, 2]] and drawn[-1] == [[1, 2, 3, 4], [0, 2, 3, 4]]


def test_drawing_takes_a_hundredth_of_the_time(monkeypatch, tmp_path):
    """A slow disk or machine: what follows a drawing waits for a hundred times its seconds."""
    clock = [1000.0]
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(run_log, "draw_curve", lambda *_: clock.__setitem__(0, clock[0] + 0.5))
    log = run_log.RunLog.__new__(run_log.RunLog)
    log.paths, log.train_points, log.val_points = None, [], []
    log.paths = type("Paths", (), {"curve": tmp_path / "curve.png"})
    log._draw_curve()
    assert log.curve_due - clock[0] == pytest.approx(50)


def test_a_row_that_cannot_be_read_gives_its_place_to_the_next(options, tmp_path):
    rows = rows_with_damaged_pictures(tmp_path / "images", 6, damaged=(0, 2, 3))
    data = write_rows(tmp_path / "rows.jsonl", rows)
    changes = dict(val_data=data, val_images=tmp_path / "images", out_dir=tmp_path, max_steps=1)
    finished = run_script("train_sft_vlm.py", *as_flags(**(options | changes)))
    assert finished.returncode == 0, finished.stdout
    assert " (left out: 3 image damaged)\n" in finished.stdout
    # Rows 0 and 1, 2 and 3, 4 and 5: of the second pair none is whole.
    steps = [(line["step"], line["row"]) for line in read_log(tmp_path, "sample")]
    assert steps == [(0, 1), (0, 4), (1, 1), (1, 4)]


def test_samples_where_training_is_in_bfloat16(rows, processor, model):
    """A cache of keys has one dtype, which autocast would mix."""
    runtime = Runtime(torch.device("cpu"), torch.bfloat16)
    images = ImageEncoder(model.vision_encoder, processor.image_processor, runtime.device)
    samples = answer_samples(model, images, rows(processor), runtime)
    assert [sample.row for sample in samples] == [0, 8, 16] and all(s.given for s in samples)


@pytest.mark.parametrize("flag", ["use_wandb", "use_tensorboard"])
def test_a_dashboard_that_cannot_start_is_one_line(flag, tmp_path, monkeypatch):
    config = TrainConfig(**{flag: True}, out_dir=str(tmp_path))
    package, module = {
        "use_wandb": ("wandb", "wandb"),
        "use_tensorboard": ("tensorboard", "torch.utils.tensorboard"),
    }[flag]
    # a file where the folder should be; a mode that W&B does not know
    (tmp_path / "file").touch()
    with monkeypatch.context() as patched, pytest.raises(UserError) as raised:
        patched.setenv("WANDB_MODE", "nonsense")
        open_dashboards(config, tmp_path / "file", 0, "id")
    assert str(raised.value).startswith(f"--{flag} cannot start (")
    assert "\n" not in str(raised.value)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"--{flag} needs {package} \(.*\): pip install {package}"):
        open_dashboards(config, tmp_path, 0, "id")
