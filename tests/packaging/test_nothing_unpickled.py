"""No source of ours unpickles a file, runs a text, or reads JSON past the limits."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("dist_dp", "kernels", "cluster", "datasets")

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    "eval",
    "exec",
    "torch.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "numpy.fromfile",
    "np.load",
    "numpy.load",
    "pd.read_pickle",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "json.load",
    "json.loads",
}
METHODS = {"read_pickle", "unsafe_load", "full_load"}
# torch.distributed.checkpoint pickles unless it is given storage; ours is given.
ALLOWED = {
    ("dist_dp/limits.py", "json.loads"),
    # What this process has just made, and a note that the installed wheel carries.
    ("dist_dp/checkpoint_folder.py", "json.loads"),
    ("dist_dp/checkpoint_description.py", "json.loads"),
    ("dist_dp/ledger.py", "json.loads"),
    ("dist_dp/ledger_tables.py", "json.loads"),
    ("dist_dp/_builds.py", "json.loads"),
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = []
        yield from (n for n in names if n.partition(".")[0] in MODULES or n in CALLS)
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            allows = any(k.arg == "allow_pickle" for k in node.keywords)
            if name in CALLS or name.rpartition(".")[2] in METHODS or allows:
                yield name


def test_nothing_is_unpickled_or_run() -> None:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 150
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in paths
        for name in dangers(path.read_text(encoding="utf-8"))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x', weights_only=True)",
        "from torch import load",
        "np.load('x')",
        "x = read(path, allow_pickle=True)",
        "import joblib.memory",
        "yaml.load(text, Loader=yaml.Loader)",
        "from yaml import load",
        "eval('1')",
        "def f():\n    exec(text)",
        "frame = polars.read_pickle(x)",
        "json.loads(path.read_text())",
    ],
)
def test_a_danger_is_seen(source: str) -> None:
    assert list(dangers(source))


def test_what_is_harmless_is_not() -> None:
    assert not list(dangers("yaml.safe_load(x); json.dumps(x); model.eval(); re.compile(x)"))
