"""The training scripts as processes: the same curve however it is spread, nothing frozen moves, nothing is lost."""

import json
import shutil
import signal
import time

import pytest
import torch

from dataset.vlm_dataset import VLMDataset
from model.weights import read_weights
from tests.helpers import (
    N_PATCHES,
    TOKENIZER,
    free_port,
    picture,
    run_script,
    small_model,
    start_script,
    write_rows,
)
from trainer.build import build_model, set_trainable
from trainer.collate import make_loader
from trainer.config import TrainConfig
from trainer.feature_cache import FeatureCache
from trainer.image_encoder import ImageEncoder
from trainer.loop import train
from trainer.runtime import start_runtime
from trainer.sampler import StepSampler

SIZES = [
    "--dim",
    "64",
    "--n_layers",
    "2",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--num_workers",
    "0",
]


@pytest.fixture(scope="module")
def flags(vision_dir, rows_dir):
    """Flags of a small run: 24 rows of 0-2 images, 2 epochs of 3 steps."""
    return [
        *SIZES, "--tokenizer", str(TOKENIZER), "--vision_model", str(vision_dir), "--data_path", str(rows_dir / "rows.jsonl"),
        "--images_path", str(rows_dir / "images"), "--epochs", "2", "--batch_size", "8", "--learning_rate", "1e-3",
        "--log_interval", "1", "--init_weights", "none",
    ]  # fmt: skip


def losses(out_dir, name: str = "sft_vlm_64") -> list[float]:
    lines = [json.loads(line) for line in (out_dir / f"{name}.log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "train"]


@pytest.fixture(scope="module")
def one_process(flags, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("one")
    finished = run_script("train_sft_vlm.py", *flags, "--out_dir", out_dir)
    assert finished.returncode == 0, finished.stdout
    return out_dir, finished.stdout


def test_a_run_leaves_weights_log_and_curve_and_prints_calmly(one_process):
    out_dir, printed = one_process
    assert len(losses(out_dir)) == 6
    assert (out_dir / "sft_vlm_64.png").read_bytes()[:4] == b"\x89PNG"
    assert all(
        torch.isfinite(weight).all() for weight in read_weights(out_dir / "sft_vlm_64.pth").values()
    )
    assert "6 of 8 samples (8 x 1 accumulation x 1 devices), 2 epochs" in printed
    assert "warn" not in printed.lower() and "Traceback" not in printed


def assert_same_run(first, second):
    assert losses(first) == pytest.approx(losses(second), abs=2e-4)
    weights, others = (
        read_weights(first / "sft_vlm_64.pth"),
        read_weights(second / "sft_vlm_64.pth"),
    )
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=2e-3, rtol=0, msg=name)


def test_accumulation_gives_the_same_curve(one_process, flags, tmp_path):
    finished = run_script(
        "train_sft_vlm.py",
        *flags,
        "--batch_size",
        "2",
        "--accumulation_steps",
        "4",
        "--out_dir",
        tmp_path,
    )
    assert finished.returncode == 0, finished.stdout
    assert_same_run(one_process[0], tmp_path)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_compiled_blocks_give_the_same_curve(one_process, flags, tmp_path):
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    finished = run_script("train_sft_vlm.py", *flags, "--compile", "--out_dir", tmp_path, env=env)
    assert finished.returncode == 0 and "warn" not in finished.stdout.lower(), finished.stdout
    assert any((tmp_path / "inductor").rglob("*.cpp"))
    assert_same_run(one_process[0], tmp_path)


def test_compiling_without_a_compiler_says_so(flags, tmp_path):
    env = {"PATH": str(tmp_path), "CXX": ""}
    finished = run_script("train_sft_vlm.py", *flags, "--compile", "--out_dir", tmp_path, env=env)
    assert (
        finished.returncode == 2 and "error: --compile needs a C++ compiler" in finished.stdout
    ), finished.stdout


def test_automatic_batch_size_fits_and_keeps_the_step(one_process, flags, tmp_path):
    """The stage's own 8 samples a step, whatever fits at a time: plenty of memory, then little more than one sample needs."""
    roomy = run_script(
        "train_sft_vlm.py",
        *flags,
        "--batch_size",
        "auto",
        "--memory_gb",
        "8",
        "--out_dir",
        tmp_path,
    )
    assert "batch size: 8 x 1 accumulation" in roomy.stdout, roomy.stdout
    assert_same_run(one_process[0], tmp_path)
    tight = run_script(
        "train_sft_vlm.py",
        *flags,
        "--batch_size",
        "auto",
        "--memory_gb",
        "0.01",
        "--out_dir",
        tmp_path,
    )
    assert tight.returncode == 2 and "error: not even one sample fits: it needs" in tight.stdout


def test_two_processes_give_the_same_curve(one_process, flags, tmp_path):
    """Text-only and image rows fall on different ranks, and counts of label tokens differ between them."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    script = [
        "train_sft_vlm.py",
        *flags,
        "--batch_size",
        "2",
        "--accumulation_steps",
        "2",
        "--ddp",
        "--out_dir",
        tmp_path,
    ]
    finished = run_script(*launch, *script)
    assert finished.returncode == 0, finished.stdout
    assert_same_run(one_process[0], tmp_path)


def test_the_same_seed_gives_the_same_weights_bit_for_bit(one_process, flags, tmp_path):
    run_script("train_sft_vlm.py", *flags, "--out_dir", tmp_path)
    first, second = (
        read_weights(folder / "sft_vlm_64.pth") for folder in (one_process[0], tmp_path)
    )
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_every_lever_on_is_every_lever_off(rows_dir, tmp_path, processor):
    """Loss and gradients of a batch of the loader, with positions found there, features out of the cache and the head at labels
    only, against whole logits, CLIP's own float pixels and rows one by one without padding."""
    model, data = (
        small_model().train(),
        VLMDataset(rows_dir / "rows.jsonl", rows_dir / "images", processor, 300),
    )
    cache = FeatureCache(tmp_path, (N_PATCHES, model.config.vision_dim), torch.float16, 1e8)
    images = ImageEncoder(
        model.vision_encoder, processor.image_processor, torch.device("cpu"), cache
    )
    for _ in range(2):  # the second time all features come from the cache
        loader = make_loader(data, StepSampler(data.lengths, 24), 0, cache)
        (batch,) = list(loader)
        features = images.features(batch)
        while images._unwritten:
            images._unwritten.popleft().result()
    assert batch.pixels is None and len(batch.cached_features) == 24
    fast = model(**batch.model_inputs(), image_features=features).loss
    gradients = torch.autograd.grad(fast, [p for p in model.parameters() if p.requires_grad])
    total, n_labels = 0.0, 0
    for index in range(len(data)):
        sample = data[index]
        targets = sample["labels"][1:]
        logits = model(sample["input_ids"][None], sample["pixel_values"]).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits, targets, ignore_index=-100, reduction="sum"
        )
        n_labels += int((targets != -100).sum())
    torch.testing.assert_close(fast, total / n_labels, atol=1e-4, rtol=1e-4)
    plain = torch.autograd.grad(
        total / n_labels, [p for p in model.parameters() if p.requires_grad]
    )
    for gradient, expected in zip(gradients, plain):
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-2)


