"""What a run folder and the manifest of its catalog say about a run, read without loading the model."""

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.existing_run import with_catalog
from gtc_dist.checkpoint.run_folder import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    EPOCH_PREFIX,
    METRICS_FILE,
    METRICS_LOG,
    REFRESH_FILES,
    STEP_PREFIX,
    TENSORBOARD_FOLDER,
)
from gtc_dist.config import Config
from gtc_dist.config_file import read_run_config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog, Manifest
from gtc_dist.errors import InputError
from gtc_dist.tracking.charts import number_of_tag

POINTS = 1000  # of a curve that are read; TensorBoard's reader takes a sample of more
EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.")

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class CheckpointFacts:
    name: str
    step: int | None  # None: a best checkpoint
    bytes: int
    complete: bool


@dataclass
class RunData:
    """A run as its folder shows it.

    epochs: lines of metrics.jsonl, one for each validation. result: metrics.json; None: not finished.
    curves: number of the trainer -> (step, value). starts: Unix times at which a start wrote its first log.
    data: manifest of the catalog; None: see `missing`. missing: what could not be read, a sentence each.
    refreshed: the run that `gtc refresh` made this one of, without training; None: this one was trained.
    """

    uri: str
    config: Config
    epochs: list[dict]
    result: dict | None
    curves: dict[str, Points]
    starts: list[int]
    checkpoints: list[CheckpointFacts]
    data: Manifest | None = None
    missing: list[str] = field(default_factory=list)
    refreshed: str | None = None

    @property
    def name(self) -> str:
        return self.uri.rstrip("/").rpartition("/")[2]

    @property
    def valid_curves(self) -> dict[str, Points]:
        """Metrics of valid by epoch."""
        names = dict.fromkeys(name for line in self.epochs for name in line["valid"])
        return {name: [(e["epoch"], e["valid"][name]) for e in self.epochs if name in e["valid"]] for name in names}

    def by_epoch(self, prefix: str) -> dict[str, Points]:
        """Other numbers of metrics.jsonl by epoch, without the prefix of their names."""
        names = dict.fromkeys(name for line in self.epochs for name in line if name.startswith(prefix))
        return {n.removeprefix(prefix): [(e["epoch"], e[n]) for e in self.epochs if n in e] for n in names}


def read_run(uri: str, catalog: str | None = None) -> RunData:
    """Read a run, finished or not.

    Args:
        catalog: where its catalog is now, if it has moved.

    Raises:
        InputError: no run at `uri`, or a file of it that is no JSON or YAML.
    """
    path = storage.join(uri, CONFIG_FILE)
    if not storage.exists(path):
        raise InputError(f"{uri} holds no run (no {CONFIG_FILE}); give run.storage/run.name of a training")
    config = read_run_config(storage.read_bytes(path), path)
    curves, starts = read_events(storage.join(uri, TENSORBOARD_FOLDER))
    result = storage.join(uri, METRICS_FILE)
    run = RunData(
        storage.absolute(uri),
        config,
        _read_lines(storage.join(uri, METRICS_LOG)),
        storage.read_json(result) if storage.exists(result) else None,
        curves,
        starts,
        _checkpoints(uri),
    )
    manifest = storage.join(uri, REFRESH_FILES[0])
    if storage.exists(manifest):
        run.refreshed = storage.read_json(manifest)["run"]
        run.missing.append(
            f"gtc refresh made this run of {run.refreshed}, without training, so there are no curves and no metrics; "
            "gtc evaluate --run RUN ranks the test split."
        )
    elif run.result is None:
        run.missing.append("The training is not finished: there are no metrics of the test split yet.")
    if not curves and run.refreshed is None:
        run.missing.append("The run has no event files, so curves of losses, speed and memory are left out.")
    try:
        run.config = with_catalog(config, uri, catalog)
        run.data = Catalog(run.config.data.catalog, verify="size").manifest
    except (InputError, OSError) as error:
        run.missing.append(f"The catalog could not be read, so sizes, parts and lists are left out: {error}")
    return run


def _read_lines(uri: str) -> list[dict]:
    if not storage.exists(uri):
        return []
    try:
        return [json.loads(line) for line in storage.read_bytes(uri).splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise InputError(f"{uri} is no file of JSON lines: {error}") from error


def read_events(folder: str) -> tuple[dict[str, Points], list[int]]:
    """Curves of event files, by the trainer's names, and the times of the starts that wrote them, ascending."""
    names = [name for name in storage.listing(folder) if EVENT_FILE.match(name)]
    starts = sorted(int(EVENT_FILE.match(name).group(1)) for name in names)
    if not names:
        return {}, []
    if storage.is_local(folder):
        return _curves(storage.absolute(folder)), starts
    with tempfile.TemporaryDirectory(prefix="gtc-report-") as copies:
        for name in names:
            with (
                open(os.path.join(copies, name), "wb") as file,
                storage.open_input(storage.join(folder, name)) as source,
            ):
                shutil.copyfileobj(source, file, storage.PART_BYTES)
        return _curves(copies), starts


def _curves(folder: str) -> dict[str, Points]:
    guidance = {"scalars": POINTS, "tensors": 1, "histograms": 1, "images": 1, "audio": 1, "compressedHistograms": 1}
    events = EventAccumulator(folder, size_guidance=guidance).Reload()
    curves: dict[str, Points] = {}
    for tag in events.Tags()["scalars"]:  # a run that version 0.7 began has two tags of a number
        curves.setdefault(number_of_tag(tag), []).extend((e.step, e.value) for e in events.Scalars(tag))
    return {name: sorted(points) for name, points in curves.items()}


def _checkpoints(run: str) -> list[CheckpointFacts]:
    sizes = storage.listing(storage.join(run, CHECKPOINT_FOLDER))
    found = []
    for prefix in (EPOCH_PREFIX, STEP_PREFIX):
        complete, incomplete = checkpoint_files.list_checkpoints(run, prefix)
        for name in complete + incomplete:
            step = int(name.removeprefix(prefix)) if prefix == STEP_PREFIX else None
            size = sum(count for file, count in sizes.items() if file.startswith(f"{name}/"))
            found.append(CheckpointFacts(name, step, size, name in complete))
    return found
