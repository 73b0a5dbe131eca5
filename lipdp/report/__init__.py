"""A report of training runs for somebody who did not train: `lipdp report RUN...`.

    report = gather(["RUN"])
    page = render(report, "html")

`reading` reads a run's folder, `statement` says what its guarantee means and what is wrong with it, `parameters`,
`evaluation` and `comparison` add figures, `figures` draws, `pages` puts it on a page. Needs the extra "report" (Jinja2).
"""

from lipdp.report.document import FORMATS, Report, RunReport, gather, render

__all__ = ["FORMATS", "Report", "RunReport", "gather", "render"]
