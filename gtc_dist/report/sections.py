"""Sections of the report on data, quality, curves, time and files: HTML, empty where a run lacks what they show."""

import time
from html import escape as _escaped

import yaml

from gtc_dist.config_upgrade import flatten_keys
from gtc_dist.evaluation.metrics import flat_metrics, metric_value
from gtc_dist.progress import duration
from gtc_dist.report.page import chart_grid, html_section, html_table, paragraph, side_by_side, tiles
from gtc_dist.report.run_data import Points, RunData
from gtc_dist.report.svg_charts import bar_chart, four_digits, line_chart

REPORTED_METRICS = ("recall@20", "ndcg@20", "recall@10", "ndcg@10", "recall@5", "ndcg@5")
NEGLIGIBLE = 1e-3  # of the time of a step; parts below it are not drawn
ITEM_GROUPS = {
    "overall": "all items",
    "strata/head": "popular: a third of train",
    "strata/middle": "middling: the second third",
    "strata/tail": "rare: the last third",
    "cold": "cold: not in train",
    "head_free": "without the four most frequent",
}


def overview(run: RunData, other: RunData | None) -> str:
    """The head of the page."""
    metric = run.config.eval.metric
    values = [("state", "not finished" if run.refreshed is None else "refreshed")]
    if run.result:
        best, last = run.result["best_epoch"], run.result["last_epoch"]
        test = metric_value(run.result["test"], metric)
        values = [(f"{metric} on test", f"{test:.4f}")]
        if metric in run.result["popularity"]:
            base = run.result["popularity"][metric]
            values.append(("times popularity", f"{test / base:.1f}" if base else "–"))
        values += [("best epoch", f"{best} of {last}"), ("time in all", duration(run.result["seconds"]))]
        values.append(("ranks", str(run.result["workers"])))
    elif run.epochs:
        values.append(("validations", str(len(run.epochs))))
    line = f"Report on the run {run.uri}" + (f", beside {other.uri}" if other else "") + "."
    head = f"<h1>{_escaped(run.name)}</h1>\n<p class='soft'>{_escaped(line)}</p>"
    left_out = "".join(f"<li>{_escaped(each)}</li>" for each in run.missing)
    return head + tiles(values) + (f"<ul class='soft'>{left_out}</ul>" if left_out else "")


def data_section(run: RunData) -> str:
    """What the run was trained on."""
    data, config = run.data, run.config
    if data is None:
        return html_section("What it was trained on", paragraph(f"The catalog was {config.data.catalog}."))
    rows = [("users", f"{data.users:,}"), ("items", f"{data.items:,}")]
    rows += [("items without a train interaction", f"{data.cold_items:,}")]
    rows += [(f"{split} interactions", f"{count:,}") for split, count in data.interactions.items()]
    total = data.interactions.get("train", 0)
    rows += [("train interactions of a user, mean", four_digits(total / max(data.users, 1)))]
    rows += [
        (f"content: {name}", f"{each.dim} values, {each.missing:,} items without")
        for name, each in data.modalities.items()
    ]
    rows += [(f"raw rows left out: {reason}", f"{count:,}") for reason, count in data.dropped.items() if count]
    splits = " and ".join(config.train_splits)
    how = f"The {splits} interactions of the catalog {config.data.catalog}, split by {config.data.split.method}."
    begun = (run.result or {}).get("init_from")
    start = f"The weights started from those of the run {begun['run']}." if begun else ""
    return html_section("What it was trained on", paragraph(how), paragraph(start), html_table(("", ""), rows))


