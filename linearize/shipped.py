"""The recipes that come with the package: where they are, what they are called, how to copy one."""

import difflib
import shutil
from pathlib import Path

from linearize.errors import RecipeError


def recipes_dir() -> Path:
    """The folder of the shipped recipes: inside an installed package, else beside it in a clone.

    Raises:
        RecipeError: neither is there (a damaged installation).
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "default.yaml").is_file():
            return folder
    raise RecipeError(f"the shipped recipes are not in {package / 'recipes'}: install linearize again")


def list_recipes() -> list[tuple[str, str]]:
    """(name, what it does: the first comment line) of every shipped recipe, by name."""
    paths = sorted(recipes_dir().glob("*.yaml"))
    return [(path.stem, path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")) for path in paths]


def recipe_path(name: str) -> Path:
    """The file of a shipped recipe.

    Raises:
        RecipeError: there is no such recipe; names the nearest.
    """
    names = [known for known, _ in list_recipes()]
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(names)}."
        raise RecipeError(f"no recipe is called '{name}': {hint} See them all: linearize recipes ls")
    return recipes_dir() / f"{name}.yaml"


def copy_recipe(name: str, target: str | Path, *, force: bool = False) -> Path:
    """Copies a shipped recipe to a file (or into a folder, under its own name) and returns the new path.

    Raises:
        RecipeError: no such recipe, no such folder, or the target exists and `force` is not set.
    """
    source, target = recipe_path(name), Path(target)
    if target.is_dir():
        target = target / source.name
    if target.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"{target}: a recipe's file name ends in .yaml; write {target}.yaml")
    if not target.parent.is_dir():
        raise RecipeError(f"{target.parent}: no such folder; create it first")
    if target.exists() and not force:
        raise RecipeError(f"{target} exists; choose another name, or overwrite it with --force")
    shutil.copyfile(source, target)
    return target
