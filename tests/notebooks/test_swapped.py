"""The notebooks' claims are about the reconstructions: with random images of the same generator they fail."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
SWAP = """
import torch
import smi
from smi.runtime.compute import predict
from smi.priors.base import sample_latents


def random_samples(model, prior, method, *, per_class=30, selection=None, classes=None, seed=0):
    with torch.no_grad():
        images = prior.generate(sample_latents(prior, 400 * per_class, torch.Generator().manual_seed(seed))).clamp(0, 1)
    labels = predict(model, images).argmax(1)
    chosen = torch.cat([(labels == label).nonzero()[:per_class, 0] for label in range(10)])
    return smi.Samples(images[chosen], labels[chosen], 10, method.name)


smi.invert = random_samples
"""


@pytest.mark.parametrize("name", ["05_measure_stability", "06_stabilise_the_inversion", "07_remove_without_data"])
def test_random_samples_in_place_of_reconstructions_turn_a_notebook_red(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SWAP))
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    with pytest.raises(CellExecutionError, match="This does not hold here"):
        client.execute()
