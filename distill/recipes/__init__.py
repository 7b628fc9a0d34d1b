"""Recipes: how a convolution of the teacher becomes a cheaper one of the student. One file a recipe."""

from distill.recipes.recipe import Recipe, replace_convolutions
from distill.recipes.selection import Kept, select
from distill.recipes.separable import Separable
from distill.recipes.separable_x2 import SeparableX2

RECIPES: dict[str, type[Recipe]] = {"separable": Separable, "separable_x2": SeparableX2}

__all__ = ["RECIPES", "Kept", "Recipe", "Separable", "SeparableX2", "replace_convolutions", "select"]
