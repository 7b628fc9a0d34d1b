"""Choosing one candidate for every block under budgets: what may be asked for, what is tried, and the best choice."""
