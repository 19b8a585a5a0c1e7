"""Configurations that are refused with the key, the line or the value in the message; nothing is written."""

import pytest

from gtc_dist.config_file import load_config
from gtc_dist.errors import InputError
from gtc_dist.prepare import build_catalog

MINIMAL = "data: {raw: r, catalog: c}\nrun: {storage: s, name: n}\n"
CONFIGS = {  # text, overrides, part of the message
    "a key twice": (MINIMAL + "train: {lr: 1, lr: 2}\n", [], ":3: key 'lr' is given twice"),
    "a section twice": (MINIMAL + "data: {raw: x}\n", [], ":3: key 'data' is given twice"),
    "a merge key twice": (MINIMAL + "train: {<<: {lr: 1}, <<: {lr: 2}}\n", [], ":3: key '<<' is given twice"),
    "a merge of a number": (MINIMAL + "train: {<<: 5}\n", [], "expected a mapping or list of mappings for merging"),
    "an alias without an anchor": (MINIMAL + "train: *t\n", [], "found undefined alias 't'"),
    "a section that holds itself": (MINIMAL + "dataset: &d {a: *d}\n", [], ":3: this value holds itself by an alias"),
    "a list that holds itself": (MINIMAL + "model: {fanout: &f [*f]}\n", [], ":3: this value holds itself by an alias"),
    "a tab": ("data:\n\traw: r\n", [], "cannot start any token"),
    "a list at the top": ("- data\n- run\n", [], "holds a list; expected sections such as data: and run:"),
    "a word at the top": ("data\n", [], "holds a str; expected sections"),
    "nothing": ("", [], "key 'data' is missing"),
    "two documents": (MINIMAL + "---\n" + MINIMAL, [], "expected a single document"),
    "an open bracket": ("data: {raw: [r\n", [], "is not valid YAML"),
    "a list as a key": (MINIMAL + "? [a]\n: 1\n", [], ":3: a key must be a plain word, found a list"),
    "a date as a key": (MINIMAL + "dataset: {2024-01-01: 1}\n", [], ":3: a key must be a plain word, found a date"),
    "a number as a key": (MINIMAL + "7: 1\n", [], "key '7': Keys should be strings; found 7"),
    "a date that is none": (MINIMAL, ["run.name=2024-02-30"], "'2024-02-30' is no timestamp (day is out of range"),
    "a date as a name": (MINIMAL, ["run.name=2024-02-03"], "key 'run.name': Input should be a valid string"),
    "a tag that does not fit": (MINIMAL + "train: {lr: !!int abc}\n", [], ":3: 'abc' is no int"),
    "a tag that runs code": (MINIMAL + "x: !!python/object/apply:os.system [ls]\n", [], "is not valid YAML"),
    "a number of 5000 digits": (MINIMAL + f"train: {{seed: {'9' * 5000}}}\n", [], ":3: '9999"),
    "half of a surrogate pair": (MINIMAL.replace(": r", ': "\\ud800"'), [], ":1: '\\ud800' is no str"),
    "5000 lists in each other": (MINIMAL + "x: " + "[" * 5000 + "]" * 5000, [], "lie too deep in each other"),
    "a NUL byte": (MINIMAL + "x: a\0b\n", [], "special characters are not allowed"),
    "latin-1": (b"# \xe9\n" + MINIMAL.encode(), [], "is not UTF-8 text"),
    "utf-16": (MINIMAL.encode("utf-16"), [], "is not UTF-8 text"),
    "an unknown section": (MINIMAL + "modle: {width: 3}\n", [], "unknown key 'modle'; did you mean 'model'?"),
    "an unknown key": (MINIMAL, ["train.batchsize=3"], "unknown key 'train.batchsize'; did you mean 'batch_size'?"),
    "a section without a value": (MINIMAL + "train:\n", [], "key 'train': Input should be a valid dictionary"),
    "a section that is a list": (MINIMAL + "train: [1]\n", [], "key 'train': Input should be a valid dictionary"),
    "files that are one word": (MINIMAL, ["data.interactions.files=a.csv"], "files': Input should be a valid list"),
    "features that are a list": (
        MINIMAL,
        ["data.features=[v.npy]"],
        "'data.features': Input should be a valid dictionary",
    ),
    "a modality that is a word": (MINIMAL, ["data.features.v=v.npy"], "key 'data.features.v': Input should be"),
    "a folder without a name": (MINIMAL, ["data.catalog="], "key 'data.catalog': String should have at least 1"),
    "words in place of a number": (
        MINIMAL,
        ["train.epochs=many"],
        "key 'train.epochs': Input should be a valid integer",
    ),
    "a fraction in place of a count": (MINIMAL, ["train.epochs=1.5"], "key 'train.epochs': Input should be"),
    "a negative weight": (MINIMAL, ["train.w_tc=-1"], "key 'train.w_tc': Input should be greater than or equal to 0"),
    "a negative k-core": (MINIMAL, ["data.interactions.k_core=-2"], "k_core': Input should be greater"),
    "NaN": (MINIMAL, ["train.lr=.nan"], "key 'train.lr': Input should be a finite number; found nan"),
    "an endless number": (MINIMAL, ["train.lr=1e999"], "key 'train.lr': Input should be a finite number"),
    "more memory than there is": (
        MINIMAL,
        ["prepare.memory_gib=1e308"],
        "key 'prepare.memory_gib': Input should be less",
    ),
    "fanout against layers": (
        MINIMAL,
        ["model.propagation=sampled", "model.fanout=[5]"],
        "model: fanout [5] names 1 layers, model.layers is 2",
    ),
    "start_step against steps": (MINIMAL, ["model.diffusion.steps=50"], "start_step 100 is beyond steps 50"),
    "shares that leave no train": (MINIMAL, ["data.split.valid_share=0.95"], "leaves nothing to train on"),
    "a half-life of nothing": (MINIMAL, ["data.recency_half_life=0"], "recency_half_life': Input should be greater"),
    "a half-life without times": (
        MINIMAL,
        ["data.recency_half_life=30", "data.split.method=given"],
        "recency_half_life needs the name of the time column in data.interactions.time",
    ),
    "a modality called like the id embedding": (
        MINIMAL,
        ["data.features.id.path=x.npy"],
        "data.features: 'id' is a name that checkpoints use; call the modality something else",
    ),
    "a modality called like a weight": (
        MINIMAL,
        ["data.features.walked.path=x.npy"],
        "data.features: 'walked' is a name that checkpoints use",
    ),
    "an override without =": (MINIMAL, ["train.epochs"], "override 'train.epochs' is not of the form a.b=c"),
    "an override without a key": (MINIMAL, ["=3"], "override '=3' is not of the form a.b=c"),
    "an override of broken YAML": (MINIMAL, ["model.fanout=[1"], "override model.fanout is not valid YAML"),
    "an override with a key twice": (MINIMAL, ["train={lr: 1, lr: 2}"], "override train:1: key 'lr' is given twice"),
    "an override with a NUL byte": (MINIMAL, ["run.name=a\0"], "override run.name is not valid YAML"),
    "an override of an element": (MINIMAL, ["data.interactions.files.0=x"], "files': Input should be a valid list"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_refused_configurations(tmp_path, name):
    text, overrides, says = CONFIGS[name]
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (lambda: load_config(path, overrides), lambda: build_catalog.main(["--config", str(path), *overrides])):
        with pytest.raises(InputError) as caught:
            read()
        assert says in str(caught.value)
        assert str(path) in str(caught.value) or "override" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_a_folder_as_configuration(tmp_path):
    with pytest.raises(InputError, match=f"config file {tmp_path} is a folder; name a YAML file"):
        load_config(tmp_path)


def test_anchors_and_merge_keys_work(tmp_path):
    """A merged key may be given again, even if the merged section has merged keys itself."""
    (tmp_path / "c.yaml").write_text(
        "data: {raw: &r x, catalog: *r, features: {a: &a {path: p, pca: 3}, b: &b {<<: *a, pca: 4}, "
        "c: {<<: *b, path: q}}}\nrun: {storage: s, name: n}\n"
    )
    data = load_config(tmp_path / "c.yaml").data
    assert (data.raw, data.catalog) == ("x", "x")
    assert {name: (m.path, m.pca) for name, m in data.features.items()} == {"a": ("p", 3), "b": ("p", 4), "c": ("q", 4)}
