"""Files that a kill cannot leave half written: JSON, and a log with one JSON object a line."""

import json
import math
import os
from pathlib import Path


def plain(x):
    """x with arrays as lists, and NaN and infinities as None: JSON has no word for them."""
    if hasattr(x, "tolist"):  # numpy and jax, scalars too
        x = x.tolist()
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def replace(path, data):
    """Puts the bytes `data` at `path` in one move: a kill leaves the old file or the new one."""
    temporary = Path(f"{path}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_json(path, value):
    replace(path, (json.dumps(plain(value), indent=2, allow_nan=False) + "\n").encode())


class MetricsFile:
    """metrics.jsonl, one row a line. A line counts once its newline is there."""

    def __init__(self, path):
        self.path = Path(path)

    def _whole(self):
        """The bytes up to the last newline. What follows is a line that a kill has torn."""
        data = self.path.read_bytes() if self.path.exists() else b""
        return data[:data.rfind(b"\n") + 1]

    def rows(self):
        return [json.loads(line) for line in self._whole().splitlines()]

    def append(self, row):
        line = json.dumps(plain(row), allow_nan=False).encode() + b"\n"
        with open(self.path, "a+b") as f:
            if f.tell():
                f.seek(-1, os.SEEK_END)
                if f.read() != b"\n":
                    f.truncate(len(self._whole()))
            f.write(line)

    def rewind(self, arm, seed, step):
        """Drops the rows of (arm, seed) after `step`, the checkpoint that training resumes from."""
        def keep(line):
            row = json.loads(line)
            return (row["arm"], row["seed"]) != (arm, seed) or row["step"] <= step
        replace(self.path, b"".join(filter(keep, self._whole().splitlines(keepends=True))))
