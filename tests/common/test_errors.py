"""What a script prints when something is wrong: one line, in whatever letters the reader has."""

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT, TOKENIZER, assistant, picture, run_cold, user, write_rows

RUN = "from common.errors import UserError, run_command\ndef main():\n    {}\nrun_command(main)"
ENCODINGS = ["cp1252", "gbk", "ascii"]


def run_main(body: str, **env: str) -> subprocess.CompletedProcess:
    """A script whose main is `body`; what it prints stays bytes."""
    return subprocess.run(
        [sys.executable, "-c", RUN.format(body)],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("encoding", "shown"), [("cp1252", "??é?"), ("gbk", "颜色é?"), ("ascii", "????")]
)
def test_letters_that_cannot_be_shown_are_replaced(encoding, shown):
    finished = run_main("print('颜色é😀'); raise UserError('颜色é😀')", PYTHONIOENCODING=encoding)
    assert finished.stdout.decode(encoding).strip() == shown
    assert finished.stderr.decode(encoding).strip() == f"error: {shown}"
    assert finished.returncode == 2


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "script", ["train_pretrain_vlm.py", "train_sft_vlm.py", "eval_vlm.py", "web_demo_vlm.py"]
)
def test_help_is_shown_everywhere(script, encoding):
    finished = run_cold(script, "--help", env={"PYTHONIOENCODING": encoding})
    assert finished.returncode == 0 and "--tokenizer" in finished.stdout


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_preview_of_chinese_rows_is_shown_everywhere(tmp_path, encoding):
    picture().save(tmp_path / "猫😀.png")
    turns = [user("<image>\n它是什么颜色的？"), assistant("红色，é😀。")]
    rows = [{"conversations": turns, "image": "猫😀.png"}, {"image": "没有.png"}]
    path = write_rows(tmp_path / "数据😀.jsonl", rows)
    flags = ["--images", tmp_path, "--tokenizer", TOKENIZER, "--out_dir", tmp_path / "输出"]
    finished = subprocess.run(
        [sys.executable, "-m", "dataset.preview", *map(str, [path, *flags])],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    assert "?.jsonl" in finished.stdout.decode(encoding)


def test_what_the_system_refuses_is_one_line(tmp_path):
    for path, reason in (("x" * 300, "File name too long"), ("file/x", "Not a directory")):
        (tmp_path / "file").write_text("")
        finished = run_main(f"open({str(tmp_path / path)!r}, 'rb')")
        printed = finished.stderr.decode()
        assert finished.returncode == 2 and printed.startswith(f"error: {tmp_path}"), printed
        assert printed.endswith(f": {reason}\n") and printed.count("\n") == 1


def test_a_mistake_in_the_code_keeps_its_traceback():
    finished = run_main("1 / 0")
    assert finished.returncode == 1 and b"Traceback" in finished.stderr


def test_a_reader_who_has_enough_ends_a_script_in_silence():
    finished = subprocess.run(
        f'{sys.executable} -c "{RUN.format("[print(n) for n in range(10**6)]")}" | head -n 1',
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (finished.stdout, finished.stderr) == ("0\n", "")
