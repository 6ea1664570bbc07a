"""Training: the same curve however it is spread, nothing frozen moves, nothing is lost."""

import re
import shutil
import signal

import pytest
import torch

from dataset.vlm_dataset import VLMDataset
from model.files import read_info
from model.weights import read_tensors, read_weights
from scripts.processes import as_flags, free_port
from tests.helpers import (
    N_PATCHES,
    TOKENIZER,
    picture,
    read_log,
    rows_with_damaged_pictures,
    run_cold,
    run_script,
    small_model,
    start_script,
    wait_for_steps,
    write_rows,
)
from trainer.build import build_model, set_trainable
from trainer.collate import make_loader
from trainer.config import TrainConfig
from trainer.feature_cache import FeatureCache
from trainer.feature_format import FeatureFormat
from trainer.glance import find_opening_questions
from trainer.image_encoder import ImageEncoder
from trainer.loop import train
from trainer.runtime import start_runtime
from trainer.sampler import StepSampler


@pytest.fixture
def run(options, tmp_path):
    """Runs train_sft_vlm.py with changed options in tmp_path; returns what it printed."""

    def run(*more, script="train_sft_vlm.py", status=0, env=None, **changes) -> str:
        flags = as_flags(**(options | {"out_dir": tmp_path} | changes))
        finished = run_script(script, *flags, *more, env=env or {})
        assert finished.returncode == status, finished.stdout
        assert "Traceback" not in finished.stdout, finished.stdout
        return finished.stdout

    return run


@pytest.fixture(scope="module")
def one_process(options, tmp_path_factory):
    """(folder, what was printed) of the run that others are compared with."""
    out_dir = tmp_path_factory.mktemp("one")
    finished = run_script("train_sft_vlm.py", *as_flags(**options, out_dir=out_dir))
    assert finished.returncode == 0, finished.stdout
    return out_dir, finished.stdout


def losses(out_dir) -> list[float]:
    return [line["loss"] for line in read_log(out_dir, "train")]


def assert_same_run(first, second):
    assert losses(first) == pytest.approx(losses(second), abs=2e-4)
    weights, others = (read_weights(folder / "sft_vlm_64.pth") for folder in (first, second))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=2e-3, rtol=0, msg=name)


def test_a_run_leaves_weights_log_and_curve_and_prints_calmly(one_process):
    out_dir, printed = one_process
    assert len(losses(out_dir)) == 6
    assert (out_dir / "sft_vlm_64.png").read_bytes()[:4] == b"\x89PNG"
    weights = read_weights(out_dir / "sft_vlm_64.pth")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert "6 of 8 samples (8 x 1 accumulation x 1 devices), 2 epochs" in printed
    assert "warn" not in printed.lower() and "Traceback" not in printed
    asked = f"ask it: python eval_vlm.py --weights {out_dir}/sft_vlm_64.pth --image "
    last = printed.splitlines()[-1]
    assert asked in last and "1-0.png --prompt 'What color is the circle?" in last


def test_the_options_are_printed_once_and_stored_with_the_weights(one_process, options):
    """In the log, in the run state, and in the JSON beside the weights."""
    out_dir, printed = one_process
    words = " ".join(printed.split())  # whatever the line breaks
    assert printed.count("config: ") == 1 and "learning_rate 0.001" in words
    (start,) = read_log(out_dir, "start")
    state = read_tensors(out_dir / "sft_vlm_64.resume/step-00000006.pth")
    for stored in (start, state["config"]):
        assert stored["learning_rate"] == 1e-3 and stored["batch_size"] == 8
        assert stored["data_path"] == [str(options["data_path"])]
    info = read_info(out_dir / "sft_vlm_64.pth")
    assert info["config"]["dim"] == 64 and info["config"]["n_image_tokens"] == N_PATCHES
    assert info["tokenizer"] == str(TOKENIZER) and info["stage"] == "sft"
    assert info["vision_model"] == str(options["vision_model"]) and info["step"] == 6