def quality_section(run: RunData, other: RunData | None) -> str:
    """Metrics beside popularity, one list for everyone, and another run; strata and cold items."""
    if run.result is None:
        return ""
    rows = _metric_rows("", run)
    if other is not None and other.result is not None:
        rows += [_difference_row(run, other), *_metric_rows(f"{other.name}: ", other)[:2]]
    result, groups = run.result["test"], []
    flat, others = flat_metrics(result), flat_metrics(other.result["test"]) if other and other.result else {}
    for group, title in ITEM_GROUPS.items():
        prefix = "" if group == "overall" else f"{group}/"
        users = _users(result, group)
        if f"{prefix}recall@20" in flat and users:
            cells = [title, f"{users:,}", *(f"{flat[prefix + name]:.4f}" for name in ("recall@20", "ndcg@20"))]
            groups.append(
                [*cells, *(f"{others[prefix + name]:.4f}" for name in ("recall@20",) if prefix + name in others)]
            )
    head = ["positives that count", "users", "recall@20", "ndcg@20"] + (
        [f"recall@20 of {other.name}"] if others else []
    )
    bars = [(row[0], float(row[2]), row[2]) for row in groups]
    notes = "All items are ranked for each user of the split, without the user's train items. Higher is better."
    spread = ""
    if "coverage@20" in result:
        spread = (
            f"The first 20 of all users' lists hold {result['coverage@20']:.0%} of the items; the most popular "
            f"hundredth of the items takes {result['head_share@20']:.0%} of the places."
        )
    if "final_fit" in run.result:
        notes = (
            f"This run was trained on train and valid, to be deployed. The metrics are those of the run that selected, "
            f"{run.result['final_fit']['selection']}. {notes}"
        )
    hint = ""
    if other is not None and run.data and other.data and run.data.fingerprint != other.data.fingerprint:
        hint = f"{other.name} was trained on another catalog: its metrics are of other users and items."
    elif other is not None:
        hint = "Whether a difference is more than chance: gtc evaluate --run RUN --against OTHER gives its interval."
    strata = "<h3>By popularity of the item, test</h3>" if groups else ""
    return html_section(
        "Quality",
        paragraph(notes),
        html_table(("all items ranked", *REPORTED_METRICS), rows),
        paragraph(hint),
        strata,
        side_by_side(html_table(head, groups), bar_chart("Recall@20 on test, by which items count", bars)),
        paragraph(spread),
    )


def _metric_rows(prefix: str, run: RunData) -> list[list[str]]:
    parts = {"test": run.result["test"]["overall"], "valid": run.result["valid"]["overall"]}
    parts |= {"popularity, test": run.result["popularity"]}
    if "mean_list" in run.result["test"]:
        parts |= {"one list for everyone, test": run.result["test"]["mean_list"]}
    return [
        [prefix + name, *(f"{values[metric]:.4f}" for metric in REPORTED_METRICS)] for name, values in parts.items()
    ]


def _difference_row(run: RunData, other: RunData) -> list[str]:
    ours, theirs = (each.result["test"]["overall"] for each in (run, other))
    return [f"test, less {other.name}", *(f"{ours[metric] - theirs[metric]:+.4f}" for metric in REPORTED_METRICS)]


def _users(result: dict, group: str) -> int:
    """Users over whom a group's metrics are averaged."""
    if group.startswith("strata/"):
        return result.get("strata", {}).get(group.removeprefix("strata/"), {}).get("users", 0)
    return result.get("users" if group == "overall" else f"{group}_users", 0)


def curves_section(run: RunData, other: RunData | None) -> str:
    """Metrics of valid, losses, gradient norm."""
    metric, names = run.config.eval.metric, ["recall@20", "ndcg@20"]
    ours, drawn = run.valid_curves | run.by_epoch("valid/"), []
    theirs = {} if other is None else other.valid_curves | other.by_epoch("valid/")
    for name in dict.fromkeys([metric, *names]):
        lines = {run.name: ours.get(name, [])}
        if theirs.get(name):
            lines[f"{other.name} " if other.name == run.name else other.name] = theirs[name]
        dashed = []
        if run.result and name in run.result["valid"]["overall"] and ours.get(name):
            line = "popularity, test"
            span = ours[name][0][0], ours[name][-1][0]
            lines[line] = [(x, run.result["popularity"][name]) for x in dict.fromkeys(span)]
            dashed.append(line)
        drawn.append(line_chart(lines, "epoch", f"{name} on valid", dashed))
    losses = {name.removeprefix("loss/"): points for name, points in run.curves.items() if name.startswith("loss/")}
    steps = _step_curves({f"loss: {name}": {name: points} for name, points in losses.items() if name != "l2"})
    health = {"gradient norm": {"": run.curves.get("gradient_norm", [])}}
    return html_section("Curves", chart_grid(*drawn, *steps, *_step_curves(health)))


