"""What every script promises: it runs alone, says what is wrong, and loses nothing."""

import ast
import gzip
import io
import json
import re
import struct
import sys
import time
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from conftest import COPIES, SCRIPTS, load_script

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
first = load_script(SCRIPTS[0])  # the plumbing is one text, so one script is enough to test it
SHARED = ["progress", "show_grid"]  # these stand where they are used, the others at the end


def drawn(train, test):
    """Small data of MNIST's form under MNIST's names."""
    data = [*first.draw_characters(train), *first.draw_characters(test)]
    return {name: tensor.byte().numpy() for name, tensor in zip(first.MNIST, data)}


def idx(array):
    """A uint8 array as the bytes of an IDX file."""
    return struct.pack(f">{1 + array.ndim}i", 2048 + array.ndim, *array.shape) + array.tobytes()


def write_data(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, array) in enumerate(arrays.items()):  # some gzipped, some not
        path = folder / (name + ".gz" * (i % 2))
        path.write_bytes(gzip.compress(idx(array)) if i % 2 else idx(array))
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    torch.manual_seed(0)
    return write_data(tmp_path_factory.mktemp("digits"), drawn(160, 64))


def rows(history):
    """The history of a run: rows of step, loss and seconds, of all its models."""
    return history if isinstance(history, list) else sum(history.values(), [])


def run_main(module, digits, out, *flags):
    """`main` in this process, with --quick on a few drawn digits; returns its metrics."""
    few = {"samples": 10, "T": 21, "steps": 2, "measured": 4}
    few = [f"--{name}={number}" for name, number in few.items() if name in module.SETTINGS]
    module.main(["--quick", "--data", str(digits), "--batch-size", "32", "--device", "cpu",
                 "--epochs", "2", "--out", str(out), *few, *flags])
    return json.loads((out / "metrics.json").read_text())


def light(script):
    """The module of a script without the measurements that take long on one core."""
    module = load_script(script)
    for name in ("few_shot", "evaluate"):
        if hasattr(module, name):
            setattr(module, name, lambda *args, **more: {"digit": 0.5})
    return module


# ---- Form ----------------------------------------------------------------------------


def test_what_repeats_is_one_text():
    texts = []
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        nodes = {node.name: node for node in ast.parse(text).body if hasattr(node, "name")}
        texts.append([text.split("# ---- Drawn digits")[1],
                      *(ast.get_source_segment(text, nodes[name]) for name in SHARED)])
    assert all(text == texts[0] for text in texts)


@each_script
def test_a_script_imports_little_and_does_nothing_when_imported(
        script, tmp_path, monkeypatch, capfd):
    lines = re.findall(r"^(?:from|import) (\w+)", script.read_text(encoding="utf-8"), re.M)
    assert set(lines) <= set(sys.stdlib_module_names) | {"torch", "numpy", "matplotlib"}
    monkeypatch.chdir(tmp_path)
    load_script(script)
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


# ---- A run ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(tmp_path_factory, digits):
    """A function: script -> module, folder and metrics of one run in a folder of somebody."""
    done = {}

    def train(script):
        if script not in done:
            out = tmp_path_factory.mktemp(script.stem)
            for name in ("mine.png", "mine.npz", "mine.json", "metrics.json", "model.pt"):
                (out / name).write_text("old")
            module = light(script)
            done[script] = module, out, run_main(module, digits, out)
        return done[script]

    return train


@each_script
def test_a_run_saves_the_model_then_results_then_figures_and_touches_no_other_file(script, trained):
    """So a mistake in an evaluation or a figure costs no training, and no file is lost."""
    _, out, _ = trained(script)
    own = {path for path in out.iterdir() if path.read_bytes() != b"old"}
    assert {path.name for path in {*out.iterdir()} - own} == {"mine.png", "mine.npz", "mine.json"}
    model, metrics = out / "model.pt", out / "metrics.json"
    figures = {path for path in own if path.suffix == ".png"}
    assert figures and own - figures - {out / "samples.npz"} == {model, metrics}
    first_figure = min(path.stat().st_mtime_ns for path in figures)
    assert model.stat().st_mtime_ns < metrics.stat().st_mtime_ns < first_figure


@each_script
def test_the_same_seed_gives_the_same_numbers(script, trained, digits, tmp_path):
    module, _, one = trained(script)
    two = run_main(module, digits, tmp_path)
    assert plt.get_fignums()  # still open: a notebook shows them
    one["history"], two["history"] = (
        [row[:2] for row in rows(metrics["history"])] for metrics in (one, two))
    assert one["results"] == two["results"] and one["history"] == two["history"]


