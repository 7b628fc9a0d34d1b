"""Planners: from costs to a Plan, one object a strategy, and the searches behind them. No torch here."""

from distill.planning import strategies as strategies  # a plan asks its strategy, so that all of them must be known
