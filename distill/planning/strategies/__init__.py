"""Strategies: one file each, or each family, and their registry. See plan.Strategy for what a new one needs."""

from distill.planning.plan import STRATEGIES
from distill.planning.strategies.broadcast import Broadcast
from distill.planning.strategies.cached import Cached
from distill.planning.strategies.one_by_one import DataParallel, Layerwise, Serial
from distill.planning.strategies.relay import Relay, RelayInGroups
from distill.planning.strategies.replicate import Replicate

for _strategy in (
    Broadcast(), Relay(), RelayInGroups(), Replicate(), Layerwise(), Serial(), DataParallel(), Cached(),
):  # fmt: skip
    STRATEGIES[_strategy.name] = _strategy

__all__ = ["STRATEGIES"]
