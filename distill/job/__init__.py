"""Wiring: besides the launcher the only place that sees the configuration; it builds everything and runs the stages."""

from distill.job.rank import run_alone, run_rank

__all__ = ["run_alone", "run_rank"]
