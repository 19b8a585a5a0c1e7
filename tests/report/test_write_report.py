"""The page on a run, by the command: what it says, what it leaves out, what it refuses."""

import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small import ROOT, refused, small_catalog, write_config
from torch.utils.tensorboard import SummaryWriter
from trainings import train_without_ray

from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.errors import InputError
from gtc_dist.report import write_report
from gtc_dist.report.model_sections import lists_section, parts_section
from gtc_dist.report.page import REPORT_MARKER
from gtc_dist.report.run_data import read_events, read_run
from gtc_dist.report.sections import data_section

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"q\""


class Page(HTMLParser):
    """Tags and text of a page; an element that is not closed in order fails."""

    VOID = ("meta", "img", "br")

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    config = write_config(folder, small_catalog(folder / "catalog").uri, str(folder / "runs"))
    for name in ("one", "two"):
        train_without_ray(config, f"run.name={name}", f"train.seed={len(name) + ord(name[0])}", "train.epochs=2")
    return folder


def report(*words: str) -> Page:
    write_report.main([str(word) for word in words])
    words = dict(zip(words[::2], words[1::2], strict=False))
    return Page(storage.read_bytes(str(words.get("--out", f"{words['--run']}/report.html"))).decode())


def test_the_page_says_what_the_run_says_and_needs_no_network(folder, capsys):
    page = report("--run", folder / "runs/one", "--against", folder / "runs/two")
    assert f"the report is in {folder}/runs/one/report.html" in capsys.readouterr().out
    ours, theirs = (storage.read_json(f"{folder}/runs/{name}/metrics.json") for name in ("one", "two"))
    for values in (ours["test"]["overall"], ours["valid"]["overall"], ours["popularity"], ours["test"]["mean_list"]):
        assert f"{values['ndcg@20']:.4f}" in page.words
    difference = ours["test"]["overall"]["recall@20"] - theirs["test"]["overall"]["recall@20"]
    assert f"{difference:+.4f}" in page.words
    assert f"{ours['test']['strata']['tail']['recall@20']:.4f}" in page.words
    titles = ["Quality", "Curves", "Lists of some users", "What the parts do", "The content filter"]
    titles += ["What it was trained on", "Where the time went", "Checkpoints and restarts", "Configuration"]
    assert [word for word in page.words if word in titles] == titles
    for said in (
        "loss: bpr",
        "gradient norm",
        "memory, GiB: host",
        "share of the time: waiting for data",
        "train.seed",
        "weights, best epoch",
        "interactions a second",
    ):
        assert said in page.words, said
    names = dict(page.attributes)
    assert not {"src", "href", "onload", "onclick", "xlink:href"} & set(names)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    html = storage.read_bytes(f"{folder}/runs/one/report.html").decode()
    assert "http" not in html.split("</style>")[0]
    assert "url(" not in html
    assert "prefers-color-scheme: dark" in html
    assert find_run(str(folder / "runs/one")).epoch == ours["best_epoch"]  # the page is no foreign file


def test_the_page_says_from_what_the_weights_started(folder):
    run = read_run(str(folder / "runs/one"))
    started = replace(run, result={**run.result, "init_from": {"run": "/runs/before"}})
    assert "started from those of the run /runs/before" in data_section(started)
    assert "started from" not in data_section(run)


def test_titles_and_ids_cannot_carry_html(folder, tmp_path):
    catalog = Catalog(str(folder / "catalog"))
    ids = catalog.ids("items").to_pylist()
    pq.write_table(pa.table({"item_id": ids, "title": [f"{EVIL} {item}" for item in ids]}), tmp_path / "titles.parquet")
    run = ["--run", folder / "runs/one", "--out", tmp_path / "r.html"]
    page = report(*run, "--titles", tmp_path / "titles.parquet", "--user", "u003")
    assert EVIL in page.text
    assert "user u003" in page.text
    assert not {"script", "img"} & set(page.tags)
    item = {"id": EVIL, "title": None, "score": 1.0}
    entry = {"user": EVIL, "train": 1, "has": [item], "gets": [item]}
    part = {"name": EVIL, "weight": None, "recall@20": 0.1, "ndcg@20": 0.1, "overlap": 0.5, "by_group": [0.5]}
    other = [{"user": EVIL, "train": 3, "overlap": 0.5}]
    facts = {
        "split": "valid",
        "users": 1,
        "groups": [[EVIL, 1, 1, 2]],
        "parts": [part],
        "filter": part,
        "reference": EVIL,
    }
    facts |= {"most_different": other, "filter_most_different": other, "lists": [entry]}
    data = read_run(str(folder / "runs/one"))
    data.epochs[0][f"blend/{EVIL}"] = 1.0
    page = Page(lists_section(facts) + parts_section(data, facts))
    assert page.text.count(EVIL) >= 6
    assert not {"script", "img"} & set(page.tags)


