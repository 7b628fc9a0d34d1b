"""Planners: from costs to a Plan, one module a strategy, and the searches behind them. No torch here."""
