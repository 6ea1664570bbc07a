"""docs/lesson.ipynb is docs/lesson.py, runs as it stands, and what it claims is so."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from torch.nn import functional

from scripts.lesson import NOTEBOOK, read_lesson, run_notebook
from tests.helpers import ROOT, small_model


def run_lesson(root: Path) -> str:
    """What all cells of the lesson print, in a copy of what it needs."""
    for room in ("common", "model", "dataset", "inference", "trainer", "docs"):
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    notebook = read_lesson()
    before = {path.relative_to(root) for path in root.rglob("*")}
    with pytest.MonkeyPatch.context() as patch:
        # Only the copy is found: no other code, and no file of this folder.
        patch.setenv("PYTHONPATH", str(root))
        patch.setenv("OMP_NUM_THREADS", "1")
        seconds = run_notebook(notebook, root / "docs")
    print("seconds of the slowest cells:", sorted(seconds, reverse=True)[:5])

    # It leaves nothing behind, and draws its figures.
    left = {path.relative_to(root) for path in root.rglob("*")} - before
    assert not [path for path in left if "__pycache__" not in path.parts]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 12
    return "".join(output.get("text", "") for output in outputs)


def test_the_notebook_is_the_text_file():
    """As `python -m scripts.lesson` writes it: the same cells, with figures to look at."""
    notebook, lesson = nbformat.read(NOTEBOOK, 4), read_lesson()
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in lesson.cells
    ], "run python -m scripts.lesson"
    assert NOTEBOOK.stat().st_size < 1.5e6
    assert NOTEBOOK.read_text(encoding="utf-8").count('"image/png"') == 12
    assert str(ROOT) not in NOTEBOOK.read_text(encoding="utf-8")


def test_cells_are_short():
    """An idea in words comes before the code, and a cell of code fits a projector."""
    cells = read_lesson().cells
    lengths = [len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code"]
    assert max(lengths) <= 20 and sorted(lengths)[len(lengths) * 3 // 4] <= 15


def test_it_runs_and_what_it_claims_is_so(tmp_path):
    """One test, since all of it is one run of 40 seconds."""
    printed = run_lesson(tmp_path)
    assert re.search(r"^right answers: [23] of 3$", printed, re.MULTILINE), printed

    # the splice, and what learns
    assert "219 tokens, 196 of them are @" in printed
    assert "rows that the splice changed: 196, all of them @: True" in printed
    assert "the same rows, by hand: True" in printed
    assert "pretraining: 3,212,800 parameters learn" in printed
    assert "SFT: 26,223,616 parameters learn" in printed

    # twenty steps lower the loss
    first, last = re.search(r"in step 1: ([\d.]+), in step 20: ([\d.]+)", printed).groups()
    assert float(last) < 0.6 * float(first)

    # it looks at what it is asked about
    pattern = r"head \d: (\d+)% of its attention\nis on the thing, which covers (\d+)%"
    share, area = re.search(pattern, printed).groups()
    assert int(share) > 2 * int(area)

    # the right picture is answered right
    n_right = {name: int(n) for name, n in re.findall(r"'(\w+) picture': (\d+)", printed)}
    assert n_right["right"] >= 7 and n_right["right"] > max(n_right["wrong"], n_right["no"]) + 2


def test_the_attention_it_computes_is_that_of_the_model(monkeypatch):
    """Its readable code, beside what PyTorch's own attention gets."""
    (source,) = [cell.source for cell in read_lesson().cells if "def find_attention" in cell.source]
    names = {"torch": torch}
    exec(source, names)
    model, expected = small_model(), []
    attend = functional.scaled_dot_product_attention

    def watch(queries, keys, values, *args, **options):
        keys_of_heads = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        scores = queries[0, :, -1:] @ keys_of_heads[0].transpose(1, 2) / keys.shape[-1] ** 0.5
        expected.append(scores[:, 0].softmax(dim=-1))
        return attend(queries, keys, values, *args, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watch)
    embeddings = torch.randn(1, 12, model.config.dim)
    with torch.no_grad():
        model.run_layers(embeddings)
    wanted, expected = torch.stack(expected), []
    torch.testing.assert_close(names["find_attention"](model, embeddings), wanted)
