"""Titles and pictures in four groups, and the vectors that the command makes of them."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from gtc_dist.data import formats, storage
from gtc_dist.features import encode_items

WORDS = {0: "red lipstick matte", 1: "shampoo for dry hair", 2: "steel kitchen knife", 3: "garden hose nozzle"}


def titles(count: int = 60) -> list[tuple[str, str, str]]:
    """Rows (id, title, description) of items in four groups that share words."""
    rng = np.random.default_rng(0)
    return [(f"B{n:03d}", f"{WORDS[n % 4]} {rng.integers(100)}", f"no. {n}, {WORDS[n % 4]}s") for n in range(count)]


def encode(*words: str) -> None:
    encode_items.main([str(word) for word in words])


def vectors(out) -> dict:
    """Id -> vector of an output."""
    found = {}
    for name in storage.listing(str(out)):
        if name.startswith("part-"):
            table = formats.read_table(storage.join(str(out), name), ["item_id", "vector"])
            values = table["vector"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
            found |= dict(zip(table["item_id"].to_pylist(), values, strict=True))
    return found


def nearest_is_alike(found: dict, group) -> float:
    """Share of items whose nearest other item by cosine is of the same group."""
    ids, rows = list(found), np.stack(list(found.values()))
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    scores = rows @ rows.T - 2 * np.eye(len(rows))
    return float(np.mean([group(ids[a]) == group(ids[b]) for a, b in enumerate(scores.argmax(1))]))


def write_titles(folder) -> str:
    rows = titles()
    pq.write_table(pa.table({"item_id": [r[0] for r in rows], "title": [r[1] for r in rows]}), folder / "items.parquet")
    return str(folder / "items.parquet")


def picture(group: int, seed: int) -> Image.Image:
    """A noisy picture of one of four kinds: colour and shape."""
    rng = np.random.default_rng(seed)
    colour = [(200, 30, 30), (30, 180, 60), (40, 60, 200), (220, 200, 40)][group]
    found = Image.fromarray(rng.integers(180, 255, (90, 120, 3), dtype=np.uint8))
    draw, x, y = ImageDraw.Draw(found), *rng.integers(10, 30, 2)
    (draw.ellipse if group % 2 else draw.rectangle)((x, y, x + 70, y + 50), fill=colour)
    return found


def picture_bytes(group: int, seed: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    picture(group, seed).save(buffer, format)
    return buffer.getvalue()
