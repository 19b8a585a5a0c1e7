"""The page of tools/suite.py: its figures (suite.json), and the same as Markdown (suite.md).

Of each catalog:

- every metric of each variant, mean ± standard deviation over seeds;
- differences to the first variant in % of its value: per-user metrics are averaged over the seeds that both variants
  have, then compared by the paired bootstrap over users (gtc_dist/evaluation/bootstrap.py), so the interval does not
  cover the variance between seeds;
- references: other methods (configs/peers.yaml) and closed-form ones (tools/references.py), with the lead of the first
  variant in %.

Then the mean over catalogs of the difference in valid NDCG@20, and the mean rank by it: defaults are chosen by these.
"""

from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from gtc_dist.evaluation.bootstrap import paired_bootstrap
from gtc_dist.evaluation.metrics import flat_metrics

ON_BOTH = ("recall@20", "ndcg@5", "ndcg@20", "head_free/ndcg@20", "head_free/recall@20", "cold/recall@20")
METRICS = {"valid": ON_BOTH, "test": (*ON_BOTH, "mean_list/ndcg@20", "coverage@20", "head_share@20")}
COMPARED = {"overall": ("recall@20", "ndcg@20"), "head_free": ("ndcg@20",)}
CHOSEN_BY = "ndcg@20"  # on valid


class Result(NamedTuple):
    """metrics: content of metrics.json. users: "valid/overall/recall@20" -> float64 [users]."""

    metrics: dict
    users: dict[str, np.ndarray]


Variants = dict[str, dict[int, Result]]  # variant -> seed -> result; the first is compared with all others


def summarise(results: dict[str, Variants], peers: dict, references: dict[str, dict]) -> dict:
    """Content of suite.json.

    Args:
        results: catalog -> variants; seeds that are not finished are missing.
        peers: catalog -> method -> split -> metric -> value.
        references: catalog -> method -> {"choice": text, split: {metric: value}}.
    """
    catalogs = {}
    for catalog, variants in results.items():
        first, *others = variants
        compared = [name for name in others if variants[name].keys() & variants[first]]
        catalogs[catalog] = {
            "first": first,
            "variants": {name: variant_figures(runs) for name, runs in variants.items() if runs},
            "differences": {name: difference(variants[name], variants[first]) for name in compared},
            "peers": peers.get(catalog, {}),
            "references": references.get(catalog, {}),
        }
    return {"catalogs": catalogs, "over_catalogs": over_catalogs(catalogs)}


def variant_figures(runs: dict[int, Result]) -> dict:
    """Metrics of a variant: split -> metric -> {"mean", "sd"} over its seeds, and how long it took."""
    figures: dict = {
        "seeds": len(runs),
        "seconds": mean(run.metrics["seconds"] for run in runs.values()),
        "best_epochs": [run.metrics["best_epoch"] for run in runs.values()],
    }
    for split, metrics in METRICS.items():
        flat = [flat_metrics(run.metrics[split]) for run in runs.values()]
        values = {metric: [f[metric] for f in flat if metric in f] for metric in metrics}
        figures[split] = {
            metric: {"mean": mean(v), "sd": stdev(v) if len(v) > 1 else 0.0} for metric, v in values.items() if v
        }
    return figures


def difference(runs: dict[int, Result], first: dict[int, Result]) -> dict:
    """split -> metric -> difference to the first variant, its 95 % interval and standard error, in % of the first's
    value over the same seeds."""
    shared = sorted(runs.keys() & first.keys())
    out: dict = {"seeds": len(shared)}
    for split in METRICS:
        out[split] = {}
        for group, metrics in COMPARED.items():
            names = [f"{split}/{group}/{metric}" for metric in metrics]
            ours, theirs = (
                {name: np.mean([variant[seed].users[name] for seed in shared], axis=0) for name in names}
                for variant in (runs, first)
            )
            for name, row in paired_bootstrap(ours, theirs).items():
                base = theirs[name].mean() if len(theirs[name]) else 0.0
                label = name.removeprefix(f"{split}/").removeprefix("overall/")
                out[split][label] = {key: 100 * value / base if base else 0.0 for key, value in row.items()}
    return out


