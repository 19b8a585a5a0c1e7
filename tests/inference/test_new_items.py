"""New items get the embedding of a cold item of the catalog with the same content."""

import re
import shutil

import cold_items
import numpy as np
import pyarrow as pa
import pytest
from small import small_catalog, write_config
from trainings import read_export, train_without_ray

from gtc_dist import export
from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.config_data import ModalityConfig
from gtc_dist.data import formats, storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.data.feature_transform import FeatureTransform
from gtc_dist.errors import InputError
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.cold_start import CONTENT_WEIGHT, NEIGHBOURS, NORM_SCALE, OFFSET, REGRESSION
from gtc_dist.inference.new_items import embed_new_items, place_of, read_new_items
from gtc_dist.inference.trained_run import load_run

HYBRID = ["model.hybrid.graph_filter=3", "model.hybrid.content_profile=4"]


@pytest.fixture(scope="module", params=[[], HYBRID])
def run(tmp_path_factory, request) -> tuple[str, Catalog]:
    """The folder of a finished run, without Ray."""
    folder = tmp_path_factory.mktemp("run")
    catalog = small_catalog(folder / "catalog", cold=6)
    config = write_config(folder, catalog.uri, str(folder / "runs"), epochs=1)
    return train_without_ray(config, *request.param), catalog


def write_items(uri: str, ids: list, content: dict[str, np.ndarray]) -> str:
    columns = {name: pa.array(list(rows), pa.list_(pa.float64())) for name, rows in content.items()}
    formats.write_table(uri, pa.table({"id": pa.array(ids), **columns}))
    return uri


def raw(catalog: Catalog, item: int) -> dict[str, np.ndarray]:
    """The raw vectors that an item's features come from."""
    transforms = {name: FeatureTransform.load(catalog.uri, name) for name in catalog.modalities()}
    return {name: catalog.features(name, item, item + 1) * t.scale + t.mean for name, t in transforms.items()}


def features(catalog: Catalog) -> dict[str, np.ndarray]:
    """Of all items, as the catalog has them."""
    return {name: catalog.features(name) for name in catalog.modalities()}


