"""A results folder in, one self-contained HTML page and figures out."""

from __future__ import annotations

from .collect import ReportData, collect_results
from .figures import write_figures
from .page import build_page

__all__ = ["ReportData", "build_page", "collect_results", "write_figures"]