def test_sizes_come_with_the_weights_to_start_from(one_process, run, rows_dir, tmp_path):
    """No size, tokenizer or vision encoder needs to be given; a wrong size is named."""
    start = one_process[0] / "sft_vlm_64.pth"
    flags = as_flags(
        init_weights=start,
        data=rows_dir / "rows.jsonl",
        images=rows_dir / "images",
        out_dir=tmp_path,
        max_steps=1,
        device="cpu",
    )
    finished = run_script("train_pretrain_vlm.py", *flags)
    assert finished.returncode == 0, finished.stdout
    assert (tmp_path / "pretrain_vlm_64.pth").is_file()
    printed = run(init_weights=start, n_layers=3, status=2)
    assert "is of dim 64 with 2 layers, not of dim 64 with 3: pass --dim 64 --n_layers 2" in printed


def test_the_step_may_be_cut_up(one_process, run, tmp_path):
    run(batch_size=2, accumulation_steps=4)
    assert_same_run(one_process[0], tmp_path)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_compiled_blocks_give_the_same_curve(one_process, options, tmp_path):
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    flags = as_flags(**options, compile=True, out_dir=tmp_path)
    finished = run_cold("train_sft_vlm.py", *flags, env=env)
    assert finished.returncode == 0 and "warn" not in finished.stdout.lower(), finished.stdout
    assert any((tmp_path / "inductor").rglob("*.cpp"))
    assert_same_run(one_process[0], tmp_path)


def test_compiling_without_a_compiler_says_so(run, tmp_path):
    printed = run(compile=True, status=2, env={"PATH": str(tmp_path), "CXX": ""})
    assert "error: --compile needs a C++ compiler" in printed


def test_automatic_batch_size_fits_and_keeps_the_step(one_process, run, tmp_path):
    """The stage's own 8 samples a step, whatever fits: plenty of memory, then too little."""
    roomy = run(batch_size="auto", memory_gb=8)
    assert "batch size: 8 x 1 accumulation" in roomy
    assert_same_run(one_process[0], tmp_path)
    tight = run(batch_size="auto", memory_gb=0.01, status=2)
    assert "error: not even one sample fits: it needs" in tight


def test_two_processes_give_the_same_curve(one_process, options, tmp_path):
    """Text-only and image rows fall on different ranks, and counts of label tokens differ."""
    changes = dict(batch_size=2, accumulation_steps=2, ddp=True, out_dir=tmp_path)
    finished = run_cold(
        *("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()),
        *("train_sft_vlm.py", *as_flags(**(options | changes))),
    )
    assert finished.returncode == 0, finished.stdout
    assert_same_run(one_process[0], tmp_path)


def test_the_same_seed_gives_the_same_weights_bit_for_bit(one_process, run, tmp_path):
    run()
    first, second = (read_weights(f / "sft_vlm_64.pth") for f in (one_process[0], tmp_path))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_every_lever_on_is_every_lever_off(rows_dir, tmp_path, processor):
    """Loss and gradients of a batch of the loader, against rows taken one by one.

    On: indices found in the loader, features out of the cache, the head at labels only. Off: whole
    logits, CLIP's own float pixels, no padding.
    """
    model = small_model().train()
    data = VLMDataset(rows_dir / "rows.jsonl", rows_dir / "images", processor, 300)
    form = FeatureFormat((N_PATCHES, model.config.vision_dim), torch.float16)
    cache = FeatureCache(tmp_path, form, 1e8)
    device = torch.device("cpu")
    images = ImageEncoder(model.vision_encoder, processor.image_processor, device, cache)
    # The second time all features come from the cache.
    for _ in range(2):
        (batch,) = list(make_loader(data, StepSampler(data.lengths, 24), 0, cache))
        features = images.features(batch)
        while images._unwritten:
            images._unwritten.popleft().result()
    assert batch.pixels is None and len(batch.cached_features) == 24
    fast = model(**batch.model_inputs(), image_features=features).loss
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(fast, trainable)

    total, n_labels = 0.0, 0
    for index in range(len(data)):
        sample = data[index]
        targets = sample["labels"][1:]
        logits = model(sample["input_ids"][None], sample["pixel_values"]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        total, n_labels = total + loss, n_labels + int((targets != -100).sum())
    torch.testing.assert_close(fast, total / n_labels, atol=1e-4, rtol=1e-4)
    plain = torch.autograd.grad(total / n_labels, trainable)
    for gradient, expected in zip(gradients, plain):
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-2)


def test_pretraining_moves_the_projector_and_the_last_layer_only(one_process, run, tmp_path):
    start = one_process[0] / "sft_vlm_64.pth"
    run(script="train_pretrain_vlm.py", init_weights=start)
    before, after = read_weights(start), read_weights(tmp_path / "pretrain_vlm_64.pth")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(("vision_proj.", "layers.1."))}


