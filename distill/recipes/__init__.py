"""Recipes: how a block of the teacher becomes a cheaper one. One file a recipe, and this registry of them."""

from distill.recipes.convolutions import ConvolutionRecipe
from distill.recipes.keep import Keep
from distill.recipes.layers import LayerRecipe
from distill.recipes.lowrank import LowRank
from distill.recipes.one_conv import OneConv
from distill.recipes.recipe import Changes, Cost, Kept, Recipe, View, option
from distill.recipes.replacement import replace_convolutions, replace_layers
from distill.recipes.selection import select
from distill.recipes.separable import Separable
from distill.recipes.separable_x2 import SeparableX2
from distill.recipes.stream import Stream
from distill.recipes.thin import Thin

RECIPES: dict[str, type[Recipe]] = {
    "separable": Separable,
    "separable_x2": SeparableX2,
    "one_conv": OneConv,
    "lowrank": LowRank,
    "thin": Thin,
    "stream": Stream,
    "keep": Keep,
}

__all__ = [
    "RECIPES",
    "Changes",
    "ConvolutionRecipe",
    "Cost",
    "Keep",
    "Kept",
    "LayerRecipe",
    "LowRank",
    "OneConv",
    "Recipe",
    "Separable",
    "SeparableX2",
    "Stream",
    "Thin",
    "View",
    "option",
    "replace_convolutions",
    "replace_layers",
    "select",
]