@each_script
def test_another_seed_gives_others_and_a_second_phase_trains_as_well(
        script, trained, digits, tmp_path, monkeypatch):
    module, _, one = trained(script)
    train, progress, distances = module.train, module.progress, []

    def train_twice(*args, **more):
        model, = (value for value in args if isinstance(value, torch.nn.Module))
        for phase in range(2):
            path = [parameters_to_vector(model.parameters()).detach()]
            monkeypatch.setattr(module, "progress", lambda *values: (
                path.append(parameters_to_vector(model.parameters()).detach()), progress(*values)))
            train(*args, **more)
            distances.append((path[-1] - path[0]).norm().item())
            steps = [(two - one).norm().item() for one, two in zip(path, path[1:])]
            assert 0 < steps[-1] < 0.25 * max(steps)  # the rate ends near 0

    monkeypatch.setattr(module, "train", train_twice)
    two = run_main(module, digits, tmp_path, "--seed", "5")
    assert min(distances[1::2]) > 0.2 * max(distances[::2])
    assert rows(one["history"])[0][1] != rows(two["history"])[0][1]


@pytest.mark.parametrize("names", [{}, {"__file__": "cell.py"}])  # VS Code sets __file__
def test_a_file_pasted_into_a_notebook_cell_trains_with_the_defaults(names, monkeypatch):
    body, guard = SCRIPTS[0].read_text(encoding="utf-8").split('if __name__ == "__main__":')
    exec(compile(body, "<cell>", "exec"), cell := {"__name__": "__main__", **names})
    calls = []
    for program in ("/x/ipykernel_launcher.py", "01_vae.py"):
        monkeypatch.setattr(sys, "argv", [program, "-f", "kernel-1234.json"])
        exec(guard.strip(), {**cell, "main": calls.append})
    assert calls == [[], None]


@each_script
def test_saved_weights_are_loaded_and_evaluated_as_they_are(script, trained, digits, tmp_path):
    module, out, _ = trained(script)
    metrics = run_main(module, digits, tmp_path, "--epochs", "0", "--load", str(out / "model.pt"))
    before, after = (torch.load(path / "model.pt", weights_only=True)["weights"]
                     for path in (out, tmp_path))
    assert all(before[name].equal(after[name]) for name in before) and len(before) == len(after)
    assert rows(metrics["history"]) == [] and metrics["results"]


@each_script
def test_an_interrupted_training_is_evaluated_drawn_and_saved(
        script, tmp_path, digits, monkeypatch, capsys):
    module, calls = light(script), []
    progress = module.progress

    def interrupted(*values):
        progress(*values)
        calls.append(values)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "progress", interrupted)
    metrics = run_main(module, digits, tmp_path)
    assert "stopped early" in capsys.readouterr().out and len(calls[0][1]) == 3  # its losses
    assert metrics["results"] and (tmp_path / "model.pt").exists() and list(tmp_path.glob("*.png"))


@each_script
def test_a_loss_that_is_not_finite_ends_the_run_and_changes_no_file(script, tmp_path, digits):
    (tmp_path / "model.pt").write_text("old")
    with pytest.raises(SystemExit, match="not finite.*--lr"):
        run_main(light(script), digits, tmp_path, "--lr", "1e30")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@each_script
def test_images_in_another_format_are_refused(script, tmp_path, digits, monkeypatch):
    module, images, labels = light(script), torch.rand(600, 28, 28), torch.zeros(600).long()
    monkeypatch.setattr(module, "load_data", lambda args: (images, labels, images, labels, "mine"))
    with pytest.raises(AssertionError, match="expected a uint8 tensor"):
        run_main(module, digits, tmp_path)


# ---- Settings ------------------------------------------------------------------------


@each_script
def test_flags_come_from_the_table(script, capsys):
    module = light(script)
    args = module.get_args([])
    assert vars(args) == {name: row[0] for name, row in module.SETTINGS.items()}
    assert args.out == f"out/{script.stem}"
    quick = module.get_args(["--quick", "--epochs", "7", "--batch-size", "9"])
    assert (quick.epochs, quick.batch_size) == (7, 9)  # the command line wins over --quick
    assert quick.train_size == module.QUICK["train_size"] < args.train_size
    with pytest.raises(SystemExit):
        module.get_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.isascii()
    for name, (default, meaning, *_) in module.SETTINGS.items():
        assert f"--{name.replace('_', '-')}" in text and meaning in text
        assert f"(default: {default})" in text


def test_a_new_setting_is_one_line(monkeypatch):
    monkeypatch.setitem(first.SETTINGS, "kind_of_loss", ("l2", "which loss", "l1", "l2"))
    monkeypatch.setitem(first.SETTINGS, "beta", (4.0, "weight of the KL; 0: none"))
    monkeypatch.setitem(first.SETTINGS, "free", (False, "switch"))
    args = first.get_args(["--kind-of-loss", "l1", "--beta", "2", "--free"])
    assert (args.kind_of_loss, args.beta, args.free) == ("l1", 2.0, True)
    assert first.get_args([]).free is False and first.get_args(["--beta", "0"]).beta == 0
    with pytest.raises(SystemExit):
        first.get_args(["--kind-of-loss", "l3"])


