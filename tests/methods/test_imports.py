"""Who may import whom (the layers of the project), read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OWN = {"methods", "runners", "analysis", "benchmarks", "tests"}
FOLDERS = ("methods", "runners", "analysis", "benchmarks")
ENGINE = sorted((ROOT / "methods" / "engine").rglob("*.py"))
TRITON = sorted((ROOT / "methods/engine/ops/triton").rglob("*.py"))
CONTRACT = [ROOT / "methods" / f"{name}.py" for name in ("base", "options", "types")]
PARTS = [*sorted((ROOT / "methods" / "parts").glob("*.py")), *CONTRACT]
METHOD_FILES = [p for p in sorted((ROOT / "methods").glob("*.py")) if p not in CONTRACT]
RUNNERS = sorted((ROOT / "runners").rglob("*.py"))
ANALYSIS = sorted((ROOT / "analysis").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, `a.b` for `from a import b` of a package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [alias.name for alias in node.names] if node.module in OWN else []
            yield from [f"{node.module}.{name}" for name in names] or [str(node.module)]


def imported_modules(path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    """Those of `modules` that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else str(node.module)


def outside(path: Path, allowed_own: tuple[str, ...], allowed_libraries: set[str]) -> list[str]:
    """Imports of a file that its layer does not allow; the standard library always is."""
    bad = []
    for name in imported(path):
        top = name.partition(".")[0]
        if top in OWN:
            fine = any(name == own or name.startswith(f"{own}.") for own in allowed_own)
        else:
            fine = top in sys.stdlib_module_names or top in allowed_libraries
        if not fine:
            bad.append(name)
    return bad


def test_there_is_something_to_check():
    assert all(
        len(files) >= 4 for files in (ENGINE, PARTS, METHOD_FILES, RUNNERS, ANALYSIS, BENCHMARKS)
    )
    assert "methods.base" in set(imported(ROOT / "methods" / "informed.py"))


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.stem)
def test_parts_and_base_use_torch_alone(path):
    own = ("methods.base", "methods.options", "methods.parts", "methods.types")
    assert outside(path, own, {"torch"}) == []


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda path: path.stem)
def test_a_method_uses_base_and_parts(path):
    assert outside(path, ("methods.base", "methods.options", "methods.parts"), {"torch"}) == []


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_engine_knows_no_method(path):
    allowed = {"torch", "transformers", "safetensors", "peft", "accelerate"}
    if "triton" in path.parts:  # a folder of that name, and no other file, may know the package
        allowed |= {"triton"}
    assert outside(path, ("methods.base", "methods.engine"), allowed) == []


GROUND = ("errors", "options", "point_config", "runtime", "store")
RULES: dict[str, tuple[str, ...]] = {
    "errors": (),
    "options": ("errors",),
    "point_config": ("errors", "options", "store"),
    "runtime": ("errors",),
    "store": ("errors", "runtime"),
    "corpus": ("errors", "point_config", "store"),
    "base_model": ("errors", "point_config", "runtime", "store"),
    "training": ("errors", "runtime", "store", "corpus"),
    "tracking": ("errors", "point_config", "store"),
    "evaluation": (*GROUND, "corpus", "base_model"),
    "inspection": (*GROUND, "corpus", "base_model"),
    "timing": (*GROUND, "corpus", "base_model"),
    "content": (*GROUND, "corpus", "evaluation"),
    "launching": (*GROUND, "corpus", "base_model", "evaluation"),
    "routed_lm": (*GROUND, "corpus", "base_model", "evaluation", "training", "launching"),
    "point": (*GROUND, "corpus", "base_model", "evaluation", "training", "tracking"),
    "api": (*GROUND, "corpus", "base_model", "evaluation", "training", "point"),
    "job": (*GROUND, "content", "point", "tracking", "timing"),
    "planning": (*GROUND, "corpus", "base_model", "content", "point", "training"),
    "sweep": ("job", "launching"),
    "train": ("job", "launching"),
    "score": ("job", "launching"),
    "speed": ("job", "launching"),
    "plan": (*GROUND, "launching", "planning"),
    "fetch": (*GROUND, "launching", "evaluation"),
    "inspect_routing": (*GROUND, "launching", "inspection"),
}
"""What each folder or file of runners may import of the others, from the ground up."""
ABOVE_THE_ENGINE = {"base_model", "training", "evaluation", "inspection", "timing", "planning"}
ABOVE_THE_ENGINE |= {"api", "point", "routed_lm", "store", "launching"}
"""Who of them may import methods.engine: store hashes weights, launching asks what it supports."""


