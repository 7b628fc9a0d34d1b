"""From run directories to tables and self-contained HTML pages; needs no torch and runs on a laptop."""

from __future__ import annotations

from distill.report.comparison import comparison_table, write_comparison
from distill.report.console import console
from distill.report.page import write_report
from distill.report.scaling import write_scaling
from distill.report.tables import plan_table, result_table

__all__ = [
    "comparison_table",
    "console",
    "plan_table",
    "result_table",
    "write_comparison",
    "write_report",
    "write_scaling",
]