@pytest.mark.parametrize("flags, word", [
    ("--epochs -1", "epochs"), ("--batch-size 0", "batch_size"), ("--lr 0", "lr"),
    ("--lr -1e-3", "lr"), ("--seed x", "seed"), ("--no-such-flag", "no-such-flag"),
    ("stray", "stray"), ("--epochs", "epochs")])
def test_wrong_flags_get_a_sentence_and_exit_code_2(flags, word, capsys):
    with pytest.raises(SystemExit) as end:
        first.get_args(flags.split())
    assert end.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_cannot_be_made_ends_the_run_before_the_training(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError):
        first.get_args(["--out", str(tmp_path / "file" / "out")])


# ---- Files ---------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_only_weights_that_fit_are_loaded_and_no_code_is_run(tmp_path, capsys):
    small, large = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1)
    args = first.get_args(["--load", str(tmp_path / "model.pt")])
    for saved in ({"weights": small.state_dict(), "settings": {}}, small.state_dict()):
        torch.save(saved, args.load)
        first.load_weights(args, other := torch.nn.Linear(2, 1, bias=False))
        assert other.weight.equal(small.weight)
        with pytest.raises(RuntimeError, match='Missing key.*"bias"'):  # torch's own message
            first.load_weights(args, large)
    torch.save({"settings": {}, "weights": Evil()}, args.load)
    with pytest.raises(Exception, match="(?i)weights.only"):
        first.load_weights(args, large)
    assert "executed" not in capsys.readouterr().out


def test_a_disk_that_fills_up_leaves_the_old_model(tmp_path, monkeypatch):
    args, model = first.get_args(["--out", str(tmp_path)]), torch.nn.Linear(2, 1)
    first.save_model(args, model)
    before = (tmp_path / "model.pt").read_bytes()

    def full(saved, path):
        open(path, "wb").write(before[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="space"):
        first.save_model(args, model)
    assert (tmp_path / "model.pt").read_bytes() == before


def test_progress_says_step_seconds_and_the_mean_since_the_last_report(capsys):
    history, losses = [], []
    for step in range(1, 91):
        losses.append(torch.tensor(float(step)))
        first.progress(history, losses, 90, time.time() - step)  # a second a step
    lines = capsys.readouterr().out.splitlines()
    expected = [[step, step - 2, pytest.approx(step, abs=0.4)] for step in range(5, 91, 5)]
    assert history == expected  # the mean of five
    assert lines[0] == "step 5/90  loss 3.0000  5 s" and len(lines) == 18


def test_a_grid_has_its_images_in_place():
    images = torch.linspace(0, 1, 7).view(7, 1, 1, 1).repeat(1, 1, 4, 5)
    axes = plt.figure().add_subplot()
    first.show_grid(images, 3, "title")
    picture = np.asarray(axes.images[0].get_array()).squeeze()
    assert axes.get_title() == "title" and axes.images[0].get_clim() == (0, 1)
    assert picture.shape == (18, 21) and picture.max() == 1
    for i in range(7):
        y, x = i // 3 * 6, i % 3 * 7
        assert np.allclose(picture[y + 2:y + 5, x + 2:x + 6], i / 6)
        assert np.allclose(picture[y, x:x + 7], 0.5)  # the gray frame
    first.show_grid(torch.rand(4, 3, 4, 4), 2, "colors")
    assert np.asarray(axes.images[1].get_array()).shape == (12, 12, 3)


# ---- Data ----------------------------------------------------------------------------

SMALL = drawn(6, 3)


def load(folder="", train_size=60000):
    return first.load_data(first.get_args(["--data", str(folder), "--train-size", str(train_size)]))


def check_small(data):
    for array, expected in zip(data, SMALL.values()):
        assert array.numpy().tolist() == expected.tolist()


def test_files_of_the_user_are_read_as_they_are_and_never_completed(tmp_path, monkeypatch):
    monkeypatch.setattr(first.urllib.request, "urlopen", pytest.fail)
    mine = write_data(tmp_path / "mine", SMALL)
    check_small(load(mine))
    assert load(mine, 4)[0].shape == (4, 28, 28) and load(mine, 4)[2].shape == (3, 28, 28)
    monkeypatch.setenv("MNIST_DIR", str(mine))
    check_small(load())
    (mine / "t10k-images-idx3-ubyte").unlink()
    before = sorted(mine.iterdir())
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "strange" / "train-images-idx3-ubyte").mkdir(parents=True)
    for folder in ("mine", "nowhere", "file", "strange"):
        with pytest.raises(SystemExit, match=f"cannot read --data .*{folder}") as end:
            load(tmp_path / folder)
        assert "\n" not in str(end.value) and end.value.__suppress_context__  # short in a notebook
    assert sorted(mine.iterdir()) == before