def test_a_notebook_trains_with_one_call_and_the_vision_encoder_stays(
    vision_dir, rows_dir, tmp_path
):
    """In process, since files hold no vision encoder; signal handlers are as before afterwards."""
    config = TrainConfig(
        data_path=["rows"],
        dim=64,
        n_layers=2,
        tokenizer=str(TOKENIZER),
        vision_model=str(vision_dir),
        batch_size=8,
        learning_rate=1e-2,
        max_steps=2,
        max_seq_len=300,
        out_dir=str(tmp_path),
        device="cpu",
    )
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    model, processor = build_model(config, start_runtime(config))
    data = VLMDataset(rows_dir / "rows.jsonl", rows_dir / "images", processor, 300)
    set_trainable(model, lambda name: True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    result = train(model, data, config)

    assert handlers == [signal.getsignal(number) for number in numbers]
    assert (result.step, result.total_steps, result.exit_status) == (2, 2, 0)
    assert result.weights == tmp_path / "train_64.pth" and result.weights.is_file()
    weights = model.state_dict()
    moved = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    assert not any(name.startswith("vision_encoder.") for name in moved)
    assert moved >= {"vision_proj.vision_proj.0.weight", "tok_embeddings.weight", "norm.weight"}


def test_a_grad_clip_of_0_is_none(run, tmp_path):
    for clip in ("0", "1000000"):
        run(grad_clip=clip, max_steps=3, out_dir=tmp_path / clip)
    assert losses(tmp_path / "0") == losses(tmp_path / "1000000")


def test_validation_as_often_as_asked(one_process, run, options, tmp_path):
    run(val_data=options["data_path"], val_interval=2)
    lines = read_log(tmp_path, "validation")
    # Two epochs of three steps: before them, at each second step, and where an epoch ends.
    assert [line["step"] for line in lines] == [0, 2, 3, 4, 6]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    assert losses(tmp_path) == losses(one_process[0]), "looking at the rows changes nothing"
    # The JSON beside the weights knows the loss of these very weights.
    assert read_info(tmp_path / "sft_vlm_64.pth")["val_loss"] == lines[-1]["val_loss"]
    best = min(line["val_loss"] for line in lines)
    assert read_info(tmp_path / "sft_vlm_best_64.pth")["val_loss"] == best


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_says_where(options, tmp_path, number):
    flags = as_flags(**(options | {"epochs": 100_000, "out_dir": tmp_path}))
    process = start_script("train_sft_vlm.py", *flags)
    wait_for_steps(tmp_path, 1)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, printed
    assert f"stopped by {number.name} after step" in printed
    assert f"weights: {tmp_path}/sft_vlm_64.pth" in printed
    assert read_weights(tmp_path / "sft_vlm_64.pth") and (tmp_path / "sft_vlm_64.png").is_file()


def test_ctrl_c_while_packages_are_imported_ends_in_one_line(options, tmp_path):
    flags = as_flags(**options, out_dir=tmp_path)
    process = start_script("-X", "importtime", "train_sft_vlm.py", *flags)
    # Python tells what it has imported: torch is about half way.
    imported = ""
    while "torch.nn" not in imported:
        imported = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    printed = [line for line in process.stdout.read().splitlines() if "import time" not in line]
    assert process.wait(timeout=60) == 130 and printed == ["stopped"], printed


def test_bad_pictures_cost_their_rows_and_no_more(run, tmp_path):
    rows = rows_with_damaged_pictures(tmp_path / "images", 12, damaged=range(4))
    rows.append({"conversations": [], "image": "0.jpg"})
    data = write_rows(tmp_path / "rows.jsonl", rows)
    changes = dict(epochs=1, batch_size=1, num_workers=2)
    printed = run(data_path=data, images_path=tmp_path / "images", **changes)
    assert "left out: 1 no conversation" in printed
    assert "skipped while training: 4 image damaged" in printed


MISTAKES = [
    (dict(init_weights="nowhere.pth"), "error: no weights at nowhere.pth: train them first, or"),
    (dict(vision_model="nowhere"), "error: no vision encoder in nowhere: fetch CLIP with"),
    (dict(data_path="nowhere.jsonl"), "error: no data at nowhere.jsonl: fetch"),
    (dict(tokenizer="nowhere"), "error: no tokenizer in nowhere: fetch it"),
    (dict(device="cuda"), "error: --device cuda but PyTorch sees no GPU here"),
    (dict(device="toaster"), "error: --device toaster is no device"),
    (dict(ddp=True), "error: --ddp needs torchrun"),
    (dict(dim=130), "error: dim 130 does not split into 4 heads"),
    (dict(max_seq_len=9000), "error: --max_seq_len is 9000 but the network takes at most 8192"),
    (dict(batch_size=0), "--batch_size is 0: it has to be from 1 to 4,096"),
    (dict(max_steps=0), "--max_steps is 0: it has to be from 1 to 1,000,000,000"),
    (
        dict(max_seq_len=5),
        r"error: no row of all 6 steps could be used \(48 no answer within max_length\): python -m",
    ),
    # What is safe is named too.
    (
        dict(learning_rate=1000, grad_clip=1e6, epochs=9, save_interval=1),
        r"norm is nan at step \d+, samples \[.*lower --learning_rate; the last run state is "
        r"intact, --resume continues from it: .*/sft_vlm_64.resume/step-",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_cost_one_line(run, changes, message):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    last = run(status=2, **changes).splitlines()[-1]
    assert re.search(message, last), last


def test_a_batch_that_does_not_fit_names_the_flag(options, tmp_path):
    """A real failure to allocate: the process may have half a GB more than it starts with."""
    pytest.importorskip("resource")
    code = (
        "import resource, runpy, sys, tests.preload, trainer.loop, dataset.vlm_dataset\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + 500_000_000\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    turns = [{"content": "large red circle; " * 400}, {"content": "red blue " * 400}]
    data = write_rows(tmp_path / "rows.jsonl", [{"conversations": turns}] * 64)
    changes = dict(data_path=data, dim=512, batch_size=64, max_seq_len=4000, out_dir=tmp_path)
    finished = run_cold("-c", code, "train_sft_vlm.py", *as_flags(**(options | changes)))
    assert finished.returncode == 2, finished.stdout[-2000:]
    assert "does not fit in memory: lower --batch_size (now 64)" in finished.stdout.splitlines()[-1]


def test_a_cache_that_stops_filling_or_is_damaged_says_so(run, tmp_path):
    """Other pictures take the room of 4 of the 24 images; then one bit of a slot is turned."""
    rows = []
    for index in range(4):
        picture(100 + index).save(tmp_path / f"{index}.png")
        turns = [{"content": "<image>\nWhat?"}, {"content": "red"}]
        rows.append({"conversations": turns, "image": f"{index}.png"})
    others = write_rows(tmp_path / "rows.jsonl", rows)
    run(data_path=others, images_path=tmp_path, epochs=1)
    (features,) = (tmp_path / "features").rglob("*.features")
    limit = 24.5 * features.stat().st_size / 4 / 1e9
    printed = run(feature_cache_gb=limit)
    assert printed.count("feature cache: it stores no more, its limit of") == 1

    (newest,) = set((tmp_path / "features").rglob("*.features")) - {features}
    stored = bytearray(newest.read_bytes())
    stored[7] ^= 1
    newest.write_bytes(stored)
    printed = run(feature_cache_gb=limit, epochs=1)
    assert "feature cache: 1 damaged entries; their images are encoded again" in printed


def test_weights_know_what_their_rows_ask(rows_dir, processor):
    """The most frequent opening question of rows with one image, and of those with two."""
    dataset = VLMDataset(rows_dir / "rows.jsonl", rows_dir / "images", processor, 512)
    rows = [dataset.read(index) for index in range(len(dataset))]
    for name, n_images in {"question": 1, "question_for_several": 2}.items():
        asked = [
            row.conversations[0]["content"].replace("<image>\n", "")
            for row, images in rows
            if len(images) == n_images
        ]
        found = find_opening_questions(dataset)[name]
        assert asked.count(found) == max(map(asked.count, asked))
