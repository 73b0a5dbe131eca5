"""A report of training runs for somebody who did not train: `lipdp report RUN...`.

    report = gather(["RUN"])
    page = render(report, "html")

`reading` reads a run's folder, `statement` says what its guarantee means and what is wrong with it, `parameters`,
`evaluation` and `comparison` add figures, `figures` draws, `pages` puts it on a page. Needs the extra "report" (msgspec
reads, Jinja2 writes). `tensorboard` writes the figures of a run while it goes on, and needs the extra of that name.
"""

from lipdp.lazy import facade

# public name → the module that defines it; imported on first use: msgspec, Jinja2 and tensorboard are extras
_NAMES = {
    "FORMATS": "lipdp.report.document",
    "Report": "lipdp.report.document",
    "RunReport": "lipdp.report.document",
    "gather": "lipdp.report.document",
    "render": "lipdp.report.document",
}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
