"""Figures of explanations and the HTML report that lists them."""

from finecf.report.figures import displayable, plot
from finecf.report.html import Report, Row

__all__ = ["Report", "Row", "displayable", "plot"]
