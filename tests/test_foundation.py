"""What every script promises: it runs alone, says what is wrong, and loses nothing."""

import ast
import functools
import gzip
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from conftest import ROOT, SCRIPTS, load_script

PLUMBING = "# ---- Plumbing: the same in every file"
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
first = load_script(SCRIPTS[0])
OFFLINE = {**{k: v for k, v in os.environ.items() if k not in ("MNIST_DIR", "DISPLAY")},
           "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "",
           "OMP_NUM_THREADS": "1"}  # two threads on one free core wait for each other


def run(script, *flags, cwd, **more):
    """One script in a process of its own, without screen, network and real data."""
    return subprocess.run([sys.executable, str(script), *flags], cwd=cwd, env=OFFLINE, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=240, **more)


def inside(script, *flags):
    """The same in this process, which has torch already. Returns the exit code, the module."""
    module = load_script(script)
    return module.main(["--quick", "--data", "drawn", *flags]), module


@functools.lru_cache
def quick_run(script, folder):
    """A copy of one script, run alone with --quick from elsewhere; shared by several tests."""
    alone, elsewhere = folder / "alone ünder", folder / "elsewhere"
    alone.mkdir(), elsewhere.mkdir()
    shutil.copy(script, alone)
    began = time.time()
    done = run(alone / script.name, "--quick", cwd=elsewhere)
    return alone / script.name, elsewhere / "out" / script.stem, done, time.time() - began


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    folders = {}
    return lambda script: quick_run(
        script, folders.setdefault(script, tmp_path_factory.mktemp(script.stem)))


def same_numbers(metrics):
    """What the same seed has to repeat: all but the clock and the folder."""
    settings = {k: v for k, v in metrics["settings"].items() if k != "out"}
    results = {k: v for k, v in metrics["results"].items() if "seconds" not in k}
    return {**metrics, "settings": settings, "results": results, "seconds": 0,
            "images_per_second": 0}


# ---- Form ----------------------------------------------------------------------------------------


def test_plumbing_is_one_text():
    texts = {script.stem: script.read_text(encoding="utf-8") for script in SCRIPTS}
    blocks = {name: text.split(PLUMBING)[1].split("\n# ---- ")[0] for name, text in texts.items()}
    for name, block in blocks.items():
        assert block == next(iter(blocks.values())), f"{name} differs from {SCRIPTS[0].stem}"


@each_script
def test_imports_are_the_standard_library_torch_numpy_matplotlib(script):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in names}
    assert roots <= set(sys.stdlib_module_names) | {"torch", "numpy", "matplotlib"}
    assert not {name for name in names if "pyplot" in name}  # it wants a screen


