"""A corpus that needs no download: the docstrings of the installed Python packages.

It has several MB of English text, enough to see a small model learn.
"""

import ast
import importlib.util
import json
import os
import sys
import sysconfig
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.files import open_file, replace

# the packages with the most text among those that requirements.txt installs
PACKAGES = ("numpy", "torch", "pandas", "networkx", "sympy")
SKIPPED = {"test", "tests", "testing", "site-packages", "dist-packages"}  # folders
SHORTEST = 100  # characters of a docstring
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def write_docstrings(path: Path) -> None:
    """Write a jsonl file with one document per module of the standard library and of PACKAGES.

    An existing file is kept. Raises Unreadable if it cannot be read.
    """
    if os.path.lexists(path):
        open_file(path, "give another --out").close()
        return
    seen: set[str] = set()
    documents = []
    for module in tqdm(find_modules(), desc="docstrings", unit="module",
                       disable=not sys.stderr.isatty()):
        strings = [text for text in read_docstrings(module) if text not in seen]
        seen.update(strings)
        if strings:
            documents.append("\n\n".join(strings))
    # shuffled, as the validation shard is cut from the beginning
    order = np.random.default_rng(0).permutation(len(documents))
    lines = "".join(json.dumps({"text": documents[i]}) + "\n" for i in order)
    replace(path, lambda file: file.write(lines.encode()))


def find_modules() -> list[Path]:
    """The .py files of the standard library and of PACKAGES, sorted, without tests."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # does not import it
        if spec and spec.origin:
            roots.append(Path(spec.origin).parent)
    modules = set()
    for root in roots:
        for path in root.rglob("*.py"):
            if not SKIPPED & set(path.relative_to(root).parts):
                modules.add(path)
    return sorted(modules)


def read_docstrings(module: Path) -> list[str]:
    """The distinct docstrings of a module that are longer than SHORTEST; none if it is not valid
    Python."""
    try:
        tree = ast.parse(module.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    strings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    return [text for text in dict.fromkeys(strings) if text and len(text) > SHORTEST]
