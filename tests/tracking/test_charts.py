"""Which chart a number is in: few at the top, whatever the configuration, each with a meaning."""

import re

import pytest

from gtc_dist.evaluation.metrics import flat_metrics
from gtc_dist.tracking.charts import FRONT, PAGE, chart_tag, meaning, quality_metrics

LIST = {f"{name}@{k}": 0.0 for name in ("recall", "ndcg", "precision", "hitrate", "mrr") for k in (5, 10, 20, 50)}
GROUPS = dict.fromkeys(("head_free", "cold", "mean_list"), LIST) | {"personal_gain": {"recall@20": 0.0}}
METRICS = flat_metrics({"overall": LIST, **GROUPS, "strata": {"tail": LIST}, "coverage@20": 0.0, "head_share@20": 0.0})
# of the default network on a GPU, with all losses and parts: more than any run has
LOSSES = ["total", "bpr", "masked", "tc", "diffusion", "l2"]
OTHERS = ["blend/members", "cold/lift", "gate/id", "kept_energy/visual", "total_correlation/bound_nats", "norms/user"]
OTHERS += ["seconds_per_step/data", "seconds_per_step/forward", "seconds_per_step/sampling", "lr/dense"]
OTHERS += ["seconds_per_step/communication", "total_correlation/temperature"]
NAMES = [f"loss/{name}" for name in LOSSES] + [f"valid/{name}" for name in METRICS] + OTHERS
NAMES += [name for name in FRONT if not name.startswith("loss/")]


@pytest.mark.parametrize("decisive", ["recall@20", "head_free/ndcg@20", "cold/recall@20", "coverage@20"])
def test_at_most_twelve_charts_come_before_the_details(decisive):
    tags = [chart_tag(name, quality_metrics(decisive)) for name in NAMES]
    front = [tag for tag in sorted(tags) if not tag.startswith("details_")]
    assert len(set(tags)) == len(tags)
    assert len(front) == 12
    assert sorted(tags)[: len(front)] == front
    assert [*dict.fromkeys(tag.split("/")[0] for tag in front)] == ["1_quality", "2_loss", "3_speed", "4_health"]
    assert f"1_quality/{decisive}" in front


def test_every_number_has_a_meaning():
    for name in NAMES:
        assert "docs/concepts.md" not in meaning(name), name
    assert "valid" in meaning("valid/ndcg@5")
    assert "test" in meaning("valid/ndcg@5", "test")
    assert "names" in meaning("no such number")


def test_every_chart_of_the_page_has_a_curve():
    tags = [chart_tag(name, quality_metrics("recall@20")) for name in NAMES]
    for charts in PAGE.values():
        for title, pattern in charts:
            assert any(re.fullmatch(pattern, tag) for tag in tags), title
