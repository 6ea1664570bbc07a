"""Cleaning: what is repaired, what is rejected, and that nothing is lost on the way."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from PIL import Image

from common.errors import UserError
from dataset.clean import run
from dataset.clean.settings import Settings
from dataset.mixture import open_data
from scripts.bench.clean import COPIES, plant, score
from tests.dataset.test_rows import write_parquet, write_zip
from tests.helpers import (
    ROOT,
    SHARED,
    assistant,
    needs_shared,
    picture,
    run_script,
    start_script,
    user,
    write_rows,
)


def text_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Rows with every kind of fault, and what becomes of each: raw.jsonl, images/."""
    folder = tmp_path_factory.mktemp("raw")
    (folder / "images/sub").mkdir(parents=True)
    for index in range(40):
        picture(index, (160, 160)).save(folder / f"images/{index}.png")
    picture(3, (160, 160)).resize((90, 90)).save(folder / "images/near.jpg", quality=60)
    (folder / "images/copy.png").write_bytes((folder / "images/4.png").read_bytes())
    (folder / "images/cut.png").write_bytes((folder / "images/5.png").read_bytes()[:2000])
    picture(50, (160, 160)).save(folder / "images/sub/deep.jpg")
    rows = [
        {
            "image": f"{index}.png",
            "conversations": [user("<image>\nWhat?"), assistant(f"This is picture {index}.")],
        }
        for index in range(40)
    ]
    rows += [
        {"image": name, "conversations": [user("<image>\nWhat?"), assistant(f"A fault: {name}.")]}
        for name in (
            "near.jpg",
            "copy.png",
            "cut.png",
            "missing.png",
            "../raw.jsonl",
            "sub/deep.jpg",
        )
    ]
    rows += [
        {
            "image": "7.png",
            "conversations": [user("<image>\nAgain?"), assistant("This is picture 7")],
        },
        {
            "image": "8.png, 9.png, 10.png",
            "conversations": [user("Which?"), assistant("The second of three.")],
        },
        {"conversations": [user("Hello"), assistant("Hello, how are you?")], "id": "\ud83d"},
        *({"conversations": [user(f"{n}?"), assistant("Yes.")]} for n in range(5)),
    ]
    lines = [json.dumps(row) for row in rows]
    (folder / "raw.jsonl").write_bytes(
        "\n".join([*lines, "{broken", "", "[]"]).encode() + b"\n\xff\xfe\n"
    )
    return folder


