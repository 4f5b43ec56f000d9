"""Flags: their definition with ranges, presets, --help in groups, and errors of one line.

A script defines its flags in `define_flags` and reads them in `main`, once, as `resolve(PRESETS)`.
Nothing else reads a flag.
"""

import dataclasses
import errno
import logging as py_logging
import os
import signal
import sys
import textwrap
import traceback

from absl import app, flags, logging
import jax

HELP = {}  # title of a group -> [(flag, what --help prints of it)], in the order of the source


# ---------------------------------------------------------------------------------- definitions


class Interval(flags.ArgumentParser):
    """Reads a number that lies in an interval such as '[0, 1)', where '(' and ')' exclude the end.
    NaN lies in none. '[0, 1] or -1' allows -1 too."""

    def __init__(self, kind, text):
        super().__init__()
        self.kind = kind
        self.text, self.or_minus_1, _ = text.partition(" or -1")
        self.low, self.high = (float(end) for end in self.text[1:-1].split(","))
        noun = "a whole number" if kind is int else "a number"
        self.syntactic_help = f"{noun} in {text}"

    def parse(self, argument):
        try:
            value = self.kind(argument)
        except (TypeError, ValueError):
            raise ValueError(f"want {self.syntactic_help}") from None
        above = value >= self.low if self.text[0] == "[" else value > self.low
        below = value <= self.high if self.text[-1] == "]" else value < self.high
        if not (above and below or self.or_minus_1 and value == -1):
            raise ValueError(f"want {self.syntactic_help}")
        return value


class Group:
    """Flags that --help prints under one title. `interval`: see `Interval`."""

    def __init__(self, title):
        self._lines = HELP.setdefault(title, [])

    def _note(self, name, default, help, values=""):
        shown = ",".join(map(str, default)) if isinstance(default, list) else default
        self._lines.append((name, f"{help} ({values + '; ' if values else ''}default: {shown})"))

    def number(self, name, default, interval, help, kind=float):
        self._note(name, default, help, f"in {interval}")
        serializer = flags.ArgumentSerializer()
        flags.DEFINE(Interval(kind, interval), name, default, help, serializer=serializer)

    def integer(self, name, default, interval, help):
        self.number(name, default, interval, help, kind=int)

    def text(self, name, default, help):
        self._note(name, default, help)
        flags.DEFINE_string(name, default, help)

    def names(self, name, default, help):
        """A comma list."""
        self._note(name, default, help)
        flags.DEFINE_list(name, default, help)

    def choice(self, name, default, values, help):
        self._note(name, default, help, " or ".join(values))
        flags.DEFINE_enum(name, default, values, help)

    def switch(self, name, default, help):
        self._note(name, default, help, f"--{name} or --no{name}")
        flags.DEFINE_bool(name, default, help)


def define_shared(script, *, toy, toy_noise):
    """The flags that all scripts have.

    toy: the defaults of the generated world, {'image_size', 'examples', 'tail', 'radius',
    'domains'}. toy_noise: what is planted in it where no flag says so, {'label_noise',
    'caption_noise': fraction}. A script reads those that it names here.
    """
    f = Group("Data")
    f.text("dataset", "toy", "'toy' (generated pictures), a TFDS name, or the path of a prepared "
           "TFDS directory such as data/fashion_mnist/3.0.1")
    f.text("data_dir", None, "where TFDS keeps its prepared data sets")
    f.text("split", "train", "training pool, TFDS syntax: 'train[:90%]'")
    f.text("eval_split", "test", "split to evaluate on, TFDS syntax")
    f.integer("image_size", 0, "[0, inf)", "side in pixels; 0: the data set's own, "
              f"{toy['image_size']} for toy")
    for name, of in toy_noise.items():
        what = name.partition("_")[0]
        f.number(name, -1.0, "[0, 1] or -1", f"fraction of the training pool whose {what} is "
                 f"exchanged for another example's; -1: {of:g} for toy, 0 for any other data set")
    f.integer("toy_examples", toy["examples"], "[1, inf)", "toy: size of the training pool")
    f.number("toy_tail", toy["tail"], "[0, 10]", "toy: Zipf exponent of the class sizes; 0: "
             "balanced")
    f.number("toy_radius", toy["radius"], "[0.15, 0.4]", "toy: mean radius of the objects, as a "
             "part of the image's width; large ones are easier to learn")
    f.integer("toy_domains", toy["domains"], "[0, 30]", "toy: number of domains, each with its own "
              "background; the class is then domain and shape. 0: it is colour and shape")
    f.number("toy_duplicates", 0.1, "[0, 1)", "toy: fraction of near-duplicates")
    f.number("toy_hopeless", 0.05, "[0, 1)", "toy: fraction of images of pure noise")
    f = Group("The run")
    f.names("seeds", ["0"], "comma list; each arm runs once per seed")
    f.text("preset", "", "a named setting; flags that are given override it; 'list' prints all")
    f.text("workdir", f"runs/{script}", "everything is written here; the same command goes "
           "on there")
    f.integer("eval_every", 100, "[1, inf)", "steps between evaluations and checkpoints")
    f.text("coordinator", None, "several hosts: address:port of process 0")
    f.integer("num_processes", None, "[1, inf)", "several hosts: how many")
    f.integer("process_id", None, "[0, inf)", "several hosts: which one this is")


# -------------------------------------------------------------------------------------- reading


class Namespace(dict):
    """A dict whose keys are attributes too."""
    __setattr__ = dict.__setitem__

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