@each_script
def test_lines_are_at_most_100_characters_wide(script):
    wide = [i for i, line in enumerate(script.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > 100]
    assert not wide


@each_script
def test_every_setting_has_a_comment_and_a_flag(script, capsys):
    source = script.read_text(encoding="utf-8").split("class Config:")[1].split("\n\n")[0]
    fields = re.findall(r"^    (\w+): \w+ = ", source, re.M)
    assert {"data", "out", "device", "seed", "epochs", "batch_size", "lr", "train_size", "load",
            "quick"} <= set(fields)
    with pytest.raises(SystemExit) as end:
        load_script(script).parse(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for name in fields:
        assert re.search(rf"^  --{name.replace('_', '-')} .*\w", text, re.M), name


@each_script
def test_nothing_runs_at_import(script, tmp_path):
    code = ("import importlib.util as u, sys; s = u.spec_from_file_location('m', sys.argv[1]); "
            "m = u.module_from_spec(s); sys.modules['m'] = m; s.loader.exec_module(m); "
            "assert 'matplotlib.pyplot' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code, str(script)], cwd=tmp_path, env=OFFLINE,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


# ---- A run ---------------------------------------------------------------------------------------


@each_script
def test_a_copied_file_runs_alone_offline_and_without_a_screen(script, shared):
    _, out, done, seconds = shared(script)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and seconds < 90
    said = [line for line in done.stdout.splitlines() if not line.startswith("downloading")]
    assert "cannot be downloaded" in said[0] and "digits drawn" in said[1]
    pictures = sorted(out.glob("*.png"))
    assert len(pictures) >= 5 and all(p.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for p in pictures)
    assert not list(out.glob("*.part")) and not list(out.glob(".*"))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["data"] == "drawn digits" and metrics["settings"]["quick"] is True
    assert metrics["history"] and metrics["results"] and metrics["torch"] == torch.__version__
    assert metrics["seconds"] > 0 and metrics["images_per_second"] > 0
    kept = torch.load(out / "model.pt", weights_only=True)
    assert kept["script"] == script.stem and kept["settings"] == metrics["settings"]
    if (out / "samples.npz").exists():
        images = np.load(out / "samples.npz")["images"]
        assert images.dtype == np.uint8 and images.shape[1:] == (28, 28)
        assert len(images) == metrics["settings"]["samples"]


@each_script
def test_the_same_seed_gives_the_same_numbers(script, shared, tmp_path):
    _, out, *_ = shared(script)
    assert inside(script, "--out", str(tmp_path))[0] == 0
    one = json.loads((out / "metrics.json").read_text())
    two = json.loads((tmp_path / script.stem / "metrics.json").read_text())
    two["settings"]["data"] = ""
    assert same_numbers(one) == same_numbers(two)


@each_script
def test_saved_weights_can_be_evaluated(script, shared, tmp_path):
    _, out, *_ = shared(script)
    flags = ["--epochs", "0", "--load", str(out / "model.pt"), "--out", str(tmp_path)]
    assert inside(script, *flags)[0] == 0
    metrics = json.loads((tmp_path / script.stem / "metrics.json").read_text())
    assert metrics["history"] == json.loads((out / "metrics.json").read_text())["history"]
    assert len(list((tmp_path / script.stem).glob("*.png"))) >= 4
    assert not (tmp_path / script.stem / "model.pt").exists()  # nothing was trained


@each_script
def test_weights_that_do_not_fit_are_refused(script, shared, tmp_path):
    copy, out, *_ = shared(script)
    kept = torch.load(out / "model.pt", weights_only=True)
    foreign, other, broken, cut, bent = (tmp_path / f"{i}.pt" for i in range(5))
    torch.save({**kept, "script": "99_other"}, foreign)
    setting = load_script(script).SHAPES[0]
    torch.save({**kept, "settings": {**kept["settings"], setting: 77}}, other)
    broken.write_bytes(b"not a checkpoint")
    whole = bytearray((out / "model.pt").read_bytes())
    cut.write_bytes(whole[:5000])
    whole[len(whole) // 2] ^= 4  # one bit, in the middle of a weight
    bent.write_bytes(whole)
    for path, word in ((foreign, "99_other"), (other, f"{setting} is 77"), (broken, "checkpoint"),
                       (cut, "checkpoint"), (bent, "checkpoint"), (tmp_path / "none.pt", "No such file")):
        with pytest.raises(SystemExit, match=word) as end:
            inside(script, "--load", str(path), "--out", str(tmp_path))
        assert path.name in end.value.code and "\n" not in end.value.code
    if script == SCRIPTS[0]:  # and so it looks from outside
        done = run(copy, "--quick", "--data", "drawn", "--load", str(cut), cwd=tmp_path)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr


WRONG = [("--epochs -1", "epochs"), ("--batch-size 0", "batch-size"), ("--lr nan", "lr"),
         ("--device tpu", "auto|cuda|mps|cpu"), ("--seed x", "seed"), ("--epoch 1", "epoch"),
         ("--no-such-flag", "no-such-flag"), ("--epochs 0", "load"),
         ("stray", "stray"), ("--epochs", "epochs")]


@each_script
def test_wrong_flags_get_one_sentence_and_code_2(script, tmp_path, capsys):
    if script == SCRIPTS[0]:
        done = run(script, *WRONG[0][0].split(), cwd=tmp_path)
        assert done.returncode == 2 and "epochs" in done.stderr
        assert len(done.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []
    module = load_script(script)
    for flags, word in WRONG:
        with pytest.raises(SystemExit) as end:
            module.parse(flags.split())
        error = capsys.readouterr().err
        assert end.value.code == 2 and word in error and len(error.splitlines()) == 1, flags
    assert module.parse(["--epochs", "0", "--load", "x"]).epochs == 0
    assert module.parse([]) == module.Config()
    quick = module.parse(["--quick", "--epochs", "7"])  # what is asked for wins over --quick
    assert quick.epochs == 7 and quick.train_size == module.PRESETS["quick"]["train_size"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_wrong_use(tmp_path):
    done = run(SCRIPTS[0], "--device", "cuda", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(SCRIPTS[0].name) and "cuda" in done.stderr


def test_output_that_cannot_be_written_is_said_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run(SCRIPTS[0], "--quick", "--out", "file", cwd=tmp_path)
    assert done.returncode == 1 and "file" in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        return  # root may write anywhere
    done = run(SCRIPTS[0], "--quick", "--out", "locked", cwd=tmp_path)
    assert done.returncode == 1 and "locked" in done.stderr and len(done.stderr.splitlines()) == 1


# ---- Interrupted, full, not finite ---------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_training_and_a_second_one_the_script(times, tmp_path):
    script = SCRIPTS[0]
    process = subprocess.Popen(
        [sys.executable, "-u", str(script), "--quick", "--data", "drawn", "--epochs", "100000"],
        cwd=tmp_path, env=OFFLINE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while "images/s" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C" in process.stderr.readline() + process.stderr.readline()
    if times == 2:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors
    out = tmp_path / "out" / script.stem
    if times == 1:
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["interrupted"] and metrics["history"] and (out / "model.pt").exists()
        assert len(list(out.glob("*.png"))) >= 5
    assert not list(out.glob("*.part"))


@each_script
def test_an_interrupted_training_is_evaluated_drawn_and_saved(script, tmp_path, monkeypatch):
    module = load_script(script)
    log, calls = module.Run.log, []

    def interrupt(run, **terms):
        log(run, **terms)
        calls.append(run.step)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module.Run, "log", interrupt)
    monkeypatch.setattr(sys.modules[__name__], "load_script", lambda _: module)
    assert inside(script, "--epochs", "1000", "--out", str(tmp_path))[0] == 130
    out = tmp_path / script.stem
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(calls) == 3 and metrics["interrupted"] and len(metrics["history"]) == 1
    assert (out / "model.pt").exists() and len(list(out.glob("*.png"))) >= 5


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:2])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        first.whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_closed_pipe_ends_training_as_ctrl_c_does(tmp_path):
    script = SCRIPTS[0]
    process = subprocess.Popen(
        [sys.executable, "-u", str(script), "--quick", "--data", "drawn", "--epochs", "100000"],
        cwd=tmp_path, env=OFFLINE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 130 and process.stderr.read() == b""
    metrics = json.loads((tmp_path / "out" / script.stem / "metrics.json").read_text())
    assert metrics["interrupted"] and (tmp_path / "out" / script.stem / "model.pt").exists()


def test_a_line_of_config_that_would_be_no_flag_is_named(tmp_path, capsys):
    text = SCRIPTS[0].read_text(encoding="utf-8")
    at = text.index("    seed: int")
    for line, code, word in (("beta: float = 4.0  # weight, 50% is half [0..100]", 0, "50% is half"),
                             ("beta: float = 4.0 # weight", 2, "beta")):
        copy = tmp_path / "copy.py"
        copy.write_text(f"{text[:at]}    {line}\n{text[at:]}", encoding="utf-8")
        with pytest.raises(SystemExit) as end:
            load_script(copy).parse(["--help"] if code == 0 else [])
        assert end.value.code == code and word in "".join(capsys.readouterr())


def test_launch_turns_foreseeable_faults_into_sentences(capsys):
    def raises(fault):
        def main():
            raise fault
        return main

    for fault, code in ((OSError(28, "No space left on device", "x.png"), 1),
                        (torch.cuda.OutOfMemoryError("CUDA out of memory"), 1), (MemoryError(), 1),
                        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1),
                        (SystemExit("no good"), 1), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as end:
            first.launch(raises(fault))
        assert end.value.code == code
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and error.startswith(SCRIPTS[0].name)
    for mistake in (ZeroDivisionError(), RuntimeError("shapes differ")):  # keeps its traceback
        with pytest.raises(type(mistake)):
            first.launch(raises(mistake))


def test_a_loss_that_is_not_finite_stops_the_run_and_overwrites_nothing(tmp_path):
    config = first.Config(out=str(tmp_path), epochs=3, batch_size=4, device="cpu")
    job = first.Run(config)
    (job.out / "model.pt").write_bytes(b"old")
    for loss, test in ((float("nan"), 0.0), (0.0, float("inf"))):  # trained on, or tested with
        job.step = 0
        with pytest.raises(SystemExit, match="not finite after 5 steps"):
            for _ in job.batches(20, lambda: {"test": test}):
                job.log(loss=torch.tensor(loss))
    assert (job.out / "model.pt").read_bytes() == b"old" and job.history == []


def test_batches_cover_every_image_once_an_epoch_and_count_time(tmp_path, capsys):
    job = first.Run(first.Config(out=str(tmp_path), epochs=2, batch_size=5, device="cpu"))
    seen = []
    for index in job.batches(20, lambda: {"extra": 1.0}, per_epoch=2):
        assert job.step == len(seen) and job.steps == 8
        seen.append(index)
        job.log(loss=torch.tensor(float(job.step)))
    for epoch in (seen[:4], seen[4:]):
        assert torch.cat(epoch).sort().values.tolist() == list(range(20))
    assert [row["epoch"] for row in job.history] == [0.5, 1.0, 1.5, 2.0]
    assert [row["loss"] for row in job.history] == [0.5, 2.5, 4.5, 6.5]  # means of two steps
    assert all(row["extra"] == 1 for row in job.history)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("images/s" in line and "left" in line for line in lines)
    job.step, job.history = 0, job.history[:3]  # goes on from weights saved at 1.5 epochs
    for _ in job.batches(20):
        job.log(loss=torch.tensor(0.0))
    assert [row["epoch"] for row in job.history[3:]] == [2.5, 3.5]


def test_in_a_terminal_one_line_is_rewritten_and_never_wider_than_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    job = first.Run(first.Config(out=str(tmp_path), epochs=1, batch_size=1, device="cpu"))
    for _ in job.batches(30):
        time.sleep(0.05)
        job.log(loss=torch.tensor(1.0), another=torch.tensor(2.0), third=torch.tensor(3.0))
    shown = capsys.readouterr().out
    *passing, last = re.split("\r", shown.rstrip("\n"))
    assert shown.count("\n") == 1 and 2 <= len(passing) <= 5 and "loss 1  " in shown
    assert all(len(line) <= 60 for line in passing) and last.endswith("third 3")  # whole


def test_drawn_digits_are_named_in_every_figure_and_in_the_metrics(tmp_path):
    job = first.Run(first.Config(out=str(tmp_path), device="cpu"))
    for job.dataset, ending in (("drawn digits", "title (drawn digits)"), ("mnist", "title")):
        figure = first.Figure()
        job.figure("picture", "title", figure)
        assert figure.get_suptitle() == ending
        job.finish(value=1)
        metrics = json.loads((job.out / "metrics.json").read_text())
        assert metrics["data"] == job.dataset and metrics["results"] == {"value": 1}


def test_data_of_ones_own_takes_the_place_of_run_data(tmp_path, monkeypatch):
    module = load_script(SCRIPTS[0])
    own = [*module.draw_characters(200, 5), *module.draw_characters(100, 6)]
    monkeypatch.setattr(module.Run, "data", lambda run: own)
    assert module.main(["--quick", "--out", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / SCRIPTS[0].stem / "metrics.json").read_text())
    assert metrics["data"] == "data of your own"


def test_samples_are_kept_as_bytes(tmp_path):
    job = first.Run(first.Config(out=str(tmp_path), device="cpu"))
    levels = torch.arange(784).remainder(256).byte().view(1, 1, 28, 28)
    low, high = first.PIXELS
    job.samples(levels.float() / 255 * (high - low) + low, labels=torch.tensor([7]))
    with np.load(job.out / "samples.npz") as kept:
        assert kept["images"].tolist() == levels[0].tolist() and kept["labels"].tolist() == [7]


# ---- Data ----------------------------------------------------------------------------------------


def idx(array):
    """A uint8 array as the bytes of an IDX file."""
    return struct.pack(f">{1 + array.ndim}i", 2048 + array.ndim, *array.shape) + array.tobytes()


RANDOM = np.random.default_rng(0)
SMALL = {"train-images-idx3-ubyte": RANDOM.integers(0, 256, (6, 28, 28), dtype=np.uint8),
         "train-labels-idx1-ubyte": np.arange(6, dtype=np.uint8),
         "t10k-images-idx3-ubyte": RANDOM.integers(0, 256, (3, 28, 28), dtype=np.uint8),
         "t10k-labels-idx1-ubyte": np.arange(3, dtype=np.uint8)}


class Mirror:
    """A web server on the loopback that gives the small files, spoilt in a chosen way."""

    def __init__(self, spoil):
        files = {f"/{name}.gz": gzip.compress(idx(array)) for name, array in SMALL.items()}
        asked = self.asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                data = files[self.path]
                if spoil == "missing":
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if spoil == "wrong":
                    data = gzip.compress(b"something else").ljust(len(data), b"\0")
                self.wfile.write(data[:len(data) // 2] if spoil == "cut" else data)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/"


@pytest.fixture
def mirrors(monkeypatch):
    """Puts mirrors of the small files in the place of the real ones."""
    started = []

    def start(*ways):
        started.extend(Mirror(way) for way in ways)
        monkeypatch.setattr(first, "MIRRORS", [mirror.url for mirror in started])
        monkeypatch.setattr(first, "MNIST", {
            name: hashlib.sha256(idx(array)).hexdigest() for name, array in SMALL.items()})
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        return started

    yield start
    for mirror in started:
        mirror.server.shutdown()
        mirror.server.server_close()


def check_small(arrays):
    for array, expected in zip(arrays, SMALL.values()):
        assert array.numpy().astype(np.uint8).tolist() == expected.tolist()
    assert arrays[0].dtype == torch.uint8 and arrays[1].dtype == torch.int64


@pytest.mark.parametrize("spoil", ["missing", "wrong", "cut"])
def test_what_one_mirror_spoils_the_next_one_gives(spoil, mirrors, tmp_path):
    bad, good = mirrors(spoil, "good")
    check_small(first.load_mnist(tmp_path / "new" / "mnist"))
    assert len(bad.asked) == len(good.asked) == 4
    assert sorted(p.name for p in (tmp_path / "new" / "mnist").iterdir()) == sorted(
        name + ".gz" for name in SMALL)
    check_small(first.load_mnist(tmp_path / "new" / "mnist"))
    assert len(good.asked) == 4  # the second time nothing was asked for


@pytest.mark.parametrize("spoil", ["missing", "wrong", "cut"])
def test_where_all_mirrors_fail_digits_are_drawn(spoil, mirrors, tmp_path, capsys):
    mirrors(spoil, spoil)
    with pytest.raises(ConnectionError):
        first.load_mnist(tmp_path / "mnist")
    assert not (tmp_path / "mnist").exists()
    job = first.Run(first.Config(out=str(tmp_path), data=str(tmp_path / "mnist"), train_size=50))
    images, labels, _, test_labels = job.data()
    assert job.dataset == "drawn digits"
    assert images.shape == (50, 28, 28) and len(test_labels) == 100  # enough to draw
    assert "drawn" in capsys.readouterr().out


def test_files_of_the_user_are_taken_as_they_are(mirrors, tmp_path):
    (mirror,) = mirrors("missing")
    for i, (name, array) in enumerate(SMALL.items()):  # some gzipped, some not, none of them MNIST
        data = idx(255 - array if "images" in name else array)
        (tmp_path / (name + ".gz" * (i % 2))).write_bytes(gzip.compress(data) if i % 2 else data)
    arrays = first.load_mnist(tmp_path)
    assert (255 - arrays[0].numpy()).tolist() == SMALL["train-images-idx3-ubyte"].tolist()
    assert mirror.asked == []


@pytest.mark.parametrize("name, data", [
    ("train-images-idx3-ubyte", idx(SMALL["train-images-idx3-ubyte"])[:-1]),
    ("train-images-idx3-ubyte", idx(SMALL["train-images-idx3-ubyte"]) + b"\0"),
    ("train-images-idx3-ubyte", idx(SMALL["train-images-idx3-ubyte"][:, :27])),
    ("train-images-idx3-ubyte", idx(SMALL["train-labels-idx1-ubyte"])),
    ("train-images-idx3-ubyte", b"<html>not found</html>"),
    ("t10k-images-idx3-ubyte", b""),
    ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(SMALL["t10k-images-idx3-ubyte"]))[:-9]),
    ("train-labels-idx1-ubyte", idx(np.arange(5, dtype=np.uint8))),
    ("train-labels-idx1-ubyte", idx(np.arange(6, dtype=np.uint8) + 9)),
    ("train-labels-idx1-ubyte", b"\0\0\x0d\x01" + idx(np.arange(6, dtype=np.uint8))[4:])])
def test_a_malformed_file_is_named(name, data, tmp_path):
    for other, array in SMALL.items():
        if other != name.removesuffix(".gz"):
            (tmp_path / other).write_bytes(idx(array))
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SystemExit, match=name + ".*(delete|replace)") as end:
        first.load_mnist(tmp_path)
    assert isinstance(end.value.code, str)  # exit code 1, and the sentence


def test_real_files_are_whole(real_data):
    train, train_labels, test, test_labels = first.load_mnist(real_data)
    assert train.shape == (60000, 28, 28) and test.shape == (10000, 28, 28)
    assert train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert train.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)


def test_drawn_characters_repeat_vary_and_can_be_told_apart():
    images, labels = first.draw_characters(3000, 0)
    again, labels_again = first.draw_characters(3000, 0)
    assert images.equal(again) and labels.equal(labels_again)
    assert not images.equal(first.draw_characters(3000, 1)[0])
    assert images.dtype == torch.uint8 and images.shape == (3000, 28, 28)
    assert labels.unique().tolist() == list(range(10)) and labels.bincount().min() > 200
    ink = images.float().mean((1, 2)) / 255
    assert 0.02 < ink.min() and ink.max() < 0.6  # no empty and no flooded image
    x = images.float().flatten(1) / 255  # nearest neighbor among the others: chance is 0.1
    distance = torch.cdist(x[:500], x[500:])
    right = labels[500:][distance.argmin(1)] == labels[:500]
    assert 0.8 < right.float().mean() and distance.min() > 0
    letters, places = first.draw_characters(40, 0, "ABC")
    assert letters.shape == (40, 28, 28) and places.unique().tolist() == [0, 1, 2]
