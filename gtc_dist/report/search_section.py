"""Section of the report on the search over settings that a run belongs to."""

import posixpath

from gtc_dist.data import storage
from gtc_dist.report.page import html_section, html_table, paragraph
from gtc_dist.report.run_data import RunData
from gtc_dist.tune.search_settings import RESULTS_FILE

SHOWN_TRIALS = 30


def search_section(run: RunData) -> str:
    """All trials with their settings, best first; empty for a run that is no trial of a search that has ended."""
    folder, name = posixpath.split(run.uri.rstrip("/"))
    uri = storage.join(folder, RESULTS_FILE)
    if not storage.exists(uri):
        return ""
    found = storage.read_json(uri)
    trials = found["trials"]
    if name not in [trial["name"] for trial in trials]:
        return ""
    keys = list(trials[0]["settings"])
    rows = [
        (
            f"{trial['name']} (this run)" if trial["name"] == name else trial["name"],
            f"{trial['value']:.4f}",
            f"{trial['status']}, epoch {trial['reports'][-1]['epoch']}",
            *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in trial["settings"].values()),
        )
        for trial in trials[:SHOWN_TRIALS]
    ]
    count = f"the best {SHOWN_TRIALS} of {len(trials)}" if len(trials) > SHOWN_TRIALS else f"all {len(trials)}"
    text = (
        f"This run is a trial of the search {folder}. Its trials ({count}), by their best {found['metric']} on valid; "
        "a stopped one was worse than others after as many epochs."
    )
    head = ("trial", found["metric"], "state", *keys)
    return html_section("Search over settings", paragraph(text), html_table(head, rows))