def test_new_items_are_exported_after_those_of_the_catalog(run, tmp_path, capsys):
    uri, catalog = run
    cold = np.flatnonzero(Graphs.load(catalog).item_degree == 0)
    content = {name: np.concatenate([raw(catalog, i)[name] for i in cold]) for name in catalog.modalities()}
    new_ids = [9000 + int(i) for i in cold]
    file = write_items(str(tmp_path / "new.parquet"), new_ids, content)
    export.main(["--run", uri, "--out", str(tmp_path / "e"), "--new-items", file, "--faiss"])
    assert f"(and {len(cold)} new ones)" in capsys.readouterr().out
    ids, rows = read_export(str(tmp_path / "e"), "items")
    assert ids[catalog.items :] == new_ids
    manifest = storage.read_json(str(tmp_path / "e/manifest.json"))
    assert manifest["new_items"] == len(cold)
    assert manifest["files"]["items.faiss"]["rows"] == len(ids)
    opened = load_run(find_run(uri))
    want = embed_new_items(opened, opened.final_embeddings()[1], {n: x[cold] for n, x in features(catalog).items()})
    np.testing.assert_allclose(rows[catalog.items :], want, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("form", [0.0, 1.0])
def test_a_new_item_equals_a_cold_item_with_its_content(run, form):
    """By regression exactly; by neighbours it has the mean of the nearest warm items, and its own profile."""
    uri, catalog = run
    opened = load_run(find_run(uri))
    weights = {REGRESSION: form, NEIGHBOURS: 1 - form, CONTENT_WEIGHT: 2.0, NORM_SCALE: 1.21, OFFSET: 0.3}
    opened.scorer.cold_start.weights |= weights
    items = opened.final_embeddings()[1]
    warm = Graphs.load(catalog).item_degree > 0
    cold = np.flatnonzero(~warm)
    rows = embed_new_items(opened, items, {n: x[cold] for n, x in features(catalog).items()}).numpy()
    in_catalog, all_rows = items.weight[cold].numpy(), items.weight.numpy()
    own, special = np.zeros(rows.shape[1], bool), opened.scorer.special_columns(items.width)
    constant = special.constant
    for columns in special.profiles.values():
        own[columns] = True
    assert own.any() == (opened.scorer.fusion is not None)
    np.testing.assert_allclose(rows[:, own], in_catalog[:, own], rtol=1e-2, atol=1e-3)
    if form:
        np.testing.assert_allclose(rows, in_catalog, rtol=1e-2, atol=1e-3)
        return
    units = [x.astype(np.float64) for x in features(catalog).values()]
    similarity = sum(x @ x.T for x in (u / np.linalg.norm(u, axis=1, keepdims=True) for u in units)) / len(units)
    for n, item in enumerate(cold):
        order = np.argsort(-np.where(warm, similarity[item], -np.inf))[:10]
        share = np.maximum(similarity[item, order], 0)
        want = 1.21 * (share / share.sum()) @ all_rows[order]
        if constant is not None:
            want[constant] += 0.3
        np.testing.assert_allclose(rows[n, ~own], want[~own], rtol=1e-2, atol=1e-3)


M0, M1 = (pa.array([[1.0] * width, None]) for width in (6, 7))  # the second item has no vector


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["m1"]), "per modality (m0, m1), or m0=FOLDER m1=FOLDER; "),
        (lambda t: t.drop_columns(["m1"]), "has no column 'm1'; columns found: id, m0"),
        (lambda t: t.set_column(0, "id", pa.array(["x", "y"])), "column 'id': the items of"),
        (lambda t: t.set_column(0, "id", pa.array(["5", "0002554789"])), "'0002554789' (row 2) would become 2554789"),
        (lambda t: t.set_column(0, "id", pa.array([" 5", "6"])), "have int64 ids, not string: "),
        (lambda t: t.set_column(0, "id", pa.array([5.0, 6.5])), "have int64 ids, not double: "),
        (lambda t: t.set_column(0, "id", pa.array([1, None])), "column 'id' has 1 nulls"),
        (lambda t: t.set_column(0, "id", pa.array([5, 5])), "column 'id' has an id twice"),
        (lambda t: t.set_column(0, "id", pa.array([5, 107])), "the catalog has item 107 already"),
        (lambda t: t.set_column(1, "m0", pa.array([[1.0], [2.0]])), "'m0' has a vector of length 1"),
        (lambda t: t.set_column(0, "id", pa.array([[1], [2]])), "have int64 ids, not list<"),
        (
            lambda t: t.set_column(1, "m0", M0).set_column(2, "m1", M1),
            "item 2 in row 2 has no vector of any modality",
        ),
        (lambda t: t.set_column(1, "m0", pa.array([[1.0] * 6, [float("nan")] * 6])), "'m0', row 2: the vector has"),
        (lambda t: t.set_column(1, "m0", pa.array([1.0, 2.0])), "column 'm0' is double; it must hold vectors"),
    ],
)
def test_bad_files_are_refused_and_nothing_is_written(run, tmp_path, change, message):
    uri, catalog = run
    file = write_items(
        str(tmp_path / "a.parquet"), [1, 2], {n: np.ones((2, w)) for n, w in catalog.modalities().items()}
    )
    formats.write_table(file, change(formats.read_table(file)))
    with pytest.raises(InputError, match=r"a\.parquet") as error:
        export.main(["--run", uri, "--out", str(tmp_path / "e"), "--new-items", file])
    assert message in str(error.value)
    assert not storage.listing(str(tmp_path / "e"))


@pytest.mark.parametrize("content", [b"id,m0", None])
def test_the_file_must_be_parquet(run, tmp_path, content):
    file = str(tmp_path / "a.csv")
    if content:
        storage.write_bytes(file, content)
    problem = "is not a readable Parquet file" if content else "does not exist"
    message = rf"--new-items needs a Parquet file .* \(m0, m1\), or m0=FOLDER m1=FOLDER; .*a\.csv {problem}"
    with pytest.raises(InputError, match=message):
        export.main(["--run", run[0], "--out", str(tmp_path / "e"), "--new-items", file])


