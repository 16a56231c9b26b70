"""Runs the example notebook; as a script (`make notebook`) it also stores the new outputs."""

from pathlib import Path

import nbformat
from conftest import HANG
from nbclient import NotebookClient

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"


def executed(path=QUICKSTART):
    """The notebook after all its cells have run, without what the machine adds: stderr (warnings of
    libraries, with their paths) and the kernel's metadata.

    Raises nbclient.exceptions.CellExecutionError for a cell that raises.
    """
    book = nbformat.read(path, as_version=4)
    limits = dict(timeout=HANG, startup_timeout=HANG)  # of a cell, of the start
    NotebookClient(book, **limits, kernel_name="python3", record_timing=False).execute()
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    book.metadata["language_info"] = {"name": "python"}
    return book


if __name__ == "__main__":
    nbformat.write(executed(), QUICKSTART)
