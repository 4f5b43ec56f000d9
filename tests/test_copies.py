"""What is meant to be copied runs in a file of its own: no common/, only packages."""

import ast
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from processes import ROOT

IMPORTS = """import functools, json, math
import einops, jax, optax
import jax.numpy as jnp
import numpy as np
"""
GIVEN = """
rng = np.random.default_rng(0)
unit_rows = lambda *s: (lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True))(
    rng.normal(size=s).astype(np.float32))
a, b, c, d = (unit_rows(24, 6) for _ in range(4))
model = lambda x, y, bias: {"image": x, "text": y, "log_t": np.float32(1.5), "b": np.float32(bias)}
models = {"learner": model(a, b, -3), "reference": model(c, d, -2)}
key = jax.random.key(0)
"""
COPIES = {  # what is copied -> a use of it, whose value does not depend on where it stands
    ("rho_learnability", "score", "select"):
        "select(key, score('learnability', {'proxy': a[:, 0], 'reference': b[:, 0]}), 5)",
    ("rho_learnability", "scoring_loss"): "scoring_loss((a, b), {})",
    ("jest", "jointly_sample"): "jointly_sample(key, models, 8, 4)",
    ("jest", "jointly_sample_dense"): "jointly_sample_dense(key, a @ b.T, 8, 4)",
    ("jest", "jointly_sample_softmax"):
        "jointly_sample_softmax(key, models, 8, 4)",
    ("jest", "contrastive_loss"): "contrastive_loss(model(a, b, -3), 'sigmoid')",
    ("dnc", "kmeans"): "kmeans(key, a, 3, restarts=2, tile=7)[0]",
    ("dnc", "moclr_loss"): "moclr_loss(a, b, c, d, 0.1)[0]",
    ("dnc", "distil_loss"): "distil_loss(a, None, b, None, None)",
    ("dnc", "lars"): "(lambda rule: rule.update({'w': b}, rule.init({'w': a}), {'w': a})[0]['w'])"
                     "(lars(0.1))",
}


def copied(script, names):
    """Source of top-level `names` of a script and of all in it that they use."""
    text = (ROOT / f"{script}.py").read_text()
    nodes = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            nodes[node.name] = node
        elif isinstance(node, ast.Assign):
            nodes |= {t.id: node for t in node.targets if isinstance(t, ast.Name)}
    wanted, todo = set(), list(names)
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted.add(name)
            todo += [n.id for n in ast.walk(nodes[name])
                     if isinstance(n, ast.Name) and n.id in nodes]
    return "\n\n".join(ast.get_source_segment(text, nodes[n]) for n in nodes if n in wanted)


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """What each use gives where the copy is all there is."""
    directory = tmp_path_factory.mktemp("copies")
    out = []
    for i, ((script, *names), use) in enumerate(COPIES.items()):
        path = directory / f"copy{i}.py"
        path.write_text(f"{IMPORTS}\n\n{copied(script, names)}\n\n{GIVEN}\n"
                        f"value = np.asarray({use}).tolist()\n")
        out.append(path.name)
    (directory / "all.py").write_text(
        "import importlib, json\nimport jax\njax.config.update('jax_platforms', 'cpu')\n"
        f"print(json.dumps([importlib.import_module(n[:-3]).value for n in {out}]))")
    done = subprocess.run([sys.executable, "-P", "all.py"], cwd=directory, capture_output=True,
                          text=True, env={"PYTHONPATH": str(directory), "PATH": ""})
    assert done.returncode == 0, done.stderr
    return dict(zip(COPIES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("copy", COPIES, ids=lambda c: c[1])
def test_a_copy_gives_what_the_script_gives(values, copy):
    script = __import__(copy[0])
    place = {}
    exec(IMPORTS + GIVEN, place)
    want = np.asarray(eval(COPIES[copy], {**place, **vars(script), **{
        k: place[k] for k in ("a", "b", "c", "d", "model", "models", "key")}}))
    np.testing.assert_allclose(values[copy], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("copy", COPIES, ids=lambda c: c[1])
def test_the_readme_says_what_comes_along(copy):
    script, *names = copy
    needed = re.findall(r"^(?:def )?(\w+)(?=\(| =)", copied(script, names), re.M)
    code = lambda some: ", ".join(f"`{name}`" for name in some)
    row = f"| {script}.py | {code(names)} | {code(n for n in needed if n not in names) or '-'} |"
    assert row in (ROOT / "README.md").read_text()
