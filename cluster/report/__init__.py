"""``report.html``: a run on one self-contained page.

`page` puts it together; `sections` and `charts` say what is on it; `figures` and `phases` draw;
`series` thins and smooths; `text` formats and escapes; `style` holds the style sheet and script.
"""

from dist_dp.cluster.report.page import write_report

__all__ = ["write_report"]
