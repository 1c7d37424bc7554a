"""danet recipes and danet config."""

import sys

from danet.cli.options import Overrides, Recipe


def recipes() -> None:
    """List the built-in recipes with their published and measured scores."""
    from rich.console import Console
    from rich.table import Table

    from danet.recipes import recipe_header, recipe_names

    table = Table("recipe", "what it is", "published", "measured", box=None)
    table.columns[0].no_wrap = True
    for name in recipe_names():
        table.add_row(name, *recipe_header(name))
    # One line each for programs that read it.
    Console(width=None if sys.stdout.isatty() else 400).print(table)


def config(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print a recipe with everything it extends resolved, as YAML."""
    from danet.recipes import load_recipe

    print(load_recipe(recipe, overrides or ()).to_yaml(), end="")