@pytest.mark.parametrize("name, data", [
    ("train-images-idx3-ubyte", idx(SMALL["train-images-idx3-ubyte"])[:-1]),
    ("t10k-images-idx3-ubyte.gz", b"<html>not found</html>"),
    ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(SMALL["t10k-images-idx3-ubyte"]))[:-9])])
def test_damaged_data_gets_a_sentence(name, data, tmp_path, monkeypatch, capsys):
    for other, array in SMALL.items():
        if other != name.removesuffix(".gz"):
            (tmp_path / other).write_bytes(idx(array))
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SystemExit, match="cannot read --data") as end:
        load(tmp_path)
    assert "\n" not in str(end.value)
    monkeypatch.setenv("MNIST_DIR", str(tmp_path))  # not asked for by --data: drawn, with why
    source = load(train_size=10)[-1]
    assert source.startswith("drawn digits, not MNIST (") and len(source) > 30
    assert f"data: {source}" in capsys.readouterr().out.splitlines()


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    """A mirror that sends the small files, into a folder not yet there; what it is asked for, and
    its way to spoil what it sends, can be looked at and changed."""
    mirror = SimpleNamespace(asked=[], spoil=lambda data: data, folder=tmp_path / "new" / "mnist")

    def urlopen(url, timeout):
        mirror.asked.append(url)
        name = url.split("/")[-1].removesuffix(".gz")
        return io.BytesIO(mirror.spoil(gzip.compress(idx(SMALL[name]))))

    monkeypatch.setattr(first.urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("MNIST_DIR", str(mirror.folder))
    return mirror


def test_what_is_missing_is_downloaded_once(mirror):
    assert load("drawn", 30)[-1] == "drawn digits, not MNIST (drawn)" and mirror.asked == []
    check_small(load())
    check_small(load())
    assert len(mirror.asked) == 4 and len(list(mirror.folder.iterdir())) == 4


@pytest.mark.parametrize("spoil", [lambda data: 1 / 0, lambda data: data[:-9], lambda data: b"<html>"])
def test_a_download_that_fails_leaves_no_file_and_digits_are_drawn(spoil, mirror, capsys):
    mirror.spoil = spoil
    images, labels, test_images, _, source = load(train_size=50)
    assert "drawn digits, not MNIST" in source and f"data: {source}" in capsys.readouterr().out
    assert images.shape == (50, 28, 28) and len(labels) == 50 and len(test_images) == 2000
    assert len(mirror.asked) == 1 and not mirror.folder.exists()


def test_real_files_are_whole(real_data):
    images, labels, test_images, test_labels, source = load(real_data)
    assert images.shape == (60000, 28, 28) and test_images.shape == (10000, 28, 28)
    assert labels[:5].tolist() == [5, 0, 4, 1, 9] and source == str(real_data)
    assert test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert images.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)


def test_drawn_characters_vary_and_can_be_told_apart():
    images, labels = first.draw_characters(3000)
    assert images.dtype == torch.uint8 and images.shape == (3000, 28, 28)
    assert labels.bincount().tolist() == [300] * 10
    x = images.float().flatten(1) / 255
    assert 0.02 < x.mean(1).min() and x.mean(1).max() < 0.6  # no empty and no flooded image
    distance = torch.cdist(x[:500], x[500:])  # nearest neighbor among the others: chance is 0.1
    right = labels[500:][distance.argmin(1)] == labels[:500]
    assert 0.8 < right.float().mean() and distance.min() > 0


@each_script
def test_a_copied_file_runs_alone_offline_and_without_a_screen(script):
    done, folder = COPIES[script].result()
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert "data: drawn digits, not MNIST" in done.stdout and "not MNIST" in lines[-1]
    assert sum(line.startswith("step ") for line in lines) >= 5
    assert sorted(path.name for path in folder.iterdir()) == [script.name, "out"]
    out = folder / "out" / script.stem
    assert 1 <= len(list(out.glob("*.png"))) <= 2
    metrics = json.loads((out / "metrics.json").read_text())
    assert "not MNIST" in metrics["data"] and metrics["torch"] == torch.__version__
    assert metrics["settings"]["quick"] is True
    assert rows(metrics["history"]) and metrics["results"]
    checkpoint = torch.load(out / "model.pt", weights_only=True)
    assert checkpoint["settings"] == metrics["settings"]