def _step_curves(named: dict[str, dict[str, Points]]) -> list[str]:
    return [
        line_chart({name or title: points for name, points in lines.items()}, "step", title)
        for title, lines in named.items()
    ]


def time_section(run: RunData) -> str:
    """Where the time went."""
    parts = {
        name.removeprefix("seconds_per_step/"): _mean(points)
        for name, points in run.curves.items()
        if name.startswith("seconds_per_step/")
    }
    beside = {"sampling", "features", "communication"}
    names = {"data": "waiting for a batch"}
    shown = {name: value for name, value in parts.items() if value > NEGLIGIBLE * sum(parts.values())}
    shown = {names.get(name, name): value for name, value in sorted(shown.items(), key=lambda pair: -pair[1])}
    bars, apart = (
        [(name, value, _seconds(value)) for name, value in shown.items() if (name in beside) == inside]
        for inside in (False, True)
    )
    whole = []
    if run.result:
        training = run.result["seconds_per_epoch"] * run.result["last_epoch"]
        rest = max(run.result["seconds"] - training, 0)
        whole = [
            ("steps of training", training, duration(training)),
            ("start, validation, final ranking", rest, duration(rest)),
        ]
    speed = {"interactions a second": {"interactions a second": run.curves.get("interactions_per_second", [])}}
    memory = _one_chart("memory, GiB", run, {"host": "memory/host_gib", "GPU": "memory/gpu_gib"})
    shares = _one_chart("share of the time", run, {"waiting for data": "waiting_for_data", "GPU busy": "gpu_busy"})
    return html_section(
        "Where the time went",
        chart_grid(
            bar_chart("The whole run", whole),
            bar_chart("A step, by part, mean", bars),
            bar_chart("Beside the step, or inside its parts", apart),
            *_step_curves(speed | memory | shares),
        ),
    )


def _one_chart(title: str, run: RunData, keys: dict[str, str]) -> dict[str, dict[str, Points]]:
    """Those curves that the run has, by what they show; a single one is named in the title, as it has no legend."""
    lines = {name: run.curves[key] for name, key in keys.items() if key in run.curves}
    return {f"{title}: {next(iter(lines))}" if len(lines) == 1 else title: lines}


def files_section(run: RunData) -> str:
    """Checkpoints and starts."""
    rows = []
    for each in run.checkpoints:
        holds = "weights, best epoch" if each.step is None else f"training state, step {each.step:,}"
        rows.append([each.name, holds if each.complete else "incomplete", _bytes(each.bytes)])
    starts = [[str(n), time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))] for n, at in enumerate(run.starts, 1)]
    said = ""
    if starts:
        again = len(starts) - 1
        said = f"The training was started once{f' and resumed {again} time(s)' if again else ', without a restart'}."
    skipped = (run.result or {}).get("skipped_steps") or 0
    left_out = f"{skipped} step(s) were left out, because their loss or gradient was not finite." if skipped else ""
    return html_section(
        "Checkpoints and restarts",
        paragraph(said),
        html_table(("start", "first log"), starts if len(starts) > 1 else []),
        paragraph(left_out),
        html_table(("checkpoint", "holds", "size"), rows),
    )


def config_section(run: RunData, other: RunData | None) -> str:
    """The configuration, and where it differs from another run's."""
    ours, differs = flatten_keys(run.config.model_dump()), ""
    if other is not None:
        theirs = flatten_keys(other.config.model_dump())
        keys = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
        rows = [[key, str(ours.get(key)), str(theirs.get(key))] for key in keys]
        differs = html_table(("key that differs", run.name, other.name), rows, left=True) or paragraph(
            "Both runs have one configuration."
        )
    whole = yaml.safe_dump(run.config.model_dump(), sort_keys=False)
    return html_section(
        "Configuration", differs, f"<details><summary>all keys</summary><pre>{_escaped(whole)}</pre></details>"
    )


def _mean(points: Points) -> float:
    return sum(value for _, value in points) / max(len(points), 1)


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _bytes(count: int) -> str:
    for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count} B"