def test_pretraining_moves_the_projector_and_the_last_layer_only(one_process, flags, tmp_path):
    start = one_process[0] / "sft_vlm_64.pth"
    finished = run_script(
        "train_pretrain_vlm.py", *flags, "--init_weights", start, "--out_dir", tmp_path
    )
    assert finished.returncode == 0, finished.stdout
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
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    model, processor = build_model(config, start_runtime(config))
    data = VLMDataset(rows_dir / "rows.jsonl", rows_dir / "images", processor, 300)
    set_trainable(model, lambda name: True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    result = train(model, data, config)

    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert (result.step, result.total_steps, result.exit_status) == (2, 2, 0)
    assert result.weights == tmp_path / "train_64.pth" and result.weights.is_file()
    weights = model.state_dict()
    moved = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    assert not any(name.startswith("vision_encoder.") for name in moved)
    assert moved >= {"vision_proj.vision_proj.0.weight", "tok_embeddings.weight", "norm.weight"}


def test_validation_loss_and_offline_wandb(one_process, flags, rows_dir, tmp_path):
    finished = run_script(
        "train_sft_vlm.py", *flags, "--out_dir", tmp_path, "--val_data", rows_dir / "rows.jsonl", "--use_wandb",
        env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout
    lines = [
        json.loads(line) for line in (tmp_path / "sft_vlm_64.log.jsonl").read_text().splitlines()
    ]
    values = [line["val_loss"] for line in lines if line["event"] == "validation"]
    assert len(values) == 2 and values[1] < values[0]
    assert losses(tmp_path) == losses(one_process[0]), (
        "looking at the validation set changes nothing"
    )
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_says_where(flags, tmp_path, number):
    process = start_script("train_sft_vlm.py", *flags, "--epochs", "100000", "--out_dir", tmp_path)
    log = tmp_path / "sft_vlm_64.log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.is_file() and '"train"' in log.read_text()):
        time.sleep(0.1)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, printed
    assert (
        f"stopped by {number.name} after step" in printed
        and f"weights: {tmp_path}/sft_vlm_64.pth" in printed
    )
    assert read_weights(tmp_path / "sft_vlm_64.pth") and (tmp_path / "sft_vlm_64.png").is_file()


def test_bad_pictures_cost_their_rows_and_no_more(flags, tmp_path):
    (tmp_path / "images").mkdir()
    rows = []
    for index in range(12):
        path = tmp_path / "images" / f"{index}.jpg"
        picture(index).save(path)
        if index < 4:
            path.write_bytes(path.read_bytes()[:150])
        turns = [
            {"role": "user", "content": "<image>\nWhat?"},
            {"role": "assistant", "content": "red"},
        ]
        rows.append({"conversations": turns, "image": path.name})
    rows.append({"conversations": [], "image": "0.jpg"})
    write_rows(tmp_path / "rows.jsonl", rows)
    finished = run_script(
        "train_sft_vlm.py", *flags, "--data_path", tmp_path / "rows.jsonl", "--images_path", tmp_path / "images",
        "--out_dir", tmp_path, "--epochs", "1", "--batch_size", "1", "--num_workers", "2",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout
    assert (
        "left out: 1 no conversation" in finished.stdout
        and "skipped while training: 4 image damaged" in finished.stdout
    )


def test_validation_comes_as_often_as_asked(flags, rows_dir, tmp_path):
    finished = run_script(
        "train_sft_vlm.py",
        *flags,
        "--out_dir",
        tmp_path,
        "--val_data",
        rows_dir / "rows.jsonl",
        "--val_interval",
        "2",
    )
    assert finished.returncode == 0, finished.stdout
    lines = map(json.loads, (tmp_path / "sft_vlm_64.log.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if line["event"] == "validation"] == [2, 3, 4, 6], (
        "two epochs of three steps"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--init_weights", "nowhere.pth"],
            "error: no weights at nowhere.pth: train them first, or fetch the published",
        ),
        (["--vision_model", "nowhere"], "error: no CLIP in nowhere: fetch it with"),
        (["--data_path", "nowhere.jsonl"], "error: no data at nowhere.jsonl: fetch"),
        (["--tokenizer", "nowhere"], "error: no tokenizer in nowhere: fetch it"),
        (
            ["--learning_rate", "1e30", "--grad_clip", "1e30", "--epochs", "9"],
            "norm is nan at step",
        ),
        (["--device", "cuda"], "error: --device cuda but PyTorch sees no GPU here"),
        (["--ddp"], "error: --ddp needs torchrun"),
        (["--dim", "130"], "error: dim 130 does not split into 4 heads"),
        (["--batch_size", "0"], "--batch_size is 0: it has to be at least 1"),
        (["--max_steps", "0"], "--max_steps is 0: it has to be at least 1"),
        (
            ["--max_seq_len", "5"],
            "error: no row of all 6 steps could be used (48 no answer within max_length): python -m",
        ),
    ],
)
def test_mistakes_cost_one_line(flags, tmp_path, changes, message):
    if "cuda" in changes and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    finished = run_script("train_sft_vlm.py", *flags, "--out_dir", tmp_path, *changes)
    assert finished.returncode == 2
    assert message in finished.stdout.splitlines()[-1].replace("train_sft_vlm.py: ", ""), (
        finished.stdout
    )
    assert "Traceback" not in finished.stdout


def test_a_batch_that_does_not_fit_names_the_flag(flags, tmp_path):
    """A real allocation failure: the process may use only 1.5 GB of address space more than it starts with."""
    code = (
        "import resource, runpy, sys, torch, transformers, trainer.loop, dataset.vlm_dataset\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + 500_000_000\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    rows = [
        {"conversations": [{"content": "large red circle; " * 400}, {"content": "red blue " * 400}]}
        for _ in range(64)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    finished = run_script(
        "-c", code, "train_sft_vlm.py", *flags, "--data_path", tmp_path / "rows.jsonl", "--dim", "512", "--batch_size", "64",
        "--max_seq_len", "4000", "--out_dir", tmp_path,
    )  # fmt: skip
    assert finished.returncode == 2, finished.stdout[-2000:]
    assert "does not fit in memory: lower --batch_size (now 64)" in finished.stdout.splitlines()[-1]


def test_non_finite_loss_names_the_rows_and_the_last_weights(flags, tmp_path):
    finished = run_script(
        "train_sft_vlm.py", *flags, "--out_dir", tmp_path, "--learning_rate", "1e30", "--grad_clip", "1e30", "--epochs", "9",
        "--save_interval", "1",
    )  # fmt: skip
    last = finished.stdout.splitlines()[-1]
    assert (
        "samples [" in last
        and "lower --learning_rate" in last
        and f"is intact, --resume continues from it: {tmp_path}/sft_vlm_64.resume/step-" in last
    )
