"""Files that a kill may tear: what is lost, and what must not be."""

import numpy as np
import pytest

from common import files


def row(arm, seed, step):
    return {"arm": arm, "seed": seed, "step": step, "accuracy": 0.5}


def test_rows_come_back_with_nonfinite_as_null(tmp_path):
    f = files.MetricsFile(tmp_path / "metrics.jsonl")
    assert f.rows() == []
    f.append({"loss": float("nan"), "flops": {"learner": np.float32(np.inf)}, "n": np.int64(3),
              "scores": np.array([1.0, np.nan])})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("}\n") and "NaN" not in text and "Infinity" not in text
    assert f.rows() == [{"loss": None, "flops": {"learner": None}, "n": 3, "scores": [1.0, None]}]


@pytest.mark.parametrize("torn", [b'{"arm": "uni', b'{"step": 3}', b'{"a": "\xc3'])
def test_a_torn_line_is_ignored_then_removed(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    f = files.MetricsFile(path)
    assert [r["step"] for r in f.rows()] == [1, 2]
    f.append({"step": 4})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 4}\n'


def test_a_file_that_is_one_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"st')
    f = files.MetricsFile(path)
    assert f.rows() == []
    f.append({"step": 1})
    assert f.rows() == [{"step": 1}]


def test_rewind_drops_only_what_one_run_logged_after_its_checkpoint(tmp_path):
    f = files.MetricsFile(tmp_path / "metrics.jsonl")
    f.rewind("uniform", 0, 0)  # nothing logged yet
    rows = [row(arm, seed, step) for arm in ("uniform", "clever") for seed in (0, 1)
            for step in (1, 2, 3)]
    for r in rows:
        f.append(r)
    with open(f.path, "ab") as raw:
        raw.write(b'{"torn')
    f.rewind("clever", 1, 2)
    assert f.rows() == rows[:-1]
    assert f.path.read_bytes().endswith(b"}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_failed_rewind_leaves_the_old_file(tmp_path, monkeypatch):
    f = files.MetricsFile(tmp_path / "metrics.jsonl")
    f.append(row("uniform", 0, 1))
    before = f.path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        f.rewind("uniform", 0, 0)
    assert f.path.read_bytes() == before


def test_write_json_keeps_order_and_ends_with_a_newline(tmp_path):
    files.write_json(tmp_path / "s.json", {"b": np.nan, "a": (1, np.float32(0.5))})
    assert (tmp_path / "s.json").read_text() == (
        '{\n  "b": null,\n  "a": [\n    1,\n    0.5\n  ]\n}\n')