def test_a_new_item_may_lack_a_modality(run, tmp_path):
    """Its features are zeros, as those of the catalog's items without it are."""
    uri, catalog = run
    opened = load_run(find_run(uri))
    file = write_items(
        str(tmp_path / "a.parquet"), [1, 2], {n: np.ones((2, w)) for n, w in catalog.modalities().items()}
    )
    whole = read_new_items(catalog, catalog.modalities(), [file]).features
    table = formats.read_table(file)
    formats.write_table(file, table.set_column(1, "m0", pa.array([None, [1.0] * 6])))
    found = read_new_items(catalog, catalog.modalities(), [file]).features
    assert not found["m0"][0].any()
    np.testing.assert_array_equal(found["m0"][1], whole["m0"][1])
    np.testing.assert_array_equal(found["m1"], whole["m1"])
    rows = embed_new_items(opened, opened.final_embeddings()[1], found)
    assert rows.isfinite().all()


@pytest.mark.parametrize("fixed", [True, False])  # lists of a fixed size, as `gtc features` writes, or of any
def test_new_items_of_a_folder_for_each_modality(run, tmp_path, capsys, fixed):
    """In several files; an item may be in one folder alone."""
    uri, catalog = run
    rng = np.random.default_rng(0)
    of = {"m0": [3, 1, 2], "m1": [2, 4, 1]}
    rows = {name: {i: rng.normal(size=width) for i in of[name]} for name, width in catalog.modalities().items()}
    for name, items in of.items():
        for n, some in enumerate((items[:2], items[2:])):
            width = catalog.modalities()[name] if fixed else -1
            vectors = pa.array([rows[name][i] for i in some], pa.list_(pa.float64(), width))
            formats.write_table(
                f"{tmp_path}/{name}/part-{n}.parquet", pa.table({"item_id": pa.array(some), "vector": vectors})
            )
    columns = {name: pa.array([rows[name].get(i) for i in (3, 1, 2, 4)], pa.list_(pa.float64())) for name in of}
    file = f"{tmp_path}/one.parquet"
    formats.write_table(file, pa.table({"id": [3, 1, 2, 4], **columns}))
    words = [f"m0={tmp_path}/m0", f"m1={tmp_path}/m1/*.parquet"]
    for out, sources in (("a", [file]), ("b", words)):
        export.main(["--run", uri, "--out", str(tmp_path / out), "--new-items", *sources])
    one, two = (read_export(str(tmp_path / out), "items") for out in ("a", "b"))
    shutil.copytree(tmp_path / "m0", tmp_path / "half")
    (tmp_path / "half/_encoding.json").write_text("{}")
    assert two[0] == one[0]
    assert two[0][catalog.items :] == [3, 1, 2, 4]
    np.testing.assert_array_equal(two[1], one[1])

    for sources, message in (
        (words[:1], "--new-items gives no m1; the run needs m0, m1"),
        ([*words, "smell=x"], "or m0=FOLDER m1=FOLDER; not m0="),
        ([words[0], f"m1={tmp_path}/none"], "none does not exist"),
        ([words[0], f"m1={file}"], "needs the columns `item_id` and `vector`"),
        ([f"m0={tmp_path}/half", words[1]], "half is not complete: gtc features is writing it, or was interrupted"),
    ):
        capsys.readouterr()
        with pytest.raises(InputError, match=re.escape(message)):
            export.main(["--run", uri, "--out", str(tmp_path / "e"), "--new-items", *sources])
        assert "computing embeddings" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("new/text", "new/text"),
        ("text=new/text", "new/text"),
        ("s3://b/day=3/new.parquet", "s3://b/day=3/new.parquet"),
        ("text=s3://b/day=3", "s3://b/day=3"),
    ],
)
def test_the_place_of_new_items(source, place):
    assert place_of(source) == place


