"""The house rules that a machine can check: what is where, who imports whom, and what the wheel holds."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "linearize": ROOT / "linearize",
    "linearize_kernels": ROOT / "kernels" / "linearize_kernels",
    "linearize_eval": ROOT / "eval" / "linearize_eval",
}
STAGES = {"calibrate", "match", "finetune", "export"}
# what the command line imports when it starts
LIGHT = {
    "__init__", "cli", "cli_examples", "cli_values", "config", "errors", "lengths", "recipe", "registration",
    "settings", "shipped",
}  # fmt: skip
# what the kernels' benchmark may import inside its functions, where it is installed
BENCH_PEERS = {"fla", "matplotlib"}
HEAVY = {"torch", "transformers", "numpy", "datasets", "peft", "accelerate", "safetensors", "lm_eval", "gguf"}
SOURCES = sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))


def imports(tree: ast.AST, package: str) -> set[str]:
    """The modules that some code of a package imports, by full name, `from . import x` as 'package.x'."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, "packages are flat"
            module = ".".join(part for part in (package if node.level else "", node.module) if part)
            names |= {f"{module}.{alias.name}" for alias in node.names} if module in PACKAGES else {module}
    return names


def at_start(tree: ast.Module) -> ast.Module:
    """The same module without the bodies of functions: what runs when it is imported."""

    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

    return Cut().visit(tree)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def of(names: set[str], *packages: str) -> set[str]:
    return {name for name in names if name.partition(".")[0] in packages}


def test_root_folders_are_not_packages():
    # an importable top-level `kernels` would shadow the PyPI package, which transformers imports
    for folder in ("kernels", "eval", "recipes", "tests"):
        assert not (ROOT / folder / "__init__.py").exists(), folder
        assert not list((ROOT / folder).glob("*.pyi"))
    for folder in PACKAGES.values():
        assert (folder / "__init__.py").is_file(), folder
    assert not list((ROOT / "recipes").rglob("*.py"))
    assert not [path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_recipes_in_the_wheel_shadow_no_module():
    assert not (ROOT / "linearize" / "recipes.py").exists()
    assert not (ROOT / "linearize" / "recipes").exists()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file(path):
    text, tree = path.read_text(encoding="utf-8"), parse(path)
    num_lines = text.count("\n")
    assert num_lines <= 400
    assert ast.get_docstring(tree), "has no docstring that says what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"line {node.lineno}: {caught}"


def broken_rules(tree: ast.Module, package: str, name: str) -> list[str]:
    """What a module imports and should not."""
    everywhere, starting = imports(tree, package), imports(at_start(tree), package)
    roots = {imported.partition(".")[0] for imported in everywhere}
    broken = {"cli"} & roots
    if package == "linearize_kernels":
        allowed = set(sys.stdlib_module_names) | {"torch", "triton", "linearize_kernels"}
        late = BENCH_PEERS if name.startswith("bench") else {"cuda"} if name == "cuda" else set()
        broken |= (roots - allowed - late) | ({each.partition(".")[0] for each in starting} - allowed)
    if package == "linearize":
        broken |= of(starting if name in ("cli", "convert") else everywhere, "linearize_eval")
        if name in STAGES:
            broken |= everywhere & {f"linearize.{stage}" for stage in STAGES - {name}}
        if name in LIGHT:
            broken |= of(starting, "linearize") - {f"linearize.{light}" for light in LIGHT | {"__version__"}}
            broken |= of(starting, *HEAVY)
    return sorted(broken)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_who_imports_whom(path):
    assert broken_rules(parse(path), path.parent.name, path.stem) == []


@pytest.mark.parametrize(
    ("package", "name", "code", "broken"),
    [
        ("linearize_kernels", "a", "import torch, triton\nfrom .b import c\nimport math", []),
        ("linearize_kernels", "a", "from linearize.errors import E", ["linearize"]),
        ("linearize_kernels", "a", "def f():\n    import numpy", ["numpy"]),
        ("linearize_kernels", "a", "def f():\n    import fla.ops", ["fla"]),
        ("linearize_kernels", "cuda", "def f():\n    from cuda.bindings import nvrtc", []),
        ("linearize_kernels", "cuda", "import cuda.bindings", ["cuda"]),
        ("linearize_kernels", "a", "def f():\n    import cuda.bindings", ["cuda"]),
        ("linearize_kernels", "bench_a", "def f():\n    import fla.ops, matplotlib", []),
        ("linearize_kernels", "bench_a", "import matplotlib.figure", ["matplotlib"]),
        ("linearize_kernels", "bench_a", "def f():\n    import numpy", ["numpy"]),
        ("linearize", "match", "from . import export", ["linearize.export"]),
        ("linearize", "match", "def f():\n    from .export import x", ["linearize.export"]),
        ("linearize", "match", "import linearize.export", ["linearize.export"]),
        ("linearize", "match", "from linearize_kernels import x\nfrom . import data", []),
        ("linearize", "data", "def f():\n    import linearize_eval.recall", ["linearize_eval.recall"]),
        ("linearize", "cli", "def f():\n    import linearize_eval.recall", []),
        ("linearize", "cli", "import linearize_eval.recall", ["linearize_eval.recall"]),
        ("linearize", "cli", "if True:\n    from linearize import data", ["linearize.data"]),
        ("linearize", "cli", "import torch.nn", ["torch.nn"]),
        ("linearize", "cli", "def f():\n    import torch.nn", []),
        ("linearize_eval", "a", "import cli", ["cli"]),
    ],
)
def test_the_import_rules_can_fail(package, name, code, broken):
    assert broken_rules(ast.parse(code), package, name) == broken


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_module_and_recipe_and_nothing_else(wheel):
    files = set(wheel.namelist())
    (info,) = {name.split("/")[0] for name in files if ".dist-info/" in name}
    packaged = {name for name in files if not name.startswith(info)}
    assert {name.split("/")[0] for name in packaged} == set(PACKAGES)
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.suffix in (".py", ".cu", ".cuh")
    }
    recipes = {f"linearize/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    assert len([name for name in recipes if name.endswith(".yaml")]) >= 7
    assert packaged == expected | recipes


def test_wheel_has_the_command_the_version_and_the_licence(wheel):
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert info == "linearize-0.1.0.dist-info"
    assert "linearize = linearize.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "Requires-Python: >=3.10" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert required and not [line for line in required if line.partition(";")[0].count("==")], (
        "floors, not pins"
    )
    for extra in ("eval", "test"):
        assert f"Provides-Extra: {extra}" in metadata


def test_the_unpacked_wheel_finds_its_recipes(wheel, tmp_path):
    wheel.extractall(tmp_path)
    command = [sys.executable, "-m", "linearize.cli", "recipes", "ls"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    assert "quickstart " in result.stdout
