"""The scripts that still have the first edition's plumbing: one text, and each runs alone."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import FIRST

HEADING = "# ---- Plumbing: the same in every file"
OFFLINE = {**{k: v for k, v in os.environ.items() if k not in ("MNIST_DIR", "DISPLAY")},
           "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "",
           "OMP_NUM_THREADS": "1"}


def test_plumbing_is_one_text():
    blocks = [path.read_text(encoding="utf-8").split(HEADING)[1].split("\n# ---- ")[0]
              for path in FIRST]
    assert all(block == blocks[0] for block in blocks)


@pytest.mark.parametrize("script", FIRST, ids=lambda path: path.stem)
def test_a_copied_file_runs_alone_offline_and_without_a_screen(script, tmp_path):
    shutil.copy(script, tmp_path)
    done = subprocess.run([sys.executable, script.name, "--quick"], cwd=tmp_path, env=OFFLINE,
                          text=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=240)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    out = tmp_path / "out" / script.stem
    assert len(list(out.glob("*.png"))) >= 5 and (out / "model.pt").exists()
    assert json.loads((out / "metrics.json").read_text())["data"] == "drawn digits"
