"""What README.md says of the scripts, tests, pictures and commands is there and works."""

import ast
import functools
import re
import shlex
import textwrap

import pytest
import torch

from conftest import ROOT, SCRIPTS, load_script

README = ROOT / "README.md"
FIGURES = ROOT / ".github" / "figures"
EXERCISES = ([f"5.{i}" for i in range(1, 8)] + [f"6.{i}" for i in range(1, 11)]
             + [f"C.{i}" for i in range(1, 6)] + [f"8.{i}" for i in range(1, 5)]
             + [f"DiT: {topic}" for topic in ("latent space", "patches", "blocks",
                "learned variance", "guidance", "inductive bias", "scaling")]
             + [f"ViT: {topic}" for topic in ("patches", "positions", "heads", "augmentation",
                "masked autoencoder", "CKA", "few-shot by layer", "shape or texture",
                "inductive bias", "distillation")])
module = functools.cache(lambda name: load_script(ROOT / name))


def readme():
    return README.read_text(encoding="utf-8")


def section(title):
    """The text from one second-level heading to the next."""
    parts = re.split(r"^## (.+)$", readme(), flags=re.M)
    assert parts[1::2].count(title) == 1, f"README has not one section {title}"
    return parts[2 + 2 * parts[1::2].index(title)]


def rows(title):
    """The cells of the table in a section, without its first two lines."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(row) for row in cells}) == 1, f"a row of {title} has too many or few cells"
    assert set(cells[1]) == {"---"}
    return cells[2:]


@functools.cache
def drawn(script):
    """Names of the pictures that a file saves."""
    return set(re.findall(r"savefig\(.*/(\w+)\.png", (ROOT / script).read_text(encoding="utf-8")))


def parse(script, flags):
    """The script reads these flags; raises SystemExit if one of them is wrong."""
    return module(script).get_args(flags)


@functools.cache
def functions_in(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def check_references(row):
    """In a row, a file in backticks is followed by what is found in it: names, flags, pictures.
    Returns how many of each kind there were; what stands before any file is not looked at."""
    script, counts = None, dict(file=0, name=0, flag=0, picture=0, test=0)
    for word in re.findall("`([^`]+)`", " ".join(row)):
        if "::" in word:
            path, name = word.split("::")
            assert name in functions_in(path), f"{word} is no test"
            kind = "test"
        elif re.fullmatch(r"\d\d_\w+\.py", word):
            assert (ROOT / word).exists(), f"{word} does not exist"
            script, kind = word, "file"
        elif script is None:
            continue
        elif word.endswith(".png"):
            assert word[:-4] in drawn(script), f"{script} draws no {word}"
            kind = "picture"
        elif word.startswith("--"):
            parse(script, shlex.split(word))
            kind = "flag"
        else:
            functools.reduce(getattr, word.split("."), module(script))
            kind = "name"
        counts[kind] += 1
    return counts


def test_every_exercise_has_a_row_and_what_it_names_exists():
    index = rows("Exercises")
    assert [row[0] for row in index] == EXERCISES
    for row in index:
        counts = check_references(row)
        found = counts["file"] and counts["name"] + counts["flag"] + counts["picture"]
        assert all(row) and (found or row[0] == "6.3"), row  # 6.3 is pen and paper


def test_differences_and_places_to_change_name_code_and_tests_that_exist():
    table = rows("Where the code differs from the texts")
    assert 8 <= len(table) <= 12
    for place, _, code, test in table:
        counts = check_references([code, test])
        assert (counts["file"] and counts["name"] and counts["test"]) or (
            code == test == "-" and "Gflops" in place), place
    table = rows("For homework")
    assert [row[0].strip("`") for row in table] == [script.name for script in SCRIPTS]
    assert all(check_references(row)["name"] >= 2 for row in table)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_three_suggestions_work_with_the_flags_and_names_that_are_there(script):
    source, code = script.read_text(encoding="utf-8"), module(script.name)
    tries = re.split(r"\b(?:easy|medium|harder): ", code.__doc__.split("\nTry ")[1])[1:]
    assert len(tries) == 3
    for words in (" ".join(some.split()) for some in tries):
        flags = re.findall(r"(--[A-Za-z-]+)((?: (?!--)[\w./]+| \"[^\"]+\")?)", words)
        for flag, value in flags:
            load = ["--load", "x"] if flag == "--epochs" else []
            parse(script.name, [flag, *shlex.split(value.rstrip(".,")), *load])
        names = re.findall(r"`(\w{3,})`", words)
        assert flags or names
        for name in names:
            assert re.search(rf"def {name}\b|class {name}\b|\b{name} ?=", source), name


@pytest.mark.parametrize("wrong", [
    "`99_none.py`", "`03_ddpm.py` `nothing_of_that_name`", "`03_ddpm.py` `Diffusion.nothing`",
    "`03_ddpm.py` `nothing.png`", "`03_ddpm.py` `--nothing`", "`05_dit.py` `--block nothing`",
    "`tests/test_03_ddpm.py::test_nothing`"])
def test_a_wrong_reference_is_seen(wrong):
    with pytest.raises((AssertionError, AttributeError, SystemExit)):
        check_references([wrong])


def test_the_glossary_has_three_languages():
    words = rows("Glossary")
    assert len(words) >= 25 and all(len(row) == 3 and all(row) for row in words)
    english = [row[0] for row in words]
    assert len(set(english)) == len(english) and all(word.isascii() for word in english)
    for row in words:  # each in its own script, but for names such as ELBO
        assert re.search("[\u3040-\u30ff\u4e00-\u9fff]", row[1]), row
        assert re.search("[\uac00-\ud7a3]", row[2]), row


def test_files_that_are_named_exist_and_what_is_not_folded_is_short():
    named = re.findall(r"(?<![\w/.])\d\d_\w+\.py\b", readme())
    assert set(named) == {script.name for script in SCRIPTS} and len(SCRIPTS) == 7
    assert all((ROOT / path).exists() for path in re.findall(r"\btests/\w+\.py\b", readme()))
    unfolded = re.sub(r"<details>.*?</details>", "", readme(), flags=re.S)
    assert len(unfolded.split()) <= 1500


def test_pictures_are_linked_there_and_small():
    linked = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", readme())
    linked += re.findall(r"<img[^>]+src=\"([^\"]+)\"", readme())
    assert len(linked) >= 7 and len(set(linked)) == len(linked)
    for link in linked:
        data = (ROOT / link).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) < 150_000, link
    kept = {path.relative_to(ROOT).as_posix() for path in FIGURES.iterdir()}
    assert kept == set(linked)


def test_commands_are_understood():
    code = re.findall("`([^`]+)`", readme()) + re.findall("^ {4,}(.+)$", readme(), re.M)
    commands = [found for line in code
                for found in re.findall(r"\bpython (\d\d_\w+\.py)([^&|;#]*)", line)]
    assert commands
    for script, flags in commands:
        parse(script, shlex.split(flags))  # a wrong flag ends in SystemExit


def test_code_for_a_homework_runs(monkeypatch, tmp_path):
    blocks = re.findall(r"(?:^ {4,}.+\n)+", section("For homework"), re.M)
    code = [textwrap.dedent(block) for block in blocks if "import" in block]
    assert len(code) == 1 and "q_sample" in code[0]
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    names = dict(x0=torch.zeros(2, 1, 28, 28), t=torch.tensor([1, 1000]),
                 eps=torch.ones(2, 1, 28, 28))
    exec(code[0], names)
    assert names["x_t"].shape == (2, 1, 28, 28)
    assert names["x_t"].amax((1, 2, 3)).tolist() == pytest.approx([0.01, 1], abs=1e-4)
    assert not list(tmp_path.iterdir())
