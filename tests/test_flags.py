"""Flags: ranges, presets, --help, and the one line that bad input ends with."""

import errno
import os
import types

from absl import flags as absl_flags
import pytest

from common import flags

PRESETS = {"paper": {"eval_every": 7, "label_noise": 0.25, "arms": ["one"]}}


@pytest.fixture
def resolve(monkeypatch):
    """resolve('--a=b', ...) -> config, with flags of its own that no other test sees."""
    def resolved(*typed, presets=PRESETS):
        values = absl_flags.FlagValues()
        define = {name: (lambda *a, f=getattr(absl_flags, name), **k: f(*a, flag_values=values, **k))
                  for name in dir(absl_flags) if name.startswith("DEFINE")}
        monkeypatch.setattr(flags, "flags", types.SimpleNamespace(
            **{**vars(absl_flags), "FLAGS": values, **define}))
        monkeypatch.setattr(flags, "HELP", {})
        flags.define_shared("script", toy_noise={"label_noise": 0.4},
                            toy={"image_size": 32, "examples": 9, "tail": 1.0, "radius": 0.25,
                                 "domains": 0})
        f = flags.Group("Method")
        f.names("arms", ["one", "two"], "some arms")
        f.integer("steps", 5, "[1, inf)", "how many")
        f.number("rate", 0.5, "(0, 1]", "how fast")
        values(["script", *typed])
        return flags.resolve(presets)
    return resolved


def test_a_given_flag_beats_the_preset_and_that_beats_the_default(resolve):
    config = resolve()
    assert (config.preset, config.eval_every, config.label_noise) == ("", 100, -1.0)
    assert config.arms == ["one", "two"] and config.workdir == "runs/script"
    config = resolve("--preset=paper", "--eval_every=3")
    assert (config.eval_every, config.label_noise, config.arms) == (3, 0.25, ["one"])
    # typing what is the default anyway counts as given
    assert resolve("--preset=paper", "--eval_every=100").eval_every == 100


def test_the_config_holds_the_flags_and_only_ours(resolve):
    config = resolve("--seeds=3,1", "--steps=9")
    assert config.seeds == [3, 1] and config["steps"] == config.steps == 9
    assert {"dataset", "workdir", "arms", "num_processes"} < set(config)
    assert not {"verbosity", "v", "help"} & set(config)


def test_presets_are_listed(resolve, capsys):
    with pytest.raises(SystemExit) as end:
        resolve("--preset=list")
    assert end.value.code == 0
    assert capsys.readouterr().out.split() == [
        "paper", "--eval_every=7", "--label_noise=0.25", "--arms=one"]


@pytest.mark.parametrize("typed", [
    "--preset=nonsense", "--seeds=0,x", "--seeds=1.5", "--seeds=1,4294967297", "--seeds=-1",
    "--seeds=2,2"])
def test_what_no_parser_sees_is_refused_by_name(resolve, typed):
    with pytest.raises(ValueError) as error:
        resolve(typed)
    assert str(error.value).startswith(typed + ": want ")


@pytest.mark.parametrize("typed", [
    "--label_noise=1.01", "--label_noise=-0.5", "--label_noise=nan", "--label_noise=x",
    "--eval_every=0", "--rate=0", "--rate=1.001", "--rate=inf", "--image_size=-1", "--steps=2.5",
    "--toy_tail=inf"])
def test_numbers_out_of_their_interval_are_refused_by_name(resolve, typed):
    with pytest.raises(absl_flags.IllegalFlagValueError) as error:
        resolve(typed)
    assert f"{typed}: want a " in str(error.value) and " in " in str(error.value)


def test_the_ends_of_an_interval_are_as_the_brackets_say(resolve):
    config = resolve("--label_noise=1", "--rate=1", "--eval_every=1", "--toy_hopeless=0")
    assert (config.label_noise, config.rate, config.eval_every) == (1.0, 1.0, 1)


@pytest.mark.parametrize("typed", [["--process_id=1"], ["--num_processes=2", "--process_id=1"]])
def test_several_processes_need_a_coordinator(resolve, typed):
    with pytest.raises(ValueError, match="--process_id=1: give --coordinator"):
        resolve(*typed)


def test_a_home_directory_in_a_path_is_filled_in(resolve, monkeypatch):
    monkeypatch.setenv("HOME", "/there")
    config = resolve("--workdir=~/x", "--dataset=~/y/1.0.0")
    assert (config.workdir, config.dataset) == ("/there/x", "/there/y/1.0.0")


def test_noise_is_planted_in_toy_alone_unless_a_flag_asks_for_it(resolve):
    planted = lambda *typed: flags.planted(resolve(*typed), "label_noise", 0.4)
    assert planted() == 0.4 and planted("--dataset=mnist") == 0
    assert planted("--label_noise=0") == 0 and planted("--dataset=mnist", "--label_noise=.1") == .1


def test_help_shows_each_flag_in_its_group_with_range_and_default(resolve, capsys):
    resolve()
    flags.print_help()
    text = " ".join(capsys.readouterr().out.split())
    assert text.index("Data") < text.index("--toy_tail") < text.index("Method --arms")
    assert "--rate how fast (in (0, 1]; default: 0.5)" in text
    assert "-1: 0.4 for toy, 0 for any other data set" in text


@pytest.mark.parametrize("error, code, line", [
    (ValueError("two\nlines"), 2, "error: two lines\n"),
    (FloatingPointError("the loss is nan"), 3, "error: the loss is nan\n"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there"), 4,
     "error: [Errno 28] No space left on device: 'there': make room or give access, then the same "
     "command goes on from the last checkpoint\n"),
    (flags.Stopped("stopped after step 3"), 130, "stopped after step 3\n"),
    (KeyboardInterrupt(), 130, "stopped before any work was done\n")])
def test_expected_errors_end_with_one_line_and_a_code(monkeypatch, capsys, error, code, line):
    def main():
        raise error
    monkeypatch.setattr(flags.app, "run", lambda guarded, **_: guarded(["script"]))
    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(SystemExit) as end:
        flags.run(main)
    assert end.value.code == code and capsys.readouterr().err.endswith(line)


def test_a_mistake_of_the_program_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(flags.app, "run", lambda guarded, **_: guarded(["script"]))
    with pytest.raises(SystemExit) as end:
        flags.run(lambda: {}["nothing"])
    assert end.value.code == 1 and "KeyError: 'nothing'" in capsys.readouterr().err
