"""The commands of the README, as they stand there, with settings small enough for a test."""

import re
import shlex

import pytest

from processes import ROOT, Command, rows

TEXT = (ROOT / "README.md").read_text()
TOWER = ("--patch=8", "--embed=8", "--context=24", "--toy_examples=300", "--steps=2",
         "--active_steps=2", "--reference_steps=2", "--eval_every=2")
TINY = {  # typed after the README's own flags: the last one counts
    "rho_learnability.py": (*TOWER, "--learner=16/1/32/1", "--proxy=16/1/32/1", "--batch_size=2"),
    "jest.py": (*TOWER, "--model=16/1/32/1", "--low_patch=16", "--batch_size=2", "--n_chunks=2"),
    "dnc.py": ("--toy_examples=200", "--model=8/4", "--hidden=8", "--embed=6", "--head_hidden=8",
               "--steps=12", "--batch_size=4", "--eval_every=4", "--clusters=2", "--restarts=2")}


def commands():
    """[(script, flags)] of every line of the README's blocks that runs one of the three."""
    out = []
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            words = words[words.index("&&") + 1:] if "&&" in words else words
            if words[:1] == ["python"] and words[1] in TINY:
                out.append((words[1], words[2:]))
    return out


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("command")


def test_the_readme_runs_each_script():
    assert {script for script, _ in commands()} == set(TINY)


@pytest.mark.parametrize("script, flags", commands(), ids=lambda x: x if isinstance(x, str) else "")
def test_a_command_of_the_readme(script, flags, prepared, directory, tmp_path):
    kind = "captioned" if "emoji" in " ".join(flags) else "labelled"
    path = str(prepared[kind])
    given = [re.sub(r"(path/to|data)/\w+/[\d.]+", path, f) for f in flags]
    given = [f"--dataset={path}" if re.match("--dataset=path", f) else f for f in given]
    workdir = tmp_path / "run"
    done = Command(directory, script).good(*given, *TINY[script], "--image_size=16",
                                          f"--workdir={workdir}", "--seeds=0")
    trained = {r["arm"] for r in rows(workdir)}
    for flag in flags:
        if flag.startswith("--arms="):
            assert set(flag.removeprefix("--arms=").split(",")) <= trained
    assert len(trained) > 1 and (workdir / "summary.json").exists(), done.stderr


def test_names_in_the_tables_exist():
    """`name` in a table of paper against code, a function, class or constant of its script."""
    for script in TINY:
        section = re.search(rf"## {script}, beside the paper(.*?)\n## ", TEXT, re.S)[1]
        source = (ROOT / script).read_text() + (ROOT / "common/flops.py").read_text()
        for row in re.findall(r"^\|[^|]*\|(.*)\|$", section, re.M):
            for name in re.findall(r"`([A-Za-z_][A-Za-z0-9_]*)`", row):
                assert re.search(rf"^(def|class) {name}\b|^{name} =|\"{name}\"", source,
                                 re.M), f"{script} has no {name}"


def test_links_and_pictures_exist():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert (ROOT / path).exists(), path
