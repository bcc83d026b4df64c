"""Imports point one way, as the table of the package's README says, and what is dangerous is named nowhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import distcache

PACKAGE = Path(distcache.__file__).parent
README = (PACKAGE / "README.md").read_text()
LEVELS = {name: int(level) for level, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", README, re.M)}
OTHER_WAY = set(re.findall(r"`(\w+)` -> `(\w+)`", README))
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

# Third-party packages that may be named in few places.
ONLY_IN = {
    "torch.distributed": {"comm", "testing"},
    "transformers": {"attention"},
    "triton": {"attention"},
    "matplotlib": {"plot"},
    "ray": {"pool"},
}
NOWHERE = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Names of calls that pickle what they send, or run what they read.
FORBIDDEN = re.compile(
    r"(?:all_gather|gather|broadcast|scatter|send|recv)_object\w*|torch\.(?:load|save)\(|\beval\(\"|\bexec\("
)


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is executed when the module is imported) of every import that isn't for types alone."""

    def visit(node: ast.AST, at_top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are absolute"
                yield from ((f"{child.module}.{alias.name}", at_top) for alias in child.names)
            yield from visit(child, at_top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    return visit(ast.parse(source), True)


def wrong_imports(module: str, source: str) -> list[str]:
    """What a module imports and may not, in words."""
    found = []
    for name, at_top in imports(source):
        if name.startswith("distcache."):
            other = name.split(".")[1]
            if other == module or (not at_top and (module, other) in OTHER_WAY):
                continue
            if LEVELS[other] >= LEVELS[module]:
                found.append(f"{module} (level {LEVELS[module]}) imports {other} (level {LEVELS[other]})")
        found.extend(f"{module} imports {name}" for bad in NOWHERE if name.split(".")[0] == bad)
        for package, homes in ONLY_IN.items():
            if (name + ".").startswith(package + ".") and module not in homes:
                found.append(f"{module} imports {package}, which belongs into {sorted(homes)}")
    return found


def test_the_table_names_every_module_and_no_other():
    assert set(LEVELS) == {module_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_from_levels_below_its_own(path):
    assert wrong_imports(module_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("from distcache.cache import ActivationCache", "imports cache"),
        ("from distcache import cache", "imports cache"),
        ("def f():\n    from distcache.merge import merge", "imports merge"),
        ("import torch.distributed as dist", "belongs into"),
        ("from torch import distributed", "belongs into"),
        ("import pickle", "imports pickle"),
        ("def f():\n    import ray.util", "belongs into"),
    ],
)
def test_an_import_the_wrong_way_is_found(source, complaint):
    assert complaint in " ".join(wrong_imports("schema", source))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_pickles_what_it_sends_or_runs_what_it_reads(path):
    assert FORBIDDEN.findall(re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S)) == []


def test_what_pickles_is_found():
    assert all(map(FORBIDDEN.search, ["dist.all_gather_object(x)", "torch.load(f)", "broadcast_object_list(x)"]))
