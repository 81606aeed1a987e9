"""Run folders to one HTML file: no script, no network, nothing but what lies in the folders."""

from palate.report.page import write_report

__all__ = ["write_report"]
