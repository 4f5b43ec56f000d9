"""Runs a script's `main` with one list of flags after the other, in one process.

    python tests/refuse.py jest < lists.json      # a JSON list of lists of flags

Prints a JSON list of [exit code, what came on stderr]. This is for flags that are refused before any
work is done, which take a second each in a process of their own.
"""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags as absl_flags

from common import flags


def main(script):
    module = importlib.import_module(script)
    module.define_flags()
    ours = [name for lines in flags.HELP.values() for name, _ in lines]
    results = []
    for arguments in json.load(sys.stdin):
        for name in ours:
            absl_flags.FLAGS[name].unparse()  # the default again, and not given
        sys.argv, stderr = [f"{script}.py", *arguments], io.StringIO()
        code = 0
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            try:
                flags.run(module.main)
            except SystemExit as e:
                code = e.code
        results.append([code, stderr.getvalue()])
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
