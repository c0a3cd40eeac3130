"""As test_scripts.py, for the scripts that have no table SETTINGS."""

import ast
import gzip
import hashlib
import http.server
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from conftest import COPIES, OFFLINE, SCRIPTS, WITH_TABLE, load_script, run

PLUMBING = "# ---- Plumbing: data and files, the same in every script"
SCRIPTS = [script for script in SCRIPTS if script not in WITH_TABLE]

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
first = load_script(SCRIPTS[0])  # the plumbing is one text, so one script is enough to test it


def run_main(module, folder, *flags, train=160, test=64):
    """`main` in this process, with --quick on a few drawn digits; returns the folder of results."""
    data = folder / f"digits_{train}_{test}"
    if not data.exists():
        write_data(data, drawn(train, test))
    module.main(["--quick", "--data", str(data), "--batch-size", "32", "--device", "cpu",
                 "--out", str(folder), *flags])
    return folder / module.__name__.removeprefix("script_")


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)


def rows_of(history):
    """The rows of a history, of all models where there are several."""
    return history if isinstance(history, list) else sum(history.values(), [])


# ---- Form -------------------------------------------------------------------------------------


def test_plumbing_is_one_text():
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8").split(PLUMBING)[1]
        assert text == SCRIPTS[0].read_text(encoding="utf-8").split(PLUMBING)[1], script.name


@each_script
def test_imports_are_the_standard_library_torch_numpy_matplotlib(script):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in names}
    assert roots <= set(sys.stdlib_module_names) | {"torch", "numpy", "matplotlib"}


