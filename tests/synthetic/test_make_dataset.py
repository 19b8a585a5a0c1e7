"""The command that makes datasets: parameters from a config and from flags, their errors, Ray, the configs at scale."""

import subprocess
import sys
from pathlib import Path

import pytest

from gtc_dist.config_file import load_config
from gtc_dist.data import storage
from gtc_dist.errors import InputError
from gtc_dist.synthetic.generate import DATASET, generate
from gtc_dist.synthetic.spec import Spec

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "make_dataset.py"
sys.path.insert(0, str(TOOL.parent))

import make_dataset  # noqa: E402  (a script)

CONFIG = """
data: {raw: RAW, catalog: c}
run: {storage: r, name: n}
dataset: {users: 50, items: 200, interactions: 400, modalities: {text: 8}, zipf: 1, DATASET}
"""


def test_ray_tasks_write_to_object_storage(tmp_path, ray_local, s3, capfd):
    (tmp_path / "small.yaml").write_text(
        f"data: {{raw: '{s3}/raw', catalog: '{s3}/catalog'}}\nrun: {{storage: '{s3}/runs', name: small}}\n"
        "dataset: {users: 200, items: 400, interactions: 2000, modalities: {text: 8}, user_chunk: 16}\n"
    )
    make_dataset.main(["--config", str(tmp_path / "small.yaml"), "--seed", "5"])
    spec = Spec(200, 400, 2000, {"text": 8}, user_chunk=16, seed=5)
    said = capfd.readouterr()
    assert "16 parts; starting Ray" in said.err
    assert "16/16" in said.err  # the progress bar
    assert f"{s3}/raw: 200 users, 400 items" in said.out
    expected = generate(spec, str(tmp_path / "raw"))
    assert storage.read_json(f"{s3}/raw/{DATASET}") == expected
    local = storage.listing(str(tmp_path / "raw"))
    assert storage.listing(f"{s3}/raw") == local
    for name in local:
        assert storage.read_bytes(f"{s3}/raw/{name}") == (tmp_path / "raw" / name).read_bytes()


def test_config_gives_parameters_and_flags_override_them(tmp_path):
    out = tmp_path / "raw"
    (tmp_path / "c.yaml").write_text(CONFIG.replace("RAW", str(out)).replace("DATASET", "activity: 2, noise: 0.5"))
    config = str(tmp_path / "c.yaml")
    make_dataset.main(["--config", config, "--users", "60", "--modalities", "text:4,audio:2"])
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
    make_dataset.main(["--config", config, "--out", str(tmp_path / "elsewhere")])
    assert storage.read_json(f"{tmp_path}/elsewhere/{DATASET}")["parameters"]["users"] == 50


@pytest.mark.parametrize(
    ("section", "flags", "message"),
    [
        ("user: 3", [], r"c\.yaml: unknown key 'dataset\.user'; did you mean 'users'\?"),
        ("xyz: 3", [], r"c\.yaml: unknown key 'dataset\.xyz'; known keys here: users, items"),
        ("users: many", [], r"c\.yaml: dataset\.users is 'many'; expected a whole number"),
        ("users: true", [], r"c\.yaml: dataset\.users is True; expected a whole number"),
        ("zipf: .inf", [], r"c\.yaml: dataset\.zipf is inf; expected a finite number"),
        ("modalities: [visual]", [], r"c\.yaml: dataset\.modalities is \['visual'\]; expected names with widths"),
        ("modalities: {visual: 1.5}", [], r"c\.yaml: dataset\.modalities\.visual is 1\.5; expected a whole number"),
        ("users: 50", ["--users", "0"], "users is 0"),
        ("", [], r"c\.yaml has no section dataset:"),
    ],
)
def test_wrong_config_is_refused(tmp_path, section, flags, message):
    (tmp_path / "c.yaml").write_text(CONFIG.split("dataset:")[0].replace("RAW", str(tmp_path / "raw")))
    if section:
        with open(tmp_path / "c.yaml", "a") as file:
            file.write(f"dataset: {{{section}}}\n")
    with pytest.raises(InputError, match=message):
        make_dataset.main(["--config", str(tmp_path / "c.yaml"), *flags])
    assert not (tmp_path / "raw").exists()


def test_config_or_folder_is_needed():
    with pytest.raises(InputError, match="--out, or a config with --config"):
        make_dataset.main(["--users", "50"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs/scale").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_at_scale(path):
    """They hold together: what is made is what they read."""
    config = load_config(path)
    spec, out = make_dataset.resolve(str(path), None, {})
    assert out == config.data.raw
    assert spec.modalities.keys() == config.data.features.keys()
    for name, modality in config.data.features.items():
        assert modality.path == f"features/{name}{'.npy' if name == spec.npy_modality else '/*.parquet'}"


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
