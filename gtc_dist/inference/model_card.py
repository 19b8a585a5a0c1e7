"""README.md of an export: what the embeddings are of, how well they rank, how to load them."""

from typing import Any

from gtc_dist.checkpoint.existing_run import RunRef
from gtc_dist.checkpoint.run_folder import METRICS_FILE
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.embedding_formats.loading_text import loading_text

CARD = "README.md"
SHOWN_METRICS = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")


def model_card(run_ref: RunRef, export: dict[str, Any]) -> str:
    """The text.

    Args:
        export: entries of the manifest: users, items, new_users, new_items, dim, dtype and those of `write_formats`.
    """
    data, path = Catalog(run_ref.config.data.catalog).manifest, storage.join(run_ref.uri, METRICS_FILE)
    result = storage.read_json(path) if storage.exists(path) else None
    users, items = (
        f"{export[kind]:,} {kind}" + (f" and {export[f'new_{kind}']:,} new ones" if f"new_{kind}" in export else "")
        for kind in ("users", "items")
    )
    content = ", ".join(f"{name} {entry.dim}" for name, entry in data.modalities.items())
    interactions = ", ".join(f"{split} {rows:,}" for split, rows in data.interactions.items())
    size = f"{users} and {items}, {export['dim']} columns of {export['dtype']}"
    lines = [
        "# Embeddings of users and items",
        "",
        f"{size}, of the best epoch, {run_ref.epoch}, of the run `{run_ref.uri}`, trained by gtc-dist on "
        f"`{run_ref.config.data.catalog}`.",
        "",
        "The score of a user and an item is the dot product of their embeddings; leave out what a user has.",
        "",
        f"- Interactions: {interactions}; {data.cold_items:,} items have none in train.",
        f"- Content, values of an item: {content}.",
        "- `manifest.json` has the files with their rows, sizes and SHA-256.",
        "",
    ]
    if result is not None and result["best_epoch"] == run_ref.epoch:
        if "final_fit" in result:
            selection = result["final_fit"]["selection"]
            lines += [f"It was trained on train and valid; the metrics are those of `{selection}`, on train alone.", ""]
        lines += ["| all items ranked | " + " | ".join(SHOWN_METRICS) + " |", "| --- " * 5 + "|"]
        rows = {split: result[split]["overall"] for split in ("valid", "test")} | {"popularity": result["popularity"]}
        for name, values in rows.items():
            title = name if name != "popularity" else "popularity, test"
            lines.append(f"| {title} | " + " | ".join(f"{values[metric]:.4f}" for metric in SHOWN_METRICS) + " |")
        lines.append("")
    return "\n".join([*lines, loading_text(export)])
