"""A generated dataset, read back with plain tools."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gtc_dist.synthetic.spec import Spec

SPEC = Spec(
    users=900, items=400, interactions=14_000, cold_share=0.1, missing_share=0.05, user_chunk=256, item_chunk=128
)


class Dataset:
    """A dataset read back with plain tools; ids are mapped to rows of the truth tables."""

    def __init__(self, folder: Path, spec: Spec):
        self.spec = spec
        self.users, self.items = pq.read_table(folder / "truth/users"), pq.read_table(folder / "truth/items")
        self.user_ids = {v: i for i, v in enumerate(self.users["user_id"].to_pylist())}
        self.item_ids = {v: i for i, v in enumerate(self.items["item_id"].to_pylist())}
        self.factors = np.stack(self.items["factors"].to_numpy())
        self.taste = np.stack(self.users["taste"].to_numpy())
        self.group = self.users["group"].to_numpy()
        self.masks = np.load(folder / "truth/masks.npy")
        self.table = pq.read_table(folder / "interactions")
        self.user, self.item = self.positions(self.table)

    def positions(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        user = np.array([self.user_ids[v] for v in table["user_id"].to_pylist()])
        return user, np.array([self.item_ids[v] for v in table["item_id"].to_pylist()])


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
