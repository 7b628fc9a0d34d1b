"""Recipes: how a block of the teacher becomes a cheaper one. One file a recipe, and this registry of them."""

from distill.recipes.bottleneck import Bottleneck
from distill.recipes.convolutions import ConvolutionRecipe
from distill.recipes.halved import Halved
from distill.recipes.inverted import Inverted
from distill.recipes.keep import Keep
from distill.recipes.layers import LayerRecipe
from distill.recipes.lowrank import LowRank
from distill.recipes.one_conv import OneConv
from distill.recipes.recipe import Changes, Cost, Kept, Recipe, View, option
from distill.recipes.replacement import replace_convolutions, replace_layers
from distill.recipes.selection import select
from distill.recipes.separable import Separable
from distill.recipes.separable_x2 import SeparableX2
from distill.recipes.skip import Skip
from distill.recipes.stream import Stream
from distill.recipes.thin import Thin
from distill.recipes.whole_block import WholeBlock

RECIPES: dict[str, type[Recipe]] = {
    "separable": Separable,
    "separable_x2": SeparableX2,
    "one_conv": OneConv,
    "bottleneck": Bottleneck,
    "inverted": Inverted,
    "skip": Skip,
    "lowrank": LowRank,
    "thin": Thin,
    "halved": Halved,
    "stream": Stream,
    "keep": Keep,
}

__all__ = [
    "RECIPES",
    "Bottleneck",
    "Changes",
    "ConvolutionRecipe",
    "Cost",
    "Halved",
    "Inverted",
    "Keep",
    "Kept",
    "LayerRecipe",
    "LowRank",
    "OneConv",
    "Recipe",
    "Separable",
    "SeparableX2",
    "Skip",
    "Stream",
    "Thin",
    "View",
    "WholeBlock",
    "option",
    "replace_convolutions",
    "replace_layers",
    "select",
]