def test_modalities_without_weight_give_no_nearest_items(run):
    uri, catalog = run
    opened = load_run(find_run(uri))
    opened.scorer.cold_start.weights |= {REGRESSION: 0.0, NEIGHBOURS: 1.0}
    weightless = {name: ModalityConfig(path="x.npy", weight=0) for name in catalog.modalities()}
    data = opened.config.data.model_copy(update={"features": weightless})
    opened.config = opened.config.model_copy(update={"data": data})
    content = {name: rows[:2] for name, rows in features(catalog).items()}
    with pytest.raises(InputError, match=r"runs/.*config\.yaml gives m0, m1 weight 0, so new items have no nearest"):
        embed_new_items(opened, opened.final_embeddings()[1], content)


def test_cold_items_tool_compares_with_content_alone(run, capsys):
    uri, catalog = run
    cold_items.main(["--run", uri, "--threads", "1"])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    table = {name: cells for name, *cells in lines}
    want = load_run(find_run(uri)).evaluate("test", None)["cold"]["recall@20"]
    assert table["**as tuned**"][0].startswith(f"{want:.4f} (")
    most = [cells for name, cells in table.items() if name.startswith("scores of cold items")][-1]
    assert float(table["without cold items"][3]) <= float(most[3])

    users, items = catalog.interactions("train")
    unit = features(catalog)["m0"].astype(np.float64)
    unit -= unit.mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    score = np.zeros((catalog.users, catalog.items))
    np.add.at(score, users, unit[items] @ unit.T)
    score[users, items] = -np.inf
    warm = Graphs.load(catalog).item_degree > 0
    found: dict[int, list[bool]] = {}
    for user, item in zip(*catalog.interactions("test"), strict=True):
        if not warm[item] and user in users:
            found.setdefault(user, []).append(item in np.argsort(-score[user])[:20])
    assert found
    mean = np.mean([np.mean(hits) for hits in found.values()])
    assert table["content, m0"][0] == f"{mean:.4f} ({len(found)} users)"


def test_cold_items_tool_ranks_cold_items_alone(tmp_path, capsys):
    catalog = small_catalog(tmp_path / "catalog", items=80, cold=30)
    uri = train_without_ray(write_config(tmp_path, catalog.uri, str(tmp_path / "runs"), epochs=1))
    cold_items.main(["--run", uri, "--threads", "1"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| **as tuned** |"))
    users, items = (rows.weight.numpy() for rows in load_run(find_run(uri)).final_embeddings())
    cold, hits = np.flatnonzero(Graphs.load(catalog).item_degree == 0), {}
    for user, item in zip(*catalog.interactions("test"), strict=True):
        if item in cold and user in catalog.interactions("train")[0]:
            hits.setdefault(user, []).append(item in cold[np.argsort(-items[cold] @ users[user])[:20]])
    assert len(hits) > 5
    assert line.split("|")[3].strip() == f"{np.mean([np.mean(one) for one in hits.values()]):.4f}"


def test_cold_items_tool_compares_with_nearest_items(run, capsys):
    uri, catalog = run
    cold_items.main(["--run", uri, "--threads", "1"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| nearest |"))
    restored = load_run(find_run(uri))
    users, items = (rows.weight.numpy().copy() for rows in restored.fused_embeddings())
    hop, warm = restored.graphs.item_item, restored.graphs.item_degree > 0
    for item in np.flatnonzero(~warm):
        near = hop.indices[hop.indptr[item] : hop.indptr[item + 1]]
        weight = hop.weight[hop.indptr[item] : hop.indptr[item + 1]] * warm[near]
        items[item] = weight @ items[near] / weight.sum()
    score = users @ items.T
    seen = catalog.interactions("train")
    score[seen] = -np.inf
    hits = {}
    for user, item in zip(*catalog.interactions("test"), strict=True):
        if not warm[item] and user in seen[0]:
            hits.setdefault(user, []).append(item in np.argsort(-score[user])[:20])
    assert hits
    assert f"{np.mean([np.mean(h) for h in hits.values()]):.4f} ({len(hits)} users)" in line