def part_of(module: str) -> str:
    """The folder or file of runners that a module lies in."""
    return module.split(".")[1]


@pytest.mark.parametrize("path", RUNNERS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_runners_import_what_lies_below(path):
    """No concrete method, and of runners what the table says."""
    own = path.relative_to(ROOT).with_suffix("").parts[1]
    if own == "__init__":
        return
    names = [name for name in imported(path) if name.partition(".")[0] in OWN]
    inner = {part_of(name) for name in names if name.startswith("runners.")}
    assert inner <= {own, *RULES[own]}
    engine = "methods.engine" if own in ABOVE_THE_ENGINE else "methods.base"
    rest = [name for name in names if not name.startswith("runners.")]
    search = "methods.parts.calibration"  # how a threshold is found, whoever asks for it
    assert [n for n in rest if not n.startswith(("methods.base", engine, search))] == []


def test_the_table_has_no_circle_and_no_idle_row():
    assert {path.relative_to(ROOT / "runners").parts[0].removesuffix(".py") for path in RUNNERS} - {
        "__init__"
    } == set(RULES)
    left = dict(RULES)
    while left:
        ground = [name for name, below in left.items() if not set(below) & set(left)]
        assert ground, left
        for name in ground:
            del left[name]


def test_no_module_of_the_project_is_in_a_circle():
    """Imports inside functions and for type checkers count too."""
    every = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")]
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in every}
    left = {name: set(imported_modules(path, modules)) - {name} for name, path in modules.items()}
    while left:
        ground = [name for name, below in left.items() if not below & set(left)]
        assert ground, f"a circle among {sorted(left)}"
        for name in ground:
            del left[name]


@pytest.mark.parametrize("path", TRITON, ids=lambda path: path.stem)
def test_triton_kernels_stand_on_the_contract_and_operations(path):
    own = ("methods.base", "methods.types", "methods.engine.ops")
    assert outside(path, own, {"torch", "triton"}) == []


def test_nothing_imports_the_benchmarks():
    for path in [*ENGINE, *PARTS, *METHOD_FILES, *RUNNERS, *ANALYSIS]:
        assert not [name for name in imported(path) if name.startswith("benchmarks")], path


@pytest.mark.parametrize("path", ANALYSIS, ids=lambda path: path.stem)
def test_analysis_reads_the_store_only(path):
    allowed = {"pandas", "pyarrow", "matplotlib", "numpy", "scipy", "yaml", "jinja2", "markupsafe"}
    if path.stem == "wandb_report":
        allowed |= {"wandb", "wandb_workspaces"}
    assert outside(path, ("analysis",), allowed) == []


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmarks_name_no_method_and_no_other_benchmark(path):
    """`gpu` is the others in one command, and what it trains a file of its own."""
    libraries = {"torch", "transformers", "triton", "lm_eval", "yaml"}
    own = ("methods.base", "methods.types", "methods.parts", "methods.engine", "runners")
    own += (
        ("benchmarks.kernels", "benchmarks.gpu_training") if path.stem == "gpu" else ("analysis",)
    )
    assert outside(path, own, libraries) == []


def test_no_type_check_on_a_method():
    names = {"Method"}
    for path in METHOD_FILES:
        tree = ast.parse(path.read_text())
        names |= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for path in [*ENGINE, *RUNNERS, *PARTS, *METHOD_FILES]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not asked & names, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("folder", ["runners", "analysis"])
def test_no_script_shadows_a_package(folder):
    """`python runners/sweep.py` puts runners/ first on sys.path."""
    installed = set(metadata.packages_distributions()) - OWN
    forbidden = installed | set(sys.stdlib_module_names) | {"evaluate", "datasets", "tokenizers"}
    stems = {path.stem for path in (ROOT / folder).iterdir()} - {"__init__", "__pycache__"}
    assert stems and not stems & forbidden


def test_methods_import_without_the_runners_libraries():
    code = (
        "import sys, pkgutil, importlib\n"
        "for name in ('hydra', 'omegaconf', 'lm_eval', 'wandb', 'pandas', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import methods\n"
        "for found in pkgutil.walk_packages(methods.__path__, 'methods.'):\n"
        "    importlib.import_module(found.name)\n"
        "print(len([m for m in sys.modules if m.startswith('methods.')]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 20