@each_script
def test_nothing_runs_at_import(script, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    load_script(script)
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


# ---- A run ------------------------------------------------------------------------------------


@each_script
def test_a_copied_file_runs_alone_offline_and_without_a_screen(script):
    done, folder = COPIES[script].result()
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert "data: drawn digits (not MNIST)" in lines and "drawn digits (not MNIST)" in lines[-1]
    assert sum(line.startswith("step ") for line in lines) >= 5
    assert sorted(path.name for path in folder.iterdir()) == [script.name, "out"]
    out = folder / "out" / script.stem
    pictures = list(out.glob("*.png"))
    assert 1 <= len(pictures) <= 4
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in pictures)
    others = {path.name for path in out.iterdir()} - {path.name for path in pictures}
    assert {"model.pt", "metrics.json"} <= others <= {"model.pt", "metrics.json", "samples.npz"}
    metrics = metrics_of(out)
    assert metrics["data"] == "drawn digits (not MNIST)" and metrics["torch"] == torch.__version__
    assert metrics["settings"]["quick"] is True and metrics["seconds"] > 0
    assert rows_of(metrics["history"]) and metrics["results"]
    checkpoint = torch.load(out / "model.pt", weights_only=True)
    assert checkpoint["settings"] == metrics["settings"]
    if "samples.npz" in others:
        count = metrics["settings"].get("samples", 1000)
        for name, array in np.load(out / "samples.npz").items():
            assert array.shape == ((count,) if name == "labels" else (count, 28, 28))
            assert array.dtype == (np.int64 if name == "labels" else np.uint8)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A function: script -> its module, and the results of one run of `main` in this process, in
    a folder that held the results of an earlier run."""
    done = {}

    def train(script):
        if script not in done:
            folder = tmp_path_factory.mktemp(script.stem)
            (folder / script.stem).mkdir()
            for name in ("plane.png", "samples.npz", "metrics.json", "model.pt", "notes.txt"):
                (folder / script.stem / name).write_text("old")
            module = load_script(script)
            done[script] = module, run_main(module, folder)
        return done[script]

    return train


@each_script
def test_a_new_run_removes_the_results_of_an_earlier_one(script, trained):
    _, out = trained(script)
    assert not (out / "plane.png").exists() and (out / "notes.txt").read_text() == "old"
    assert not any(path.read_bytes() == b"old" for path in out.iterdir() if path.suffix != ".txt")


@each_script
def test_the_same_seed_gives_the_same_numbers(script, trained, tmp_path):
    module, one = trained(script)
    two = run_main(module, tmp_path / "two")
    assert plt.get_fignums()  # still open: a notebook shows them
    assert metrics_of(one)["results"] == metrics_of(two)["results"]
    assert metrics_of(one)["history"] == metrics_of(two)["history"]


@each_script
def test_a_file_pasted_into_a_notebook_cell_gives_the_same_model_from_saved_weights(
        script, trained, tmp_path, monkeypatch, capsys):
    module, one = trained(script)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel-1234.json"])
    source = script.read_text(encoding="utf-8")
    body, guard = source.split('if __name__ == "__main__":')
    cell = {"__name__": "__main__"}
    exec(compile(body, "<cell>", "exec"), cell)
    assert cell["get_args"]([]).epochs > 0
    model = one / "model.pt"
    cell["main"](["--quick", "--data", str(one.parent / "digits_160_64"), "--epochs", "0",
                  "--load", str(model), "--out", str(tmp_path)])
    out = tmp_path / script.stem
    before, after = (torch.load(p, weights_only=True)["weights"] for p in (model, out / "model.pt"))
    assert all(before[name].equal(after[name]) for name in before) and len(before) == len(after)
    assert rows_of(metrics_of(out)["history"]) == [] and metrics_of(out)["results"]
    epochs = module.get_args(["--quick"]).epochs
    assert f"('epochs', {epochs})" in capsys.readouterr().out  # the settings that differ
    calls = []
    exec(guard.strip(), {"main": calls.append})
    exec(guard.strip(), {"main": calls.append, "__file__": "copy.py"})
    assert calls == [[], None]


@each_script
def test_an_interrupted_training_of_another_seed_is_evaluated_on_nine_images_drawn_and_saved(
        script, tmp_path, monkeypatch, capsys):
    module = load_script(script)
    progress, calls = module.progress, []

    def interrupted(*values):
        progress(*values)
        calls.append(values)
        assert torch.initial_seed() == 5
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "progress", interrupted)
    out = run_main(module, tmp_path, "--seed", "5", test=9)
    assert "stopped early" in capsys.readouterr().out
    metrics = metrics_of(out)
    assert metrics["results"] and len(rows_of(metrics["history"])) == 3
    assert metrics["data"] == str(tmp_path / "digits_160_9")
    assert (out / "model.pt").exists() and list(out.glob("*.png"))


def test_ctrl_c_in_a_terminal(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS[0]), "--quick", "--data", "drawn", "--epochs", "30"],
        cwd=tmp_path, env=OFFLINE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # as in a terminal
    while not process.stdout.readline().startswith("step"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in errors and "stopped" in output
    out = tmp_path / "out" / SCRIPTS[0].stem
    assert metrics_of(out)["history"] and (out / "model.pt").exists()


@each_script
def test_a_loss_that_is_not_finite_ends_the_run_and_changes_no_file(script, tmp_path):
    out = tmp_path / script.stem
    out.mkdir()
    for name in ("training.png", "metrics.json", "model.pt"):
        (out / name).write_text("old")
    with pytest.raises(SystemExit, match="not finite.*--lr"):
        run_main(load_script(script), tmp_path, "--lr", "1e30")
    assert [path.read_text() for path in out.iterdir()] == ["old"] * 3


@each_script
def test_wrong_flags_get_a_sentence_and_exit_code_2(script, capsys):
    module = load_script(script)
    for flags, word in [("--epochs -1", "epochs"), ("--batch-size 0", "batch-size"),
                        ("--lr 0", "lr"), ("--train-size -5", "train-size"), ("--seed x", "seed"),
                        ("--device tpu", "cuda"), ("--no-such-flag", "no-such-flag"),
                        ("stray", "stray"), ("--epochs", "epochs")]:
        with pytest.raises(SystemExit) as end:
            module.get_args(flags.split())
        assert end.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1], flags
    quick = module.get_args(["--quick", "--epochs", "7"])  # explicit flags win over --quick
    assert quick.epochs == 7 and quick.train_size < module.get_args([]).train_size
    with pytest.raises(SystemExit):
        module.get_args(["--help"])
    text = capsys.readouterr().out
    for name in "data out device seed epochs batch-size lr train-size load quick".split():
        assert f"--{name}" in text


@each_script
def test_a_mistake_of_ones_own_keeps_its_traceback(script, tmp_path, monkeypatch):
    module = load_script(script)
    for mistake in (FileNotFoundError("labels.npy"), RuntimeError("a single memory location")):
        def train(*args, mistake=mistake):
            raise mistake

        monkeypatch.setattr(module, "train", train)
        with pytest.raises(type(mistake), match=str(mistake)):
            run_main(module, tmp_path)


@each_script
def test_images_in_another_format_are_refused(script, tmp_path, monkeypatch):
    module = load_script(script)
    images, labels = torch.rand(600, 28, 28), torch.zeros(600, dtype=torch.long)
    monkeypatch.setattr(module, "load_data", lambda args: (images, labels, images, labels, "mine"))
    with pytest.raises(ValueError, match="uint8.*float32"):
        run_main(module, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_gets_a_sentence(tmp_path):
    done = run(SCRIPTS[0], "--device", "cuda", cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "cuda" in done.stderr
    assert first.pick_device("auto") in ("cpu", "mps") and first.pick_device("cpu") == "cpu"


# ---- Checkpoints and metrics ------------------------------------------------------------------


def settings(*flags):
    return first.get_args(["--quick", *flags])


def test_a_checkpoint_that_does_not_fit_gets_torchs_message(tmp_path, capsys):
    path = tmp_path / "model.pt"
    small, large = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1)
    torch.save({"settings": {**vars(settings()), "width": 7}, "weights": small.state_dict()}, path)
    with pytest.raises(SystemExit, match='(?s)model.pt.*Missing key.*"bias"'):
        first.load_weights(settings("--load", str(path)), large)
    out = capsys.readouterr().out
    assert "('width', 7)" in out and "'epochs'" not in out  # only what differs
    first.load_weights(settings("--load", str(path)), other := torch.nn.Linear(2, 1, bias=False))
    assert other.weight.equal(small.weight)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_file_that_is_no_checkpoint_gets_a_sentence_and_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"settings": {}, "weights": Evil()}, tmp_path / "evil.pt")
    torch.save(torch.nn.Linear(2, 1).state_dict(), tmp_path / "bare.pt")
    for name in ("text.pt", "evil.pt", "bare.pt", "missing.pt"):
        with pytest.raises(SystemExit, match=name):
            first.load_weights(settings("--load", name), torch.nn.Linear(2, 1))
    assert not (tmp_path / "executed").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    args = settings("--out", str(tmp_path))
    os.makedirs(args.out)
    model = torch.nn.Linear(2, 1)
    first.save_model(args, model)
    before = open(f"{args.out}/model.pt", "rb").read()
    model.weight.data[0, 1] = math_nan = float("nan")
    with pytest.raises(SystemExit, match="not finite"):
        first.save_model(args, model)
    assert open(f"{args.out}/model.pt", "rb").read() == before and math_nan != 0


def test_metrics_are_json(tmp_path, capsys):
    args = settings("--out", str(tmp_path))
    os.makedirs(args.out)
    history = [{"step": 1, "loss": 0.5}]
    first.save_metrics(args, {"accuracy": 0.25}, history, "MNIST", time.time() - 90)
    metrics = json.loads(open(f"{args.out}/metrics.json").read())
    assert metrics["results"] == {"accuracy": 0.25} and metrics["history"] == history
    assert metrics["settings"] == vars(args) and metrics["data"] == "MNIST"
    assert metrics["seconds"] == pytest.approx(90, abs=5)
    assert "1.5 minutes" in capsys.readouterr().out
    with pytest.raises(ValueError, match="JSON"):
        first.save_metrics(args, {"accuracy": float("nan")}, history, "MNIST", time.time())


def test_progress_says_step_time_left_and_losses(capsys):
    first.progress(25, 100, time.time() - 60, {"loss": 0.12345, "accuracy": 1.0})
    assert capsys.readouterr().out == "step 25/100  3.0 min left  loss 0.1235 accuracy 1.0000\n"
    for bad in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(SystemExit, match="not finite"):
            first.progress(1, 2, time.time(), {"loss": 1.0, "other": bad})


def test_a_grid_has_its_images_in_place_whatever_the_matplotlibrc(tmp_path):
    images = torch.linspace(0, 1, 6).view(6, 1, 1, 1).repeat(1, 1, 4, 5)
    images[0, 0, 0, 0] = 7  # out of range: clipped
    with matplotlib.rc_context({"image.origin": "lower"}):
        _, axes = plt.subplots()
        first.show_grid(axes, images, 3, "title")
    shown = axes.images[0]
    assert shown.origin == "upper" and axes.get_title() == "title"
    picture = np.asarray(shown.get_array())
    assert picture.shape == (12, 21, 3) and picture.max() == 1
    for i in range(6):
        y, x = i // 3 * 6, i % 3 * 7
        assert np.allclose(picture[y + 2:y + 5, x + 2:x + 6], i / 5)
        assert np.allclose(picture[y, x:x + 7], 0.5)  # the gray frame
    first.show_grid(axes, torch.rand(4, 3, 4, 4), 2, "colors")
    assert np.asarray(axes.images[1].get_array()).shape == (12, 12, 3)


# ---- Data -------------------------------------------------------------------------------------


def idx(array):
    """A uint8 array as the bytes of an IDX file."""
    return struct.pack(f">{1 + array.ndim}i", 2048 + array.ndim, *array.shape) + array.tobytes()


def drawn(train, test):
    """Small data of MNIST's form under MNIST's names."""
    data = [*first.draw_characters(train, 0), *first.draw_characters(test, 1)]
    return {name: tensor.byte().numpy() for name, tensor in zip(first.MNIST, data)}


SMALL = drawn(6, 3)


def write_data(folder, arrays=SMALL):
    folder.mkdir(parents=True)
    for i, (name, array) in enumerate(arrays.items()):  # some gzipped, some not
        path = folder / (name + ".gz" * (i % 2))
        path.write_bytes(gzip.compress(idx(array)) if i % 2 else idx(array))


def load(folder="", train_size=60000):
    return first.load_data(first.get_args(["--data", str(folder), "--train-size", str(train_size)]))


def check_small(data):
    for array, expected in zip(data, SMALL.values()):
        assert array.numpy().astype(np.uint8).tolist() == expected.tolist()
    assert data[0].dtype == data[2].dtype == torch.uint8
    assert data[1].dtype == data[3].dtype == torch.int64


class Mirror:
    """A web server on the loopback that serves the small files, spoilt in a chosen way."""

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
def mirrors(monkeypatch, tmp_path):
    """Puts mirrors of the small files in the place of the real ones, and an empty MNIST_DIR."""
    started = []

    def start(*ways):
        started.extend(Mirror(way) for way in ways)
        monkeypatch.setattr(first, "MIRRORS", [mirror.url for mirror in started])
        monkeypatch.setattr(first, "MNIST", {
            name: hashlib.sha256(idx(array)).hexdigest() for name, array in SMALL.items()})
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("MNIST_DIR", str(tmp_path / "new" / "mnist"))
        return started

    yield start
    for mirror in started:
        mirror.server.shutdown()
        mirror.server.server_close()


@pytest.mark.parametrize("spoil", ["missing", "wrong", "cut"])
def test_what_one_mirror_spoils_the_next_one_gives(spoil, mirrors, tmp_path):
    bad, good = mirrors(spoil, "good")
    check_small(load())
    assert len(bad.asked) == len(good.asked) == 4
    names = sorted(path.name for path in (tmp_path / "new" / "mnist").iterdir())
    assert names == sorted(f"{name}.gz" for name in SMALL)
    check_small(load())
    assert len(good.asked) == 4  # the second time nothing was downloaded


@pytest.mark.parametrize("spoil", ["missing", "wrong", "cut"])
def test_where_all_mirrors_fail_digits_are_drawn(spoil, mirrors, tmp_path, capsys):
    mirrors(spoil, spoil)
    images, labels, _, test_labels, source = load(train_size=50)
    assert source == "drawn digits (not MNIST)" and f"data: {source}" in capsys.readouterr().out
    assert images.shape == (50, 28, 28) and len(labels) == 50 and len(test_labels) == 2000
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new" / "mnist").iterdir())


def test_a_download_that_stops_half_way_leaves_no_file_of_that_name(mirrors, tmp_path, monkeypatch):
    mirrors("good")
    monkeypatch.setattr(first.Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load()
    names = [path.name for path in (tmp_path / "new" / "mnist").iterdir()]
    assert names == ["train-images-idx3-ubyte.gz.part"]
    monkeypatch.undo()


def test_files_of_the_user_are_read_as_they_are_and_never_completed(mirrors, tmp_path):
    (mirror,) = mirrors("good")
    write_data(tmp_path / "mine")
    check_small(load(tmp_path / "mine"))
    assert load(tmp_path / "mine", 4)[0].shape == (4, 28, 28)
    (tmp_path / "mine" / "t10k-images-idx3-ubyte").unlink()
    before = sorted((tmp_path / "mine").iterdir())
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "mine.npy", np.zeros((5, 28, 28)))
    for folder in ("mine", "empty", "nowhere", "mine.npy"):
        with pytest.raises((SystemExit, NotADirectoryError), match=folder):
            load(tmp_path / folder)
    assert mirror.asked == [] and sorted((tmp_path / "mine").iterdir()) == before


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
    ("train-labels-idx1-ubyte", b"\0\0\x0d\x02" + idx(np.arange(6, dtype=np.uint8))[4:])])
def test_damaged_data_is_named(name, data, tmp_path):
    for other, array in SMALL.items():
        if other != name.removesuffix(".gz"):
            (tmp_path / other).write_bytes(idx(array))
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SystemExit, match=f"{tmp_path}.*(delete or replace|expected 28x28)") as end:
        load(tmp_path)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code


def test_real_files_are_whole(real_data):
    images, labels, test_images, test_labels, source = load(real_data)
    assert images.shape == (60000, 28, 28) and test_images.shape == (10000, 28, 28)
    assert labels[:5].tolist() == [5, 0, 4, 1, 9] and source == str(real_data)
    assert test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert images.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)


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
