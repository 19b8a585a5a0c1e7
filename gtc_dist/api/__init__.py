"""The commands as functions of Python:

    import gtc_dist

    gtc_dist.prepare("shop.yaml")
    run = gtc_dist.train("shop.yaml", "train.epochs=30")
    run.metrics["test"]["overall"]["ndcg@20"]
    run.recommend(["C-00007"], top=10).to_pandas()

A `Run` also opens a training of earlier, by the URI of its folder: `gtc_dist.Run("s3://bucket/runs/first")`. Errors
that a user can mend are `gtc_dist.errors.InputError`, with one line of text. All of a run is loaded into this process,
when it is needed first; the commands' `--workers` share that among ranks.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from gtc_dist import export
from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.checkpoint.run_folder import METRICS_FILE
from gtc_dist.config import Config
from gtc_dist.config_file import build_config, load_config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Manifest
from gtc_dist.embedding_formats.write_formats import Format
from gtc_dist.errors import InputError
from gtc_dist.evaluation.item_groups import HEAD_ITEMS
from gtc_dist.hybrid.embeddings import Embeddings
from gtc_dist.inference.trained_run import TrainedRun, load_run
from gtc_dist.prepare.build_catalog import prepare_catalog
from gtc_dist.recommend import lists
from gtc_dist.train import train_or_resume

ConfigLike = str | dict[str, Any] | Config


def prepare(config: ConfigLike, *overrides: str, force: bool = False) -> Manifest:
    """Build the catalog of a configuration, unless it is up to date.

    Args:
        config: a YAML file, a nested dictionary such as YAML gives, or a `Config`.
        overrides: `a.b=c`, for a YAML file.
        force: build it again.

    Returns:
        Counts, widths and files of the catalog.

    Raises:
        InputError: bad input; nothing was written.
    """
    return prepare_catalog(_config(config, overrides), force)[0]


def train(config: ConfigLike, *overrides: str) -> "Run":
    """Train, or go on with an interrupted training, to its end; a finished run is opened as it is. Arguments as in
    `prepare`.

    Raises:
        InputError: bad input; or SIGTERM ended the training, whose state is saved.
    """
    config = _config(config, overrides)
    uri = storage.absolute(storage.join(config.run.storage, config.run.name))
    if train_or_resume(config) is None:
        raise InputError(f"{uri}: stopped on SIGTERM, state saved; train again to go on")
    return Run(uri)


class Run:
    """A trained run.

    Args:
        uri: run.storage/run.name.
        catalog: its catalog, if that has moved.

    Raises:
        InputError: no run with a complete checkpoint, or a catalog that is missing or was rebuilt.
    """

    def __init__(self, uri: str, catalog: str | None = None):
        self._ref = find_run(uri, catalog)
        self.uri, self.config = self._ref.uri, self._ref.config

    def __repr__(self) -> str:
        return f"Run({self.uri!r})"

    @property
    def metrics(self) -> dict[str, Any]:
        """Content of metrics.json: metrics of valid and test, those of popularity, the best epoch, seconds.

        Raises:
            InputError: the training is not finished.
        """
        path = storage.join(self.uri, METRICS_FILE)
        if not storage.exists(path):
            raise InputError(f"{self.uri} has no {METRICS_FILE}: its training is not finished; train again to go on")
        return storage.read_json(path)

    def evaluate(
        self, split: Literal["valid", "test"] = "test", users: int | None = None, head_items: int = HEAD_ITEMS
    ) -> dict[str, Any]:
        """Rank a split and return its metrics, as `gtc evaluate` prints them.

        Args:
            users: rank about this many; None: all.
            head_items: "head_free" does not count so many most frequent items of valid.
        """
        return self._loaded.evaluate(split, users, head_items)

    def embeddings(self, kind: Literal["users", "items"]) -> pa.Table:
        """The original ids and the embeddings, fixed-size lists of float32; the score of a user and an item is the dot
        product. `.column("embedding")` as a matrix: `numpy_embeddings`."""
        table = getattr(self._final, kind)
        rows = table.weight.float().numpy()
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
        return pa.table({"id": self._loaded.catalog.ids(kind), "embedding": column})

    def numpy_embeddings(self, kind: Literal["users", "items"]) -> tuple[np.ndarray, np.ndarray]:
        """The same as arrays: ids [n], and embeddings float32 [n, width]."""
        ids = self._loaded.catalog.ids(kind).to_numpy(zero_copy_only=False)
        return ids, getattr(self._final, kind).weight.float().numpy()

    def export(
        self,
        out: str,
        dtype: Literal["float32", "float16"] = "float32",
        faiss: bool = False,
        formats: Iterable[Format] = ("parquet",),
    ) -> None:
        """Write the embeddings to a new or empty folder, as `gtc export` does.

        Args:
            faiss: add it to the formats.

        Raises:
            InputError: the folder holds something else.
        """
        options = ["--dtype", dtype, "--format", *formats, *(["faiss"] if faiss else [])]
        export.main(["--run", self.uri, "--catalog", self.config.data.catalog, "--out", out, *options])

    def recommend(
        self, users: Iterable | None = None, top: int = 20, include_seen: bool = False, explain: bool = False
    ) -> pa.Table:
        """Lists: user_id, rank (from 1), item_id and score, the users in the order of the catalog.

        Args:
            users: original ids, or one text; None: all.
            include_seen: list what a user already has in train, valid or test, too.
            explain: add the parts of each score and the nearest items of the user's own, as `gtc recommend` does.

        Raises:
            InputError: no user, or one that the catalog lacks.
        """
        chosen = None if users is None else np.unique(self._index("users", users))
        embeddings = lists.with_mean_user(self._loaded, self._final)
        made = lists.lists_of(self._loaded, embeddings, chosen, top, include_seen, explain=explain)
        return pa.concat_tables([table for _, table in made])

    def similar_items(self, item: Any, top: int = 20) -> pa.Table:
        """The items with the largest cosine: to (the item), rank, item_id and score. Raises InputError: no such
        item."""
        index = int(self._index("items", [item])[0])
        return lists.nearest_items(self._loaded, self._final.items, index, top)

    @cached_property
    def _loaded(self) -> TrainedRun:
        return load_run(self._ref)

    @cached_property
    def _final(self) -> Embeddings:
        return self._loaded.final_embeddings()

    def _index(self, kind: str, ids: Iterable) -> np.ndarray:
        named = [ids] if isinstance(ids, str) else list(ids)
        if not named:
            raise InputError(f"no id of {kind} is given")
        return self._loaded.catalog.index_of(kind, pa.array(named))


def _config(config: ConfigLike, overrides: tuple[str, ...]) -> Config:
    if isinstance(config, str):
        return load_config(config, list(overrides))
    if overrides:
        raise InputError("overrides go with a YAML file; change the dictionary or the Config instead")
    return build_config(config, "the configuration") if isinstance(config, dict) else config
