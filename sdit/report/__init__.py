"""One self-contained HTML page about a run, or about several side by side."""

from sdit.report.page import build_page
from sdit.report.record import RunRecord, read_runs

__all__ = ["RunRecord", "build_page", "read_runs"]