def resolve(presets):
    """The flags as a Namespace: what was given, else the preset's value, else the default.

    presets: name -> {flag: value}. `--preset=list` prints them and ends the program.
    Raises: ValueError naming the flag.
    """
    values = flags.FLAGS
    if values.preset == "list":
        for name, preset in presets.items():
            print(name, *as_typed(preset), sep="\n    ")
        sys.exit(0)
    if values.preset and values.preset not in presets:
        raise ValueError(f"--preset={values.preset}: want one of {', '.join(presets)}, or list")
    explicit = [name for name in values if values[name].present]
    preset = {k: v for k, v in presets.get(values.preset, {}).items() if k not in explicit}
    for name, value in preset.items():
        values[name].value = value
    if preset:
        logging.info("--preset=%s sets %s", values.preset, " ".join(as_typed(preset)))
    config = Namespace({name: values[name].value for lines in HELP.values() for name, _ in lines})
    config.seeds = read_seeds(config.seeds)
    several = [f"--{k}={config[k]}" for k in ("num_processes", "process_id")
               if config[k] is not None]
    if several and config.coordinator is None:
        raise ValueError(f"{' '.join(several)}: give --coordinator=address:port of process 0 too")
    for name, value in config.items():  # the shell leaves --workdir=~/x as it is
        if isinstance(value, str) and value.startswith("~"):
            config[name] = os.path.expanduser(value)
    return config


def as_typed(preset):
    return [f"--{k}={','.join(v) if isinstance(v, list) else v}" for k, v in preset.items()]


def read_seeds(texts):
    """The seeds as ints. They must differ, and jax.random.key takes 32 bits."""
    try:
        seeds = [int(text) for text in texts]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**32 or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds={','.join(texts)}: want a comma list of different whole numbers "
                         f"from 0 to {2**32 - 1}")
    return seeds


def build(dataclass, config, **others):
    """A dataclass whose fields are the flags of the same names, or are given in `others`."""
    names = [field.name for field in dataclasses.fields(dataclass)]
    return dataclass(**{name: others[name] if name in others else config[name] for name in names})


def require(config, ok, flag, what):
    """Raises ValueError that names the flag, its value and what is required, if not `ok`."""
    if not ok:
        raise ValueError(f"--{flag}={config[flag]}: want {what}")


def require_arms(config, known):
    for arm in config.arms:
        if arm not in known:
            raise ValueError(f"--arms: {arm!r} is none of {', '.join(known)}")
    require(config, config.arms and len(set(config.arms)) == len(config.arms), "arms",
            "at least one arm, and each once")


def require_warmup(config, *steps):
    """Raises ValueError if one of the schedules, of so many steps, would be all warm-up.
    With 0 steps there is no schedule."""
    for n in filter(None, steps):
        require(config, round(config.warmup * n) < n, "warmup", "less than all of the steps: with "
                f"{n} steps nothing is left after it")


def planted(config, flag, toy):
    """The noise to plant: the flag's value, or, if that is -1, `toy` in toy and none elsewhere."""
    return config[flag] if config[flag] >= 0 else toy * (config.dataset == "toy")


# -------------------------------------------------------------------- the program's two ends


class Stopped(Exception):
    """Ends a run that was asked to stop, after its checkpoint; the message says how to go on."""


class DiskError(Exception):
    """A file that cannot be written: the disk is full, or may not be written to."""


CODES = {ValueError: 2, FloatingPointError: 3, DiskError: 4, Stopped: 130}
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def run(main):
    """Parses the flags and calls main(). Bad input, a loss that is not finite, a full or read-only
    disk and a stop that was asked for end with one line on stderr; DEBUG=1 shows the traceback."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    logging.get_absl_handler().addFilter(  # drops the INFO lines of jax and other libraries
        lambda record: record.levelno > py_logging.INFO or record.pathname.startswith(root))

    def parse(argv):
        if {"--help", "-help", "-h"} & set(argv):
            print_help()
            sys.exit(0)
        try:
            return flags.FLAGS(argv)
        except flags.Error as e:
            text = one_line(e).removeprefix("flag ")
            if text.startswith("Unknown"):
                text += "; --help lists all flags"
            sys.exit(end(ValueError(text), 2))

    def guarded(argv):
        try:
            if len(argv) > 1:
                raise ValueError(f"stray argument {argv[1]!r}: flags are written --name=value")
            main()
            for s in (signal.SIGINT, signal.SIGTERM):  # nothing is left that a signal could save
                signal.signal(s, signal.SIG_DFL)
        except KeyboardInterrupt:  # before `train.Run` listens to signals
            leave(end(Stopped("stopped before any work was done"), CODES[Stopped]))
        except Exception as e:
            kind = DiskError if getattr(e, "errno", None) in DISK else type(e)
            if kind not in CODES or os.environ.get("DEBUG"):
                traceback.print_exc()
                leave(1)
            leave(end(e, CODES[kind]))
    app.run(guarded, flags_parser=parse)


def end(error, code):
    """Prints the one line."""
    text = one_line(error)
    if code == 4:
        text += ": make room or give access, then the same command goes on from the last checkpoint"
    print(text if code == 130 else f"error: {text}", file=sys.stderr, flush=True)
    return code


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def leave(code):
    """Ends the program. With several hosts it skips jax's exit barrier, which waits minutes."""
    os._exit(code) if jax.distributed.is_initialized() else sys.exit(code)


def print_help():
    script = sys.modules["__main__"]
    print((script.__doc__ or "").strip())
    width = max(len(name) for lines in HELP.values() for name, _ in lines) + 6
    for title, lines in HELP.items():
        print(f"\n{title}")
        for name, text in lines:
            print(textwrap.fill(text, 100, initial_indent=f"  --{name}".ljust(width),
                                subsequent_indent=" " * width, break_on_hyphens=False))
