"""The notebook runs from top to bottom, with its real model and data."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def test_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    # its modules lie beside it, what it writes goes elsewhere; the kernel is this Python, whatever is installed
    paths = [str(NOTEBOOK.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows pictures
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable
    client.execute()
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 3  # training, scores, densities
    assert (tmp_path / "runs" / "tour" / "onnx" / "model.onnx").exists()
    share = next(o for o in notebook.cells[-2].outputs if o.output_type == "execute_result")
    assert 0 < float(share.data["text/plain"]) < 1