def test_a_run_without_catalog_or_end_says_what_is_left_out(folder, tmp_path):
    shutil.copytree(folder / "runs/one", tmp_path / "a/one")
    (tmp_path / "a/one/metrics.json").unlink()
    shutil.rmtree(tmp_path / "a/one/tensorboard")
    page = report("--run", tmp_path / "a/one", "--catalog", folder / "catalog", "--logs-only")
    assert "The training is not finished" in page.text
    assert "has no event files" in page.text
    assert "not finished" in page.words
    assert "Lists of some users" not in page.words
    config = Path(tmp_path / "a/one/config.yaml")
    config.write_text(config.read_text().replace(str(folder / "catalog"), str(tmp_path / "gone")))
    page = report("--run", tmp_path / "a/one", "--against", folder / "runs/two")
    assert "The catalog could not be read" in page.text
    assert "recall@20 on valid" in page.words


def test_another_catalog_leaves_out_what_the_model_says(folder, tmp_path):
    small_catalog(tmp_path / "other", seed=5)
    page = report("--run", folder / "runs/one", "--out", tmp_path / "r.html", "--catalog", tmp_path / "other")
    assert "or was rebuilt since" in page.text
    assert "Lists of some users" not in page.words


def test_a_run_of_version_0_1_has_a_page(tmp_path):
    shutil.copytree(ROOT / "tests/stored/f099d64", tmp_path / "s")
    config = tmp_path / "s/gated/config.yaml"
    config.write_text(config.read_text().replace("STORED", str(tmp_path / "s")))
    page = report("--run", tmp_path / "s/gated")
    test = storage.read_json(str(tmp_path / "s/gated/metrics.json"))["test"]
    assert f"{test['overall']['ndcg@20']:.4f}" in page.words
    assert {"neighbour smoothing", "Lists of some users", "The content filter"} <= set(page.words)


def test_curves_of_a_run_that_an_older_version_began_are_joined(tmp_path):
    for name, first in (("loss/bpr", 1), ("2_loss/bpr", 3)):
        with SummaryWriter(str(tmp_path), purge_step=first) as writer:
            for step in (first, first + 1):
                writer.add_scalar(name, step / 2, step)
    curves, starts = read_events(str(tmp_path))
    assert curves == {"loss/bpr": [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]}
    assert len(starts) == 2


def test_a_run_in_object_storage(folder, s3):
    for name in storage.listing(str(folder / "runs/one")):
        storage.write_bytes(f"{s3}/one/{name}", storage.read_bytes(f"{folder}/runs/one/{name}"))
    here = report("--run", folder / "runs/one")
    there = report("--run", f"{s3}/one", "--catalog", folder / "catalog")
    assert REPORT_MARKER in storage.read_bytes(f"{s3}/one/report.html").decode()
    numbers = [[word for word in page.words if word.replace(".", "").isdigit()] for page in (here, there)]
    assert numbers[0] == numbers[1]


def test_bad_input_is_refused_and_other_files_are_kept(folder, tmp_path):
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    run = str(folder / "runs/one")
    with pytest.raises(InputError, match="exists and is no report"):
        write_report.main(["--run", run, "--out", str(tmp_path / "mine.html")])
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    with pytest.raises(InputError, match="ids are no users"):
        write_report.main(["--run", run, "--out", str(tmp_path / "r.html"), "--user", "nobody"])
    assert not (tmp_path / "r.html").exists()
    refused(["-m", "gtc_dist.report", "--run", str(tmp_path)], "holds no run")
