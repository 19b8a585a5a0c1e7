"""The generator: reproducible bytes, also as Ray tasks; refusals."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from planted_dataset import SPEC, digests

from gtc_dist.data import storage
from gtc_dist.errors import InputError
from gtc_dist.synthetic import choice
from gtc_dist.synthetic import generate as generator
from gtc_dist.synthetic.generate import generate_dataset, list_parts, write_part
from gtc_dist.synthetic.planted_world import PlantedWorld
from gtc_dist.synthetic.spec import Spec


def test_same_seed_same_bytes_another_seed_other_bytes(folder, tmp_path):
    generate_dataset(SPEC, str(tmp_path / "same"))
    generate_dataset(replace(SPEC, seed=1), str(tmp_path / "other"))
    assert digests(tmp_path / "same") == digests(folder)
    other = digests(tmp_path / "other")
    assert other.keys() == digests(folder).keys()
    assert [n for n, d in digests(folder).items() if other[n] == d] == []


@pytest.mark.parametrize("order", ["reversed", "each in a new world"])
def test_parts_may_be_written_in_any_order_and_process(folder, tmp_path, order):
    shared = PlantedWorld(SPEC)
    for kind, chunk in reversed(list_parts(SPEC)):
        write_part(shared if order == "reversed" else PlantedWorld(SPEC), str(tmp_path), kind, chunk)
    expected = digests(folder)
    del expected[generator.DATASET]
    assert digests(tmp_path) == expected


def test_counts_do_not_depend_on_which_part_finished_first(folder):
    counts = storage.read_json(f"{folder}/{generator.DATASET}")["counts"]
    counts = {name: counts[name] for name in reversed(counts) if name not in ("users", "items")}
    before = digests(folder)
    generator.finalize_dataset(SPEC, str(folder), counts)
    assert digests(folder) == before


def test_ray_tasks_give_the_same_bytes(folder, tmp_path, ray_local):
    dataset = generate_dataset(SPEC, str(tmp_path / "raw"), parallel=True)
    assert digests(tmp_path / "raw") == digests(folder)
    assert dataset == storage.read_json(f"{folder}/{generator.DATASET}")


@pytest.mark.parametrize("parallel", [False, True], ids=["in process", "Ray"])
@pytest.mark.parametrize(
    ("obstacle", "message"),
    [("file", r"part \d+ of users cannot be written: .*truth/users"), ("/proc", r"does not exist .*write it")],
)
def test_a_failing_part_ends_the_run_and_names_the_cause(tmp_path, ray_local, parallel, obstacle, message):
    """The folder of one kind becomes unwritable after the start; the dataset stays incomplete."""
    out = tmp_path / "raw"

    def spoil(done, total):
        if done:
            return
        (out / "truth").mkdir()
        if obstacle == "file":
            (out / "truth/users").write_text("in the way")
        else:
            (out / "truth/users").symlink_to(obstacle)

    with pytest.raises(InputError, match=message):
        generate_dataset(SPEC, str(out), progress=spoil, parallel=parallel)
    assert (out / generator.DATASET_MARKER).exists()
    assert not (out / generator.DATASET).exists()
    (out / "truth/users").unlink()
    generate_dataset(SPEC, str(out), force=True, parallel=parallel)
    assert (out / generator.DATASET).exists()


def test_missing_parts_leave_the_dataset_incomplete(tmp_path):
    """For example with a local folder on a cluster of several machines."""
    out = tmp_path / "raw"

    def lose(done, total):
        if done == total:
            shutil.rmtree(out / "interactions")
            shutil.rmtree(out / "features/visual")

    with pytest.raises(InputError, match=r"features/visual/part-00000\.parquet was written but does not exist; if Ray"):
        generate_dataset(SPEC, str(out), progress=lose)
    assert not (out / generator.DATASET).exists()


def test_block_size_changes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "PAIR_BLOCK", 1000)
    generate_dataset(SPEC, str(tmp_path / "raw"))
    assert digests(tmp_path / "raw") == digests(folder)


def test_large_datasets_have_no_npy_matrix(tmp_path):
    """The last of several modalities is one .npy matrix only up to 65,536 items."""
    spec = Spec(users=50, items=1 << 16, interactions=400, modalities={"text": 2, "audio": 2}, factors=2, kept=1)
    assert (spec.npy_modality, replace(spec, modalities={"text": 2}).npy_modality) == ("audio", None)
    spec = replace(spec, items=(1 << 16) + 1)
    assert spec.npy_modality is None
    dataset = generate_dataset(spec, str(tmp_path))
    assert dataset["counts"]["missing_audio"] == 0
    assert sorted(p.name for p in (tmp_path / "features").iterdir()) == ["audio", "text"]
    assert [pq.read_metadata(p).num_rows for p in sorted((tmp_path / "features/audio").iterdir())] == [32768, 32768, 1]
    user = pq.read_table(tmp_path / "interactions")["user_id"]  # drawn from candidates, because there are many items
    assert user.value_counts().field("counts").to_numpy().min() >= spec.minimum


def test_object_storage_gets_the_same_bytes(folder, s3):
    spec = replace(SPEC, users=200, interactions=2_000)
    dataset = generate_dataset(spec, f"{s3}/raw")
    assert storage.read_json(f"{s3}/raw/{generator.DATASET}") == dataset
    names = storage.listing(f"{s3}/raw")
    assert generator.DATASET_MARKER not in names
    items = "truth/items/part-00000.parquet"  # items do not depend on users
    assert storage.read_bytes(f"{s3}/raw/{items}") == (folder / items).read_bytes()
    with pytest.raises(InputError, match="holds a dataset"):
        generate_dataset(spec, f"{s3}/raw")
    generate_dataset(spec, f"{s3}/raw", force=True)
    assert storage.listing(f"{s3}/raw") == names


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    spec = Spec(users=20, items=100, interactions=120, modalities={"text": 4})
    (tmp_path / "notes.txt").write_text("mine")
    for force in (False, True):  # only a dataset may be replaced
        with pytest.raises(InputError, match=r"is not empty.*notes\.txt"):
            generate_dataset(spec, str(tmp_path), force)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    storage.write_json(f"{tmp_path}/half/{generator.DATASET_MARKER}", {})
    with pytest.raises(InputError, match="incomplete"):
        generate_dataset(spec, f"{tmp_path}/half")
    generate_dataset(spec, f"{tmp_path}/half", force=True)
    (tmp_path / "half/runs").mkdir()
    (tmp_path / "half/runs/metrics.json").write_text("mine")
    for force in (False, True):  # files of others are never removed
        with pytest.raises(InputError, match=r"1 of \d+ files are not part of a dataset, such as runs/m"):
            generate_dataset(spec, f"{tmp_path}/half", force)
    assert (tmp_path / "half/runs/metrics.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": 0}, "users is 0"),
        ({"kept": 99}, "only 16 factors"),
        ({"interactions": 100}, "the minimum is 5"),
        ({"interactions": 10**7}, "more than a quarter of the 1500 warm items"),
        ({"cold_share": 1.0}, "cold_share is 1.0"),
        ({"modalities": {}}, "name at least one"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"drift": -1.0}, "drift is -1.0"),
        ({"noise": float("nan")}, "noise is nan; expected a finite number"),
        ({"activity": 1.0}, "activity is 1.0; it must be above 1"),
        ({"users": 10.5}, "users is 10.5; expected a whole number"),
        ({"modalities": {"a/b": 4}}, "modalities has the name 'a/b'"),
    ],
)
def test_invalid_parameters_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Spec(**changes)


def test_titles_name_the_strongest_factors(data, folder):
    names = pq.read_table(folder / "items")
    assert names["item_id"].to_pylist() == data.items["item_id"].to_pylist()
    factors = np.array(data.items["factors"].to_pylist())
    first, second = (np.argsort(-np.abs(factors), axis=1)[:, place] for place in (0, 1))
    words = {}
    for title, *strongest in zip(names["title"].to_pylist(), first, second, range(len(factors)), strict=True):
        adjective, noun, number = title.split()
        a, b, item = strongest
        assert int(number) == item
        words.setdefault(("first", a, factors[item, a] > 0), set()).add(adjective)
        words.setdefault(("second", b, factors[item, b] > 0), set()).add(noun)
    assert {len(each) for each in words.values()} == {1}
    assert len(words) == len({(key[0], *each) for key, each in words.items()}) == 2 * 2 * factors.shape[1]
