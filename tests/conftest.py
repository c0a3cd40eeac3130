"""What the tests share: the scripts as modules (their names start with a digit), and real data."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # in many small steps two threads on one free core wait for each other
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("[0-9][0-9]_*.py"))


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
