"""Configuration: defaults, overrides and errors that name the key."""

import re
from pathlib import Path

import pytest
import yaml

from gtc_dist import train
from gtc_dist.config_file import load_config, read_run_config
from gtc_dist.config_reference import keys, markdown, sections
from gtc_dist.errors import InputError
from gtc_dist.prepare import build_catalog

MINIMAL = "data: {raw: r, catalog: c}\nrun: {storage: s, name: n}\n"
ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ("tiktok.yaml", "lastfm.yaml", "beauty.yaml")  # trained with the defaults
OTHERS = ("variants.yaml", "peers.yaml")  # for tools/suite.py
SHIPPED = sorted(
    path
    for path in (ROOT / "configs").glob("**/*.yaml")
    if path.parent.name not in ("datasets", "tune") and path.name not in OTHERS
)


def write(tmp_path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_minimal_config_has_defaults(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    assert config.train.batch_size == 2048
    assert config.model.propagation == "full"
    assert config.cluster.workers == 1


def test_overrides_are_read_as_yaml(tmp_path):
    overrides = [
        "train.lr=1e-4",
        "model.fanout=[3,4]",
        "model.propagation=sampled",
        "cluster.threads=null",
        "run.name=x",
    ]
    config = load_config(write(tmp_path, MINIMAL), overrides)
    assert config.train.lr == 1e-4
    assert config.model.fanout == [3, 4]
    assert config.cluster.threads is None
    assert config.run.name == "x"


def test_an_override_can_make_a_section(tmp_path):
    config = load_config(write(tmp_path, MINIMAL), ["data.features.visual.path=v.npy", "data.features.visual.pca=8"])
    assert config.data.features["visual"].pca == 8


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_configs_are_valid_and_name_the_keys_that_tools_rely_on(path):
    text = path.read_text()
    config = load_config(path)
    assert config.data.features
    if path.name in BENCHMARKS:
        assert set(yaml.safe_load(text)) == {"data", "run"}
        return
    for key in ("raw:", "catalog:", "storage:", "name:", "workers:", "gpu:", "epochs:", "batch_size:", "seed:"):
        assert key in text, key
    assert "propagation:" in text


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (MINIMAL + "modle: {width: 3}\n", [], "unknown key 'modle'; did you mean 'model'"),
        (MINIMAL, ["model.widht=3"], "unknown key 'model.widht'; did you mean 'width'"),
        (MINIMAL, ["data.features.v.path=a", "data.features.v.wieght=1"], "did you mean 'weight'"),
        (MINIMAL, ["model.diffusion.step=3"], "did you mean 'steps'"),
        (MINIMAL, ["zzz=3"], "known keys here: data, run"),
        ("run: {storage: s, name: n}\n", [], "key 'data' is missing"),
        ("data: {raw: r}\nrun: {storage: s, name: n}\n", [], "key 'data.catalog' is missing"),
        (MINIMAL, ["train.batch_size=many"], "train.batch_size.*integer.*'many'"),
        (MINIMAL, ["train.batch_size=0"], "greater than 0"),
        (MINIMAL, ["train.lr=-1"], "greater than 0"),
        (MINIMAL, ["model.propagation=half"], "'full' or 'sampled'.*'half'"),
        (MINIMAL, ["model.propagation=sampled", "model.layers=3"], "names 2 layers, model.layers is 3"),
        (MINIMAL, ["model.fanout=[0,3]"], "neither positive nor -1"),
        (MINIMAL, ["model.diffusion.start_step=700"], "beyond steps 600"),
        (MINIMAL, ["data.split.labels=[a,b]"], "name three values"),
        (MINIMAL, ["model.walk.spectral=3"], "was renamed in 0.2.0; write model.hybrid.graph_filter"),
        (MINIMAL, ["train.average=0.5"], "'train.average' was renamed in 0.2.0; write train.ema_decay"),
        (MINIMAL, ["train.user_discount=0.5"], "'train.user_discount' was removed in 0.2.0; remove the line"),
        (MINIMAL, ["graph.item_neighbours=10"], "'graph.item_neighbours' was removed in 0.2.0; remove the line"),
        (MINIMAL, ["model.user_fanout=5"], "'model.user_fanout' was removed in 0.2.0; model.item_fanout serves both"),
        (MINIMAL, ["eval.head_items=4"], "'eval.head_items' was removed in 0.2.0; give --head-items to python -m"),
        (MINIMAL, ["model.gate=false"], "'model.gate' was replaced in 0.2.0; write model.variant: paper or gated"),
        (MINIMAL, ["model.diffusion.enabled=false"], "was replaced in 0.2.0; write train.w_diff: 0"),
        (MINIMAL + "dataset: {users: 3}\n", [], "'dataset' was removed in 0.2.0; give the generator's parameters to"),
        (MINIMAL, ["eval.metric=recall@7"], "recall@7"),
        (MINIMAL, ["model.modalities=[]"], "name each wanted one once"),
        (MINIMAL, ["model.modalities=[a,a]"], "name each wanted one once"),
        (MINIMAL, ["train.seed=-1"], "greater than or equal to 0"),
        (MINIMAL, ["train.lr=.inf"], "finite number"),
        (MINIMAL + "? [a, b]\n: 1\n", [], "c.yaml:3: a key must be a plain word, found a list"),
        (MINIMAL, ["run.name=a/b"], "use letters"),
        (MINIMAL, ["data.split.valid_share=0.6", "data.split.test_share=0.5"], "leaves nothing to train on"),
        (MINIMAL, ["data.split.test_share=0"], "valid_share and test_share must be above 0"),
        (MINIMAL, ["data.interactions.min_rating=3"], "name of the rating column"),
        (MINIMAL, ["cluster.workers=4", "train.batch_size=3"], "below cluster.workers 4"),
        (MINIMAL, ["cluster.workers=2", "cluster.min_workers=3"], "min_workers 3 is above workers 2"),
        (MINIMAL, ["train.epochs"], "not of the form a.b=c"),
        (MINIMAL + "data: {raw: a, catalog: b}\n", [], "c.yaml:3: key 'data' is given twice"),
        ("data: [1, 2\n", [], "not valid YAML"),
        ("- a\n- b\n", [], "holds a list"),
        ("", [], "key 'data' is missing"),
        (MINIMAL + "x: !!python/object/apply:os.system [ls]\n", [], "not valid YAML"),
    ],
)
def test_bad_configs_are_refused_with_the_key(tmp_path, text, overrides, message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        load_config(write(tmp_path, text), overrides)


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert "--replay" in shown
    assert "--config" in shown


def test_the_reference_names_every_key_and_the_page_is_current():
    """docs/configuration.md is generated: `make docs` writes it again."""
    named = [row for prefix, section in sections() for row in keys(section, prefix)]
    of_data = sum(key.startswith("data.") for key, *_ in named)
    assert of_data <= 37  # what people's files need
    assert len(named) - of_data <= 61
    assert all(description for _, _, _, description in named)
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown()


@pytest.mark.parametrize(
    ("main", "shown"),
    [
        (train.main, ("size and speed:", "train.batch_size=2048", "quality:", "resuming:", "run.name  (required)")),
        (build_catalog.main, ("your data:", 'data.interactions.user="user_id"', "data.features.NAME.path  (required)")),
    ],
)
def test_help_has_examples_and_keys_by_task(capsys, main, shown):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(words in text for words in ("examples:", "--config mine.yaml", "docs/configuration.md", *shown))
    assert len(text.splitlines()) < 80
    assert max(map(len, text.splitlines())) <= 120


# Switches of version 0.1 that differ from its defaults, and their keys and values in this version
OLD_RUNS = {
    "paper": ({}, {"model.variant": "paper", "train.w_tc": 0.4, "train.w_diff": 0.7}),
    "gated": (
        {
            "model.content": "gate",
            "model.unit_rows": False,
            "model.join": "sum",
            "model.gate": False,
            "model.correlation.of": "outputs",
            "model.correlation.critic": "additive",
            "model.diffusion.enabled": False,
            "model.walk.enabled": True,
            "model.walk.spectral": 3,
            "train.average": 0.5,
            "data.split.test_label": "held out",
        },
        {
            "model.variant": "gated",
            "train.w_diff": 0.0,
            "model.hybrid.graph_filter": 3,
            "train.ema_decay": 0.5,
            "data.split.labels": [0, 1, "held out"],
        },
    ),
    "paper, without total correlation": (
        {"model.correlation.enabled": False, "model.correlation.critic": "additive"},
        {"model.variant": "paper", "train.w_tc": 0.0},
    ),
    "without a filter, with a condition": (
        {"model.diffusion.enabled": False, "model.diffusion.condition": "user"},
        {"train.w_diff": 0.0, "model.masked_members": 0},
    ),
    "full, with a fanout for users": ({"model.user_fanout": 7}, {"model.item_fanout": 5}),
    "sampled, with equal fanouts": (
        {"model.propagation": "sampled", "model.item_fanout": 7, "model.user_fanout": 7},
        {"model.propagation": "sampled", "model.item_fanout": 7},
    ),
    "sampled, untrained scorers by default": (
        {"model.propagation": "sampled", "model.walk.enabled": None},
        {"model.hybrid.graph_filter": 0, "model.hybrid.content_profile": 0},
    ),
    "full, untrained scorers by default": (
        {"model.walk.enabled": None, "model.walk.spectral": 3},
        {"model.hybrid.graph_filter": 3},
    ),
}


def old_run_config(changes: dict) -> bytes:
    """A config.yaml as version 0.1 wrote it: every key, those of `changes` with other values."""
    tree = yaml.safe_load((ROOT / "tests" / "stored" / "f099d64" / "paper" / "config.yaml").read_text())
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = tree
        for part in parents:
            node = node[part]
        node[last] = value
    return yaml.safe_dump(tree).encode()


@pytest.mark.parametrize("name", OLD_RUNS)
def test_a_run_config_of_version_0_1_is_upgraded(name):
    changes, wanted = OLD_RUNS[name]
    config = read_run_config(old_run_config(changes), "config.yaml")
    for key, value in wanted.items():
        node = config
        for part in key.split("."):
            node = getattr(node, part)
        assert node == value, key
    assert read_run_config(yaml.safe_dump(config.model_dump()).encode(), "config.yaml") == config


@pytest.mark.parametrize(("propagation", "enabled"), [("full", True), ("sampled", False)])
def test_a_run_of_0_5_keeps_the_untrained_scorers_it_had(propagation, enabled):
    tree = read_run_config(old_run_config({"model.walk.enabled": True, "model.walk.spectral": 3}), "").model_dump()
    tree["model"] |= {"propagation": propagation, "hybrid": tree["model"]["hybrid"] | {"enabled": None}}
    tree["model"]["diffusion"]["condition"] = "audience"
    hybrid = read_run_config(yaml.safe_dump(tree).encode(), "config.yaml").model.hybrid
    assert hybrid.graph_filter == (3 if enabled else 0)
    assert (hybrid.content_profile > 0) == enabled


def test_a_run_config_of_early_0_2_keeps_its_variant_and_labels():
    """Version 0.2 wrote keys at first that it removed before its release."""
    tree = read_run_config(old_run_config(OLD_RUNS["gated"][0]), "config.yaml").model_dump()
    early = {**tree, "graph": {"item_neighbours": 10}, "model": {**tree["model"], "user_fanout": 5}}
    early["eval"] = {**tree["eval"], "head_items": 9}
    early["model"] |= {"masked_width": 0}
    del early["model"]["masked_members"]
    config = read_run_config(yaml.safe_dump(early).encode(), "config.yaml")
    assert config.model_dump() == tree
    assert (config.model.variant, config.data.split.labels) == ("gated", [0, 1, "held out"])
    early["model"]["masked_width"] = 256
    with pytest.raises(
        InputError, match=r"masked_width 256, which was removed in 0.3.0; open the run with version 0.2"
    ):
        read_run_config(yaml.safe_dump(early).encode(), "config.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.gate": False}, "neither of model.variant paper or gated"),
        ({"train.negatives.popularity": 0.5}, "train.negatives.popularity 0.5, which was removed in 0.2.0"),
        ({"train.loss": "bpr+softmax"}, "trained with train.loss 'bpr"),
        ({"graph.item_neighbours": 5}, "trained with graph.item_neighbours 5, which was removed in 0.2.0"),
        (
            {"model.propagation": "sampled", "model.user_fanout": 7},
            "trained with model.user_fanout 7, which was removed in 0.2.0",
        ),
        ({"model.diffusion.condition": "user"}, "removed in 0.3.0; open the run with version 0.2"),
        ({"model.diffusion.condition": "item"}, "removed in 0.6.0; open the run with version 0.5"),
        ({"train.w_diff": 0.0}, "model.diffusion.enabled true together with a loss weight of 0"),
    ],
)
def test_a_run_of_version_0_1_with_a_lost_switch_is_refused(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read_run_config(old_run_config(changes), "config.yaml")


def test_missing_file_and_binary_file(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        load_config(tmp_path / "b.yaml")