def over_catalogs(catalogs: dict[str, dict]) -> dict[str, dict]:
    """Variant -> mean over catalogs of the difference in valid NDCG@20 in %, and of the rank by it (1: the best), over
    the catalogs where the variant and the first one share a seed."""
    differences: dict[str, list[float]] = {}
    ranks: dict[str, list[float]] = {}
    for catalog in catalogs.values():
        compared = {name: row["valid"][CHOSEN_BY]["difference"] for name, row in catalog["differences"].items()}
        if catalog["first"] in catalog["variants"]:
            compared = {catalog["first"]: 0.0} | compared
        for (name, value), rank in zip(compared.items(), rankdata([-v for v in compared.values()]), strict=True):
            differences.setdefault(name, []).append(value)
            ranks.setdefault(name, []).append(float(rank))
    return {
        name: {"catalogs": len(values), "difference": mean(values), "rank": mean(ranks[name])}
        for name, values in differences.items()
    }


def page(summary: dict) -> str:
    """suite.md of the content of suite.json."""
    lines = ["# Suite"]
    for catalog, figures in summary["catalogs"].items():
        lines += ["", f"## {catalog}"]
        for title, rows in tables(figures).items():
            lines += ["", title, "", *rows]
    if summary["over_catalogs"]:
        lines += ["", "## Over catalogs", "", *over_catalogs_table(summary["over_catalogs"])]
    return "\n".join(lines) + "\n"


def tables(figures: dict) -> dict[str, list[str]]:
    """Title -> lines of each table of a catalog; none before a run is finished."""
    first, variants = figures["first"], figures["variants"]
    if not variants:
        return {}
    out = {f"{split}, mean ± standard deviation over seeds": variant_table(variants, split) for split in METRICS}
    if figures["differences"]:
        title = f"Difference to {first} in %, with its 95 % interval and standard error over users"
        out[title] = difference_table(figures["differences"])
    if rows := reference_rows(figures):
        out[f"References, and the lead of {first} in %"] = reference_table(rows, variants.get(first))
    return out


def variant_table(variants: dict[str, dict], split: str) -> list[str]:
    rows = []
    for name, figures in variants.items():
        cells = [figures[split].get(metric) for metric in METRICS[split]]
        shown = [f"{cell['mean']:.4f} ± {cell['sd']:.4f}" if cell else "-" for cell in cells]
        epochs = ", ".join(str(epoch) for epoch in figures["best_epochs"])
        rows.append([name, *shown, str(figures["seeds"]), f"{figures['seconds']:.0f}", epochs])
    return table(["variant", *METRICS[split], "seeds", "seconds", "best epochs"], rows)


def difference_table(differences: dict[str, dict]) -> list[str]:
    columns = [(split, metric) for split in METRICS for metric in next(iter(differences.values()))[split]]
    rows = []
    for name, figures in differences.items():
        cells = [figures[split][metric] for split, metric in columns]
        shown = [
            f"{c['difference']:+.2f} [{c['low']:+.2f}, {c['high']:+.2f}] ± {c['standard_error']:.2f}" for c in cells
        ]
        rows.append([name, *shown, str(figures["seeds"])])
    return table(["variant", *(" ".join(column) for column in columns), "seeds"], rows)


def reference_rows(figures: dict) -> dict[str, dict]:
    """Label -> split -> metric -> value, of other methods and of closed-form ones."""
    closed = {
        f"{method} ({row['choice']})" if row["choice"] else method: row for method, row in figures["references"].items()
    }
    return figures["peers"] | closed


def reference_table(rows: dict[str, dict], ours: dict | None) -> list[str]:
    """One row for each method. `ours`: figures of the first variant; None: no run of it is finished."""
    known = {(split, metric) for row in rows.values() for split in METRICS for metric in row.get(split, ())}
    columns = [(split, metric) for split, metrics in METRICS.items() for metric in metrics if (split, metric) in known]

    def cell(row: dict, split: str, metric: str) -> str:
        value = row.get(split, {}).get(metric)
        own = ours and metric in ON_BOTH and ours[split].get(metric)  # others have no better direction
        if value is None:
            return "-"
        return f"{value:.4f} ({100 * (own['mean'] / value - 1):+.1f})" if own and value else f"{value:.4f}"

    shown = [[label, *(cell(row, *column) for column in columns)] for label, row in rows.items()]
    return table(["method", *(" ".join(column) for column in columns)], shown)


def over_catalogs_table(variants: dict[str, dict]) -> list[str]:
    rows = [
        [name, f"{row['difference']:+.2f}", f"{row['rank']:.1f}", str(row["catalogs"])]
        for name, row in variants.items()
    ]
    return table(["variant", f"difference in valid {CHOSEN_BY}, %", "mean rank", "catalogs"], rows)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
