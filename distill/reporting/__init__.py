"""From run directories to tables and self-contained HTML pages; needs no torch and runs on a laptop."""

from __future__ import annotations

from distill.reporting.comparison import comparison_table, write_comparison
from distill.reporting.console import console
from distill.reporting.page import write_report
from distill.reporting.scaling import write_scaling
from distill.reporting.tables import plan_table, result_table

__all__ = [
    "comparison_table",
    "console",
    "plan_table",
    "result_table",
    "write_comparison",
    "write_report",
    "write_scaling",
]
