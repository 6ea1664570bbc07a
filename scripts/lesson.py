"""python -m scripts.lesson: make docs/lesson.ipynb from docs/lesson.py, and run it. 2 minutes."""

import os
import time
from itertools import pairwise
from pathlib import Path

from common.errors import UserError, run_command
from common.files import write_text
from model.files import ROOT

SOURCE = ROOT / "docs" / "lesson.py"
NOTEBOOK = SOURCE.with_suffix(".ipynb")
CELL_SECONDS = 300  # most for one cell


def read_lesson():
    """The notebook that docs/lesson.py describes, without outputs."""
    import jupytext

    notebook = jupytext.read(SOURCE)
    # Numbered, not random: what did not change does not differ.
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    return notebook


def run_notebook(notebook, folder: Path = SOURCE.parent) -> list[float]:
    """Run all cells, as if the notebook lay in `folder`; returns the seconds of each.

    UserError shows the cell that fails.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    # Figures go into the notebook, whatever is set here; tqdm asks for a package that only draws
    # its bars in another way.
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    env.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        # A progress bar is one line, not one for each of its states.
        coalesce_streams=True,
    )
    # Cells run one after the other: what is between two starts is the time of one.
    starts = []
    client.on_cell_start = lambda **_: starts.append(time.perf_counter())
    try:
        client.execute(env=env)
    except CellExecutionError as error:
        raise UserError(f"{SOURCE.name} fails: {error}") from error
    starts.append(time.perf_counter())
    return [end - start for start, end in pairwise(starts)]


def main() -> None:
    import nbformat

    notebook = read_lesson()
    seconds = run_notebook(notebook)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    write_text(NOTEBOOK, nbformat.writes(notebook))
    print(
        f"written: {NOTEBOOK.relative_to(ROOT)}, {NOTEBOOK.stat().st_size / 1e6:.2f} MB; "
        f"{sum(seconds):.0f} s, the slowest cell {max(seconds):.0f} s"
    )


if __name__ == "__main__":
    run_command(main)
