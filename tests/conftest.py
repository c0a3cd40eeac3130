"""What the tests share: the scripts as modules (their names start with a digit), and real data."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in the scripts, and before torch
if "MNIST_DIR" in os.environ:
    os.environ["MNIST_DIR"] = os.path.abspath(os.environ["MNIST_DIR"])

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)  # two threads on one free core would wait for each other
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("[0-9][0-9]_*.py"))


def load_script(path):
    """Imports one numbered file as a module of its own."""
    spec = importlib.util.spec_from_file_location("script_" + path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


FOLDER = Path(tempfile.mkdtemp())
COPIES = {}  # script: the future of its process


def run_copy(script):
    """One --quick run of a copy of a script, alone in a folder, without screen, network and real
    data; returns the process and the folder."""
    folder = FOLDER / script.stem / "elsewhere ünder"
    folder.mkdir(parents=True)
    shutil.copy(script, folder)
    env = {k: v for k, v in os.environ.items() if k not in ("MNIST_DIR", "DISPLAY", "MPLBACKEND")}
    env |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "",
            "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}  # as on an old Windows
    command = [sys.executable, str(folder / script.name), "--quick"]
    done = subprocess.run(command, cwd=folder, env=env, text=True, stdin=subprocess.DEVNULL,
                          capture_output=True, timeout=240)
    return done, folder


def pytest_collection_finish(session):
    """The copies run one after the other, on the second core, while the tests run on the first."""
    pool = ThreadPoolExecutor(1)
    for item in session.items:
        if item.name.startswith("test_a_copied_file_runs"):
            script = item.callspec.params["script"]
            COPIES[script] = pool.submit(run_copy, script)


def pytest_sessionfinish():
    for future in COPIES.values():
        future.cancel()
    shutil.rmtree(FOLDER, ignore_errors=True)


@pytest.fixture(scope="session")
def real_data():
    """The folder of the real MNIST files; tests that want it are skipped where it is not set."""
    folder = os.environ.get("MNIST_DIR")
    if not folder:
        pytest.skip("the real MNIST is not here: set MNIST_DIR to the folder of its four files")
    return Path(folder)


@pytest.fixture(autouse=True)
def the_same_start_for_every_test(tmp_path, monkeypatch):
    """Scripts make their folder where they run, and leave figures open for a notebook."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
