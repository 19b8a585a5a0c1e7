"""Sections of the report on the parts of the model and on users' lists; HTML texts."""

from html import escape

from gtc_dist.report.model_facts import COMPARED, part_title
from gtc_dist.report.page import chart_grid, html_section, html_table, paragraph
from gtc_dist.report.run_data import RunData
from gtc_dist.report.svg_charts import bar_chart, line_chart

MOST_LINES = 6  # of a chart


def parts_section(run: RunData, facts: dict | None) -> str:
    """What each part and the content filter do, and for which users they matter most."""
    fitted = {part_title(name): points for name, points in run.by_epoch("blend/").items() if name != "length"}
    largest = sorted(fitted, key=lambda name: -max(abs(value) for _, value in fitted[name]))[:MOST_LINES]
    drawn = [line_chart({name: fitted[name] for name in largest}, "epoch", "weights in score fusion")]
    kept = run.by_epoch("kept_energy/")
    if run.config.train.w_diff > 0:
        drawn.append(line_chart(kept, "epoch", "share of the content's energy that the filter keeps"))
    if facts is not None and facts["parts"]:
        bars = [(part["name"], part["overlap"], f"{part['overlap']:.0%}") for part in facts["parts"]]
        drawn.append(bar_chart(f"Share of the final {COMPARED} that each part alone lists, too", bars, 1.0))
    return html_section("What the parts do", chart_grid(*drawn), _parts(facts), _filter(run, facts))


def _parts(facts: dict | None) -> str:
    if facts is None or not facts["parts"]:
        return ""
    head = ["part alone", "weight", "recall@20", "ndcg@20", f"of the final {COMPARED}"]
    head += _group_titles(facts)
    rows = [
        [part["name"], "–" if part["weight"] is None else f"{part['weight']:.2f}"]
        + [f"{part[name]:.4f}" for name in ("recall@20", "ndcg@20")]
        + [f"{share:.0%}" for share in (part["overlap"], *part["by_group"])]
        for part in facts["parts"]
    ]
    how = (
        f"Each part ranks alone, by its own scores, for {facts['users']:,} users of {facts['split']}; its first "
        f"{COMPARED} are compared with those of the final list. The last columns: users with few, some and many train "
        "interactions (numbers in brackets). Weights are those of the best epoch for a user of mean activity; one "
        "below 0 takes away from what the other parts add."
    )
    differ = f"Users whose final list differs most from that of: {facts['reference']}"
    return paragraph(how) + html_table(head, rows) + paragraph(differ) + _users(facts["most_different"])


def _filter(run: RunData, facts: dict | None) -> str:
    title = "<h3>The content filter</h3>"
    if run.config.train.w_diff == 0:
        return title + paragraph("This run has no content filter (train.w_diff is 0): content enters as it is.")
    if facts is None or facts["filter"] is None:
        return ""
    found, groups = facts["filter"], _group_titles(facts)
    rows = [[f"lists share of {COMPARED}", f"{found['overlap']:.0%}", *(f"{share:.0%}" for share in found["by_group"])]]
    said = (
        f"Without the filter, and with the same weights, {facts['split']} recall@20 is {found['recall@20']:.4f} and "
        f"ndcg@20 {found['ndcg@20']:.4f}. How much of the lists stays, for users with few, some and many train "
        "interactions:"
    )
    differ = paragraph("Users whose list the filter changes most:") + _users(facts["filter_most_different"])
    return title + paragraph(said) + html_table(("", "all users", *groups), rows) + differ


def _group_titles(facts: dict) -> list[str]:
    """Groups of users with their numbers of train interactions."""
    return [f"{name} ({low})" if low == high else f"{name} ({low}–{high})" for name, _, low, high in facts["groups"]]


def _users(users: list[dict]) -> str:
    rows = [[each["user"], f"{each['train']:,}", f"{each['overlap']:.0%}"] for each in users]
    return html_table(("user", "train interactions", f"in both first {COMPARED}"), rows)


def lists_section(facts: dict | None) -> str:
    """Lists of some users."""
    if facts is None or not facts["lists"]:
        return ""
    cards = []
    for entry in facts["lists"]:
        more = entry["train"] - len(entry["has"])
        rest = f"<li>and {more:,} more</li>" if more > 0 else ""
        has = "".join(f"<li>{_item(item)}</li>" for item in entry["has"]) + rest
        gets = "".join(f"<li>{_item(item)}</li>" for item in entry["gets"])
        cards.append(
            f"<figure><figcaption>user {escape(entry['user'])}, {entry['train']:,} train interactions</figcaption>"
            f"<h3>is recommended</h3><ol>{gets}</ol><h3>has</h3><ul>{has}</ul></figure>"
        )
    how = "Without what the user has in train, valid or test. More: gtc recommend --run RUN --user ID."
    return html_section("Lists of some users", paragraph(how), f'<div class="lists">{"".join(cards)}</div>')


def _item(item: dict) -> str:
    if item["title"] is None:
        return escape(item["id"])
    return f"{escape(item['title'])} <span class='soft'>{escape(item['id'])}</span>"
