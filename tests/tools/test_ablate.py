"""tools/ablate.py: missing runs are trained, and the table holds their metrics."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small import small_catalog, write_config

from gtc_dist.config_file import load_config
from gtc_dist.errors import InputError
from tools.ablate import VARIANTS, main, read_variants, summary

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_the_table_holds_the_metrics_of_the_runs_and_a_rerun_continues(tmp_path):
    catalog = small_catalog(tmp_path / "catalog")
    config = write_config(tmp_path, catalog.uri, str(tmp_path / "unused"), epochs=1)
    variants = tmp_path / "variants.yaml"
    variants.write_text(yaml.safe_dump({"full": [], "no-tc": ["train.w_tc=0"]}, sort_keys=False))
    words = ["--config", config, "--out", str(tmp_path / "out"), "--seeds", "0", "--variants", str(variants)]
    (tmp_path / "out/runs/no-tc-0/checkpoints").mkdir(parents=True)  # of a run that was killed

    def ablate() -> str:
        command = [sys.executable, "tools/ablate.py", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "2 runs, 0 of them finished" in ablate()
    table = json.loads((tmp_path / "out/ablation.json").read_text())
    for name in ("full", "no-tc"):
        run = json.loads((tmp_path / f"out/runs/{name}-0/metrics.json").read_text())
        assert table[name]["ndcg@5"]["mean"] == run["test"]["overall"]["ndcg@5"]
    assert table["full"]["against"]["recall@20"] == {"mean": 0, "se": 0}
    lines = (tmp_path / "out/ablation.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| full", "| no-tc"]
    assert len({line.count("|") for line in lines}) == 1

    before = (tmp_path / "out/runs/full-0/metrics.json").stat().st_mtime_ns
    assert "2 runs, 2 of them finished" in ablate()
    assert (tmp_path / "out/runs/full-0/metrics.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="full-0 was trained with another configuration"):
        main([*words, "train.epochs=2"])

    broken = {"breaks": ["train.lr=1e30", "train.table_lr=1e30"], "no-tc": ["train.w_tc=0"]}
    variants.write_text(yaml.safe_dump(broken, sort_keys=False))
    with pytest.raises(InputError, match="1 runs failed: breaks-0; rerun the same command"):
        main(words)
    assert "| no-tc |" in (tmp_path / "out/ablation.md").read_text()


def test_differences_are_over_the_seeds_of_both():
    def run(recall: float) -> dict:
        values = dict.fromkeys(("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@20"), recall)
        return {"test": {"overall": values, "cold": values}, "best_epoch": 3, "seconds": 2.0}

    row = summary({0: run(0.3), 1: run(0.5), 2: run(0.1)}, {0: run(0.2), 1: run(0.2)})
    assert row["recall@20"]["mean"] == pytest.approx(0.3)
    assert row["recall@20"]["sd"] == pytest.approx(0.2)
    assert row["against"]["recall@20"]["mean"] == pytest.approx(0.2)
    assert row["against"]["recall@20"]["se"] == pytest.approx(0.1)


def test_a_file_without_lists_of_overrides_is_refused(tmp_path):
    file = tmp_path / "v.yaml"
    with pytest.raises(InputError, match=r"v\.yaml of --variants does not exist"):
        read_variants(str(file))
    for text in ("a", "[a]", "{a: b}", "{a: [1]}"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"v\.yaml must be a mapping"):
            read_variants(str(file))


@pytest.mark.parametrize("name", read_variants(str(VARIANTS)))
def test_every_variant_is_a_configuration(name):
    """The command reads all of them before it trains the first."""
    config = load_config(str(ROOT / "configs/tiktok.yaml"), [*read_variants(name)[name], f"run.name={name}-0"])
    assert config.run.name == f"{name}-0"


def test_unknown_variants_are_refused():
    with pytest.raises(InputError, match=r"unknown variants \['no-such'\]"):
        read_variants("full,no-such")
    assert read_variants("full,no-tc") == {"full": [], "no-tc": ["train.w_tc=0"]}
