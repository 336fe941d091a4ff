"""How a configuration trains, as a checked recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from poolshare.space import ConfigError
from poolshare.supernet.options import read_value
from poolshare.supernet.training.recipe import Recipe

from ..config import SearchConfig, check_recipe_names, first_problem


def supernet_recipe(config: SearchConfig) -> Recipe:
    """How a configuration trains its supernet. Raises ConfigError naming what the recipe cannot have."""
    check_recipe_names(config.recipe)
    for name in ("drop_path", "distill"):
        if name in config.recipe:
            raise ConfigError(
                f"--recipe {name}={config.recipe[name]}: that belongs to `poolshare retrain`; leave it out"
            )
    situation: dict[str, Any] = {"layer_decay": 0.75 if config.warm else None, "within": config.drawn_within}
    flags = ("epochs", "batch_size", "lr", "weight_decay", "amp")
    return checked_recipe(situation | {name: getattr(config, name) for name in flags} | config.recipe)


def tuning_recipe(config: SearchConfig) -> Recipe:
    """How a configuration tunes the dense model: as the supernet, for epochs of its own."""
    return supernet_recipe(config).model_copy(update={"epochs": config.tune_epochs, "within": None})


def read_recipe(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a recipe, each read by its type. Raises ConfigError naming one that cannot be read; unknown ones stay."""
    found = dict(changes)
    for name, value in changes.items():
        field = Recipe.model_fields.get(name)
        try:
            found[name] = read_value(field.annotation, value) if field else value
        except ValueError as error:
            raise ConfigError(f"--recipe {name}={value} cannot be read: {error}") from None
    return found


def checked_recipe(values: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Recipe:
    """A Recipe; changes that are None are left out. Raises ConfigError naming the field and what it may be."""
    values = read_recipe({**values, **{name: value for name, value in (changes or {}).items() if value is not None}})
    try:
        return Recipe(**values)
    except ValidationError as error:
        name, problem = str(error.errors()[0]["loc"][0]), first_problem(error)
        if name not in ("epochs", "batch_size", "lr", "amp"):  # those that are flags
            problem = f"--recipe {name}={values[name]}: {error.errors()[0]['msg']}; there are {', '.join(Recipe.model_fields)}"
        raise ConfigError(problem) from None


def without_usual_recipe(config: SearchConfig) -> SearchConfig:
    """The same without what its recipe spells out and would be so anyway."""
    usual, recipe = supernet_recipe(config.changed(recipe={})), supernet_recipe(config)
    changes = {name: value for name in config.recipe if (value := getattr(recipe, name)) != getattr(usual, name)}
    return config.changed(recipe=changes)