def clean(raw: Path, out: Path, *flags) -> str:
    finished = run_script(
        "-m",
        "dataset.clean",
        raw / "raw.jsonl",
        out,
        "--images",
        raw / "images",
        "--max_repeats",
        "3",
        *flags,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def test_every_row_is_kept_or_rejected_with_its_reason(raw, tmp_path, processor):
    printed = clean(raw, tmp_path / "clean", "--val_share", "0.1", "--processes", "1")
    rejects = [
        json.loads(line) for line in (tmp_path / "clean/rejects.jsonl").read_text().splitlines()
    ]
    assert {reject["row"]: reject["reason"] for reject in rejects} == {
        41: "image is nearly a copy",
        42: "image is a copy",
        43: "image damaged",
        44: "image missing",
        45: "image path leaves its folder",
        47: "text is repeated",
        **dict.fromkeys((53, 54), "answer is boilerplate"),
        **dict.fromkeys((55, 56, 57), "not a JSON object"),
    }
    original = (raw / "raw.jsonl").read_bytes().decode("utf-8", "backslashreplace").splitlines()
    original = [line for line in original if line]
    assert all(reject["line"] == original[reject["row"] - 1] for reject in rejects)
    assert rejects[0]["detail"] == "of one in row 4" and rejects[1]["detail"] == "of one in row 5"
    report = json.loads((tmp_path / "clean/report.json").read_text())
    kept = [
        json.loads(line)
        for part in ("train", "val")
        for line in (tmp_path / f"clean/{part}.jsonl").read_text().splitlines()
    ]
    assert report["rows"] == {"read": 57, "train": 41, "val": 5, "rejected": 11} and len(kept) == 46
    assert report["repairs"] == {"<image> put in front": 1}
    assert "57 rows read = 41 for training" in printed
    page = (tmp_path / "clean/report.html").read_text()
    assert (
        "image is nearly a copy" in page
        and page.count("data:image/jpeg") > 12
        and "http" not in page
    )
    names = {path.name for path in (tmp_path / "clean").iterdir()}
    assert names == {
        "train.jsonl", "val.jsonl", "rejects.jsonl", "images", "report.json", "report.html"
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["clean"]
    for part in ("train", "val"):
        data = open_data(
            [str(tmp_path / f"clean/{part}.jsonl")],
            [str(tmp_path / "clean/images")],
            processor,
            200,
        )
        assert not data.skipped and all(
            data[index]["input_ids"].numel() for index in range(len(data))
        )
    sizes = {Image.open(path).size for path in (tmp_path / "clean/images").rglob("*.jpg")}
    assert sizes == {(128, 128)} and (tmp_path / "clean/images/sub/deep.jpg").is_file()


def test_validation_shares_no_picture_with_training(raw, tmp_path):
    clean(raw, tmp_path / "clean", "--val_share", "0.4")
    shown = {}
    for part in ("train", "val"):
        rows = map(json.loads, (tmp_path / f"clean/{part}.jsonl").read_text().splitlines())
        shown[part] = {
            name.strip() for row in rows for name in row.get("image", "").split(",") if name.strip()
        }
    assert shown["train"] and shown["val"] and not shown["train"] & shown["val"]
    assert (
        len(
            {
                part
                for part in shown
                for name in ("8.png.jpg", "9.png.jpg", "10.png.jpg")
                if name in shown[part]
            }
        )
        == 1
    )


def start_clean(raw: Path, out: Path, *flags):
    """The same, left running in a process group of its own."""
    command = ("-m", "dataset.clean", raw / "raw.jsonl", out, "--images", raw / "images", *flags)
    return start_script(*command, "--max_repeats", "3", start_new_session=True)


def wait_for(process, folder: Path, pattern: str) -> None:
    """Wait for a file in the hidden folder, or for the end of the process."""
    while process.poll() is None and not any(folder.glob(pattern)):
        time.sleep(0.002)


def test_interrupted_at_any_moment_it_starts_anew_and_the_result_is_the_same(raw, tmp_path):
    """Whatever the number of processes."""
    clean(raw, tmp_path / "whole", "--processes", "1")
    expected = text_of(tmp_path / "whole")
    n_interrupted = 0
    for n_processes, milestone in enumerate(("work/rows.jsonl", "work/0", "train.jsonl"), 1):
        out, hidden = tmp_path / f"out{n_processes}", tmp_path / f".out{n_processes}.partial"
        process = start_clean(raw, out, "--processes", "2")
        wait_for(process, hidden, milestone)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not out.exists():  # it may have been faster than the signal
            n_interrupted += 1
            out.mkdir()  # an empty folder is welcome
            printed = clean(raw, out, "--processes", str(n_processes))
            assert f"an earlier cleaning into {out} was interrupted; starting anew" in printed
        assert not hidden.exists()
        found = text_of(out)
        assert found.keys() == expected.keys()
        differing = [name for name in expected if found[name] != expected[name]]
        assert differing == ["report.json"], "which names the folder"
    assert n_interrupted
    finished = run_script("-m", "dataset.clean", raw / "raw.jsonl", out)
    assert finished.returncode == 2 and "is not empty: choose a new folder" in finished.stdout


def test_a_zip_gives_the_same_as_a_folder(raw, tmp_path):
    for path in (raw / "images").rglob("*.*"):
        with zipfile.ZipFile(tmp_path / "images.zip", "a") as archive:
            archive.write(path, path.relative_to(raw / "images"))
    clean(raw, tmp_path / "folder")
    clean(raw, tmp_path / "zip", "--images", tmp_path / "images.zip")
    expected, found = text_of(tmp_path / "folder"), text_of(tmp_path / "zip")
    assert found.keys() == expected.keys()
    for name in expected:
        # Reports and the details of rejects name the archive.
        assert found[name] == expected[name] or name.startswith("re"), name


@pytest.mark.parametrize("kind", ["llava", "table", "folder"])
def test_what_it_writes_it_reads(tmp_path, processor, kind):
    """Also a name with a comma, which is written as a list; from any format."""
    images, names = tmp_path / "images", ["red, green.jpg", "b.png", "sub/c.jpg"]
    (images / "sub").mkdir(parents=True)
    for number, name in enumerate(names):
        picture(number, (160, 160)).save(images / name)
        if kind == "folder":
            (images / name).with_suffix(".txt").write_text(f"This is picture {number}.")
    rows = [(name, f"This is picture {number}.") for number, name in enumerate(names)]
    if kind == "llava":
        lines = [
            {"image": [name], "id": 7, "conversations": [{"from": "human", "value": "<image>?"},
                                                         {"from": "gpt", "value": answer}]}
            for name, answer in rows
        ]  # fmt: skip
        data = tmp_path / "rows.json"
        data.write_text(json.dumps(lines))
    elif kind == "table":
        data = tmp_path / "rows.csv"
        lines = [f'"{name}",{answer}' for name, answer in rows]
        data.write_text("\n".join(["image,caption", *lines]))
    else:
        data, images = images, None
    out = tmp_path / "clean"
    images = images and str(images)
    run.clean(Settings(str(data), str(out), images, val_share=0.0, processes=1))
    cleaned = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    shown = {json.dumps(row["image"]) for row in cleaned}
    assert shown == {'["red, green.jpg"]', '"b.png.jpg"', '"sub/c.jpg"'}
    assert all(row.get("id") == 7 for row in cleaned) == (kind == "llava")
    read = open_data([str(out / "train.jsonl")], [str(out / "images")], processor, 200)
    assert len(read) == 3 and not read.skipped and not read.repaired and read.n_pictures == 3
    assert all(len(read[number]["pixel_values"]) == 1 for number in range(3))


def test_no_process_outlives_a_killed_cleaning(raw, tmp_path):
    process = start_clean(raw, tmp_path / "clean")
    wait_for(process, tmp_path / ".clean.partial", "work/rows.jsonl")
    process.kill()
    # The workers hold its standard output open while they live.
    process.communicate(timeout=20)


def test_ctrl_c_stops_in_one_line_and_what_is_asked_for_stays(raw, tmp_path):
    flags = ("--keep_repeats", "--keep_duplicates")
    process = start_clean(raw, tmp_path / "clean", "--processes", "2", *flags)
    wait_for(process, tmp_path / ".clean.partial", "work/rows.jsonl")
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate()
    assert process.returncode == 130 and printed.endswith("stopped\n"), printed
    assert "Traceback" not in printed
    assert not any(tmp_path.iterdir()), "nothing is left of it"
    printed = clean(raw, tmp_path / "all", *flags)
    assert "text is repeated" not in printed and "copy" not in printed
    assert "image damaged" in printed


def test_two_cleanings_into_one_folder(tmp_path, monkeypatch):
    """The second is refused, and the work of the first stays."""
    hold = "import sys, time\nfrom pathlib import Path\nfrom dataset.clean.run import new_folder\n"
    hold += "with new_folder(Path(sys.argv[1])) as folder:\n    print(folder, flush=True)\n"
    hold += "    sys.stdin.readline()\n"
    command = [sys.executable, "-c", hold, str(tmp_path / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    monkeypatch.setattr("common.owner.LOCK_SECONDS", 0.2)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as first:
        folder = Path(first.stdout.readline().strip())
        message = r"^process \d+ .* writes .*out: wait for it, or choose another folder"
        with pytest.raises(UserError, match=message), run.new_folder(tmp_path / "out"):
            pass
        assert folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def die(*arguments) -> None:
    os._exit(9)


def fill_the_disk(*arguments) -> None:
    raise OSError(28, "No space left on device", "rows.jsonl")


def test_a_dead_worker_and_a_full_disk_are_one_line_and_leave_nothing(raw, tmp_path, monkeypatch):
    settings = Settings(str(raw / "raw.jsonl"), str(tmp_path / "out"), str(raw / "images"))
    for name, failure, message in (
        ("examine_rows", die, "a process died, perhaps for want of memory"),
        ("examine_pictures", fill_the_disk, "No space left on device.*free some space"),
        ("write_set", fill_the_disk, "No space left on device.*free some space"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(run, name, failure)
            with pytest.raises(UserError, match=message) as raised:
                run.clean(settings)
        assert "\n" not in str(raised.value) and not any(tmp_path.iterdir())


def test_two_pictures_never_share_a_file(tmp_path):
    (tmp_path / "images").mkdir()
    names = ("a.png", "a.png.jpg")
    for index, name in enumerate(names):
        picture(index, (128, 128)).save(tmp_path / "images" / name, "PNG")
    turns = [user("<image>?"), assistant("Is it?")]
    write_rows(tmp_path / "raw.jsonl", [{"image": n, "conversations": turns} for n in names * 2])
    clean(tmp_path, tmp_path / "clean", "--val_share", "0", "--max_repeats", "9")
    rows = map(json.loads, (tmp_path / "clean/train.jsonl").read_text().splitlines())
    written = [row["image"] for row in rows]
    assert written == ["a.png.jpg", "a.png.jpg.1.jpg"] * 2
    images = [Image.open(tmp_path / "clean/images" / name).tobytes() for name in written[:2]]
    assert images[0] != images[1]


def test_parquet_in_and_out(tmp_path, processor):
    rows = []
    for index in range(20):
        buffer = io.BytesIO()
        picture(index, (150, 150)).save(buffer, "PNG")
        rows.append((f"This is picture number {index}.", [buffer.getvalue()]))
    rows += [
        ("The first again, and another.", [rows[0][1][0], rows[1][1][0]]),
        ("A damaged one is here.", [b"nothing"]),
    ]
    path = write_parquet(tmp_path / "raw.parquet", rows)
    finished = run_script(
        "-m", "dataset.clean", path, tmp_path / "clean", "--format", "parquet", "--val_share", "0.1"
    )
    assert finished.returncode == 0, finished.stdout
    data = open_data(
        [str(tmp_path / "clean/train-*.parquet"), str(tmp_path / "clean/val-*.parquet")],
        None,
        processor,
        200,
    )
    assert len(data) == 21 and not data.skipped
    assert Image.open(data.read(0)[1][0]).size == (128, 128)
    rejects = parquet.read_table(tmp_path / "clean/rejects-00000.parquet").to_pylist()
    assert [(reject["row"], reject["reason"]) for reject in rejects] == [(22, "image damaged")]
    assert rejects[0]["image_bytes"] == [b"nothing"], "a row with the bytes it came with"


def test_an_archive_whose_names_leave_the_folder(tmp_path):
    buffer = io.BytesIO()
    picture(1, (64, 64)).save(buffer, "JPEG")
    write_zip(
        tmp_path / "images.zip",
        {"../../evil.jpg": buffer.getvalue(), "good.jpg": buffer.getvalue()},
    )
    rows = [
        {"image": name, "conversations": [user("<image>?"), assistant(f"It is {name}.")]}
        for name in ("../../evil.jpg", "good.jpg")
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    finished = run_script(
        "-m",
        "dataset.clean",
        tmp_path / "rows.jsonl",
        tmp_path / "a/b/clean",
        "--images",
        tmp_path / "images.zip",
    )
    assert finished.returncode == 0 and "image path leaves its folder" in finished.stdout
    assert not list(tmp_path.rglob("evil.jpg"))


def test_what_stops_a_cleaning_is_said_in_one_line(tmp_path):
    write_rows(tmp_path / "empty.jsonl", [])
    write_rows(tmp_path / "rows.jsonl", [{"conversations": [user("Q"), assistant("An answer")]}])
    for command, message in (
        (("none.jsonl", "out"), "error: no data at none.jsonl"),
        ((tmp_path / "empty.jsonl", tmp_path / "out"), "has no rows"),
        ((tmp_path / "rows.jsonl", tmp_path), "is not empty: choose a new folder"),
        (
            (tmp_path / "rows.jsonl", tmp_path / "x", "--val_share", "2"),
            "--val_share is 2.0: it has to be from 0 to 0.5",
        ),
    ):
        finished = run_script("-m", "dataset.clean", *command)
        assert (
            finished.returncode == 2
            and message in finished.stdout
            and "Traceback" not in finished.stdout
        )


@needs_shared
def test_copies_of_real_photographs_are_found(tmp_path):
    truth = plant(SHARED / "flickr8k", tmp_path, 400)
    finished = run_script(
        "-m",
        "dataset.clean",
        tmp_path / "rows.jsonl",
        tmp_path / "clean",
        "--images",
        tmp_path / "images",
    )
    assert finished.returncode == 0, finished.stdout
    rejects = [
        json.loads(line)
        for line in (tmp_path / "clean/rejects.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    found = {reject["row"] for reject in rejects if reject["reason"] in COPIES}
    precision, recall = score(found, set(truth["near copy"] + truth["exact copy"]))
    assert precision > 0.97 and recall > 0.97, (precision, recall)
    assert {r["row"] for r in rejects if r["reason"] == "image damaged"} == set(truth["truncated"])
