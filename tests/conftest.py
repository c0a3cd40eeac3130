"""What the tests share: the scripts as modules (their names start with a digit), and real data."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in the scripts, and before torch

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)  # two threads on one free core would wait for each other
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("[0-9][0-9]_*.py"))
PLUMBING = "# ---- Plumbing: data and files, the same in every script"


def load_script(path):
    """Imports one numbered file as a module of its own."""
    spec = importlib.util.spec_from_file_location("script_" + path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def real_data():
    """The folder of the real MNIST files; tests that want it are skipped where it is not set."""
    folder = os.environ.get("MNIST_DIR")
    if not folder:
        pytest.skip("the real MNIST is not here: set MNIST_DIR to the folder of its four files")
    return Path(folder)


@pytest.fixture(autouse=True)
def close_figures():
    """The scripts leave their figures open, so that a notebook shows them."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
