"""The command that generates datasets: parameters from files and flags, errors, Ray, the specs in configs/datasets."""

import subprocess
import sys
from pathlib import Path

import make_dataset
import pytest

from gtc_dist.config_file import load_config
from gtc_dist.data import storage
from gtc_dist.errors import InputError
from gtc_dist.synthetic.generate import DATASET, generate_dataset
from gtc_dist.synthetic.spec import Spec

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "make_dataset.py"

SMALL = "{users: 50, items: 200, interactions: 400, modalities: {text: 8}, zipf: 1, out: 'OUT', MORE}"


def test_ray_tasks_write_to_object_storage(tmp_path, ray_local, s3, capfd):
    (tmp_path / "small.yaml").write_text(
        f"out: '{s3}/raw'\nusers: 200\nitems: 400\ninteractions: 2000\nmodalities: {{text: 8}}\nuser_chunk: 16\n"
    )
    make_dataset.main(["--spec", str(tmp_path / "small.yaml"), "--seed", "5"])
    spec = Spec(200, 400, 2000, {"text": 8}, user_chunk=16, seed=5)
    printed = capfd.readouterr()
    assert "16 parts; starting Ray" in printed.err
    assert "dataset: 16/16 parts" in printed.err
    assert f"{s3}/raw: 200 users, 400 items" in printed.out
    expected = generate_dataset(spec, str(tmp_path / "raw"))
    assert storage.read_json(f"{s3}/raw/{DATASET}") == expected
    local = storage.listing(str(tmp_path / "raw"))
    assert storage.listing(f"{s3}/raw") == local
    for name in local:
        assert storage.read_bytes(f"{s3}/raw/{name}") == (tmp_path / "raw" / name).read_bytes()


def test_flags_override_the_file(tmp_path):
    out = tmp_path / "raw"
    path = tmp_path / "spec.yaml"
    path.write_text(SMALL.replace("OUT", str(out)).replace("MORE", "activity: 2, noise: 0.5"))
    make_dataset.main(["--spec", str(path), "--users", "60", "--modalities", "text:4,audio:2"])
    parameters = storage.read_json(f"{out}/{DATASET}")["parameters"]
    expected = {
        "users": 60,
        "items": 200,
        "zipf": 1,
        "activity": 2,
        "noise": 0.5,
        "modalities": {"text": 4, "audio": 2},
    }
    assert {name: parameters[name] for name in expected} == expected
    assert parameters["strength"] == Spec().strength
    make_dataset.main(["--spec", str(path), "--out", str(tmp_path / "elsewhere")])
    assert storage.read_json(f"{tmp_path}/elsewhere/{DATASET}")["parameters"]["users"] == 50


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("{user: 3}", [], r"spec\.yaml: unknown key 'user'; did you mean 'users'\?"),
        ("{xyz: 3}", [], r"spec\.yaml: unknown key 'xyz'; known keys: out, users, items"),
        ("{users: many}", [], r"spec\.yaml: users is 'many'; expected a whole number"),
        ("{users: true}", [], r"spec\.yaml: users is True; expected a whole number"),
        ("{zipf: .inf}", [], r"spec\.yaml: zipf is inf; expected a finite number"),
        ("{out: 3}", [], r"spec\.yaml: out is 3; expected text"),
        ("{modalities: [visual]}", [], r"spec\.yaml: modalities is \['visual'\]; expected names and widths"),
        ("{modalities: {visual: 1.5}}", [], r"spec\.yaml: modalities\.visual is 1\.5; expected a whole number"),
        ("{users: 50, users: 60}", [], r"spec\.yaml:1: key 'users' is given twice"),
        ("{users: 50}", ["--users", "0"], "users is 0"),
        ("", [], r"spec\.yaml holds a NoneType; expected keys such as out: and users:"),
    ],
)
def test_an_invalid_file_is_refused(tmp_path, content, flags, message):
    (tmp_path / "spec.yaml").write_text(content)
    with pytest.raises(InputError, match=message):
        make_dataset.main(["--spec", str(tmp_path / "spec.yaml"), "--out", str(tmp_path / "raw"), *flags])
    assert not (tmp_path / "raw").exists()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--spec .*none\.yaml is not a file"):
        make_dataset.main(["--spec", str(tmp_path / "none.yaml")])


def test_an_output_folder_is_needed():
    with pytest.raises(InputError, match="name the output folder with --out, or by the key out"):
        make_dataset.main(["--users", "50"])


@pytest.mark.parametrize("size", ["10k", "100k", "1m", "10m"])
def test_specs_match_the_configs_that_read_their_tables(size):
    config = load_config(ROOT / f"configs/scale/{size}.yaml")
    spec, out = make_dataset.resolve(str(ROOT / f"configs/datasets/{size}.yaml"), None, {})
    assert out == config.data.raw
    assert spec.modalities.keys() == config.data.features.keys()
    for name, modality in config.data.features.items():
        assert modality.path == f"features/{name}{'.npy' if name == spec.npy_modality else '/*.parquet'}"


def test_every_spec_is_tested():
    assert {path.stem for path in (ROOT / "configs/datasets").glob("*.yaml")} == {"10k", "100k", "1m", "10m"}


def test_command_line(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=120)

    out = str(tmp_path / "raw")
    small = ["--users", "50", "--items", "200", "--interactions", "400", "--modalities", "text:8,audio:4"]
    made = run("--out", out, *small, "--cold-share", "0.1", "--seed", "3")
    assert made.returncode == 0, made.stderr
    assert "50 users, 200 items" in made.stdout
    parameters = storage.read_json(f"{out}/{DATASET}")["parameters"]
    assert (parameters["modalities"], parameters["seed"]) == ({"text": 8, "audio": 4}, 3)
    again = run("--out", out, *small)
    assert again.returncode == 2
    assert "holds a dataset" in again.stderr
    assert "Traceback" not in again.stderr
    wrong = run("--out", str(tmp_path / "other"), "--modalities", "text=8")
    assert wrong.returncode == 2
    assert "'text=8'" in wrong.stderr
    assert not (tmp_path / "other").exists()
