"""Everything that shows a finished run, written into its folder: page, picture, and the numbers they are drawn from."""

from __future__ import annotations

from ..job.folder import RunFolder
from ..job.records import write_csv
from .figure import figure_png
from .page import write_html
from .report import Report, load_report


def write_report(folder: RunFolder) -> Report:
    """Write the page and the picture of a finished run, and beside them the numbers that no other file holds."""
    report = load_report(folder)
    write_csv(folder.path / "layers.csv", report.layer_shares())
    write_csv(folder.path / "progress.csv", report.progress())
    figure_png(report, folder.figure, report.cost)
    write_html(report, folder.report)
    return report
