"""`import linearize` makes transformers load exported folders, in whichever order the two are imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATH = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")])

# a transformers of three empty files and the table: the import orders cost nothing to try
TABLE = """
class Table(dict):
    def register(self, key, value, exist_ok=False):
        assert key not in self
        self[key] = value

CONFIG_MAPPING = Table(llama=object)
"""
TABLE_MODULE = "transformers.models.auto.configuration_auto"
IMPORT_ORDERS = {
    "linearize first": f"import linearize, {TABLE_MODULE}",
    "transformers first": f"import transformers, linearize, {TABLE_MODULE}",
    "table first": f"import {TABLE_MODULE}, linearize",
    "looked for, imported later": "import linearize, importlib.util\n"
    f"importlib.util.find_spec('{TABLE_MODULE}')\nimport {TABLE_MODULE}",
    "linearize twice": f"import linearize, importlib\nimportlib.reload(linearize)\nimport {TABLE_MODULE}\n"
    "importlib.reload(linearize)",
    "table twice": f"import linearize, importlib, {TABLE_MODULE}\nimportlib.reload({TABLE_MODULE})",
}


def python(code: str, *args: str, cwd: Path, path: str = PATH) -> str:
    """The output of a Python process of its own."""
    env = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code, *args]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def fake_transformers(folder: Path) -> Path:
    """Empty packages where transformers has its own; returns the innermost."""
    auto = folder / "transformers" / "models" / "auto"
    auto.mkdir(parents=True)
    for package in (auto, auto.parent, auto.parent.parent):
        (package / "__init__.py").touch()
    return auto


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_the_table_gets_our_model_type_in_any_order(order, tmp_path):
    (fake_transformers(tmp_path) / "configuration_auto.py").write_text(TABLE)
    code = IMPORT_ORDERS[order] + (
        f"\nimport sys\ntable = sys.modules['{TABLE_MODULE}']\n"
        "assert table.__file__.startswith(sys.argv[1])\n"
        "print(list(table.CONFIG_MAPPING), table.CONFIG_MAPPING['linearized'].model_type)"
    )
    path = os.pathsep.join([str(tmp_path), PATH])
    assert python(code, str(tmp_path), cwd=tmp_path, path=path) == "['llama', 'linearized'] linearized"


def test_where_there_is_no_table_the_import_error_is_the_usual_one(tmp_path):
    fake_transformers(tmp_path)
    code = (
        f"import linearize\ntry:\n    import {TABLE_MODULE}\nexcept ImportError as e:\n    print(e)"
    )
    path = os.pathsep.join([str(tmp_path), PATH])
    assert python(code, cwd=tmp_path, path=path) == f"No module named '{TABLE_MODULE}'"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A converted two-layer model, as its own save_pretrained writes it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from linearize.architecture import linearize_
    from linearize.recipe import AttentionSettings

    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    linearize_(model, AttentionSettings(window=8, sinks=2))
    folder = tmp_path_factory.mktemp("exported")
    model.save_pretrained(folder)
    return folder


LINEARIZE_FIRST = "import linearize\nfrom transformers import AutoModelForCausalLM"
TRANSFORMERS_FIRST = "from transformers import AutoModelForCausalLM\nimport linearize"


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param(LINEARIZE_FIRST, id="linearize first"),
        pytest.param(TRANSFORMERS_FIRST, id="transformers first", marks=pytest.mark.slow),
    ],
)
def test_an_exported_folder_loads_with_auto_classes(imports, exported, tmp_path):
    code = f"import sys\n{imports}\nmodel = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n" + (
        "print(model.config.model_type, type(model).__module__, type(model).__name__)"
    )
    expected = "linearized linearize.modeling_linearized LinearizedLlamaForCausalLM"
    assert python(code, str(exported), cwd=tmp_path).splitlines()[-1] == expected
