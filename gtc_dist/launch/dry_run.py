"""What `--dry-run` prints: what a training or the preparation of a catalog would take. Nothing starts Ray or writes."""

import zlib

import pyarrow.parquet as pq

from gtc_dist.config import Config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.graph.csc import Graphs
from gtc_dist.preflight import ray_start
from gtc_dist.progress import duration

GIB = 2**30
# A second on two cores, docs/scaling.md, From raw tables to a catalog, 1m
PREPARED_INTERACTIONS, PREPARED_VALUES, SEARCHED_ITEMS = 1.7e6, 1.6e7, 3_800
COUNTED_BYTES = 1 << 16  # of a file of text, whose lines are counted


def describe_training(config: Config, catalog: Catalog, graphs: Graphs) -> str:
    """Size and cost of a training, after a check of the cluster.

    Raises:
        InputError, Unreachable: there is no such cluster, or it has no room for the ranks.
    """
    from gtc_dist.launch import cost_model, ray_cluster, ray_train  # slow to import
    from gtc_dist.preflight import room

    workers, cores = config.cluster.workers, ray_cluster.cores()
    if address := ray_start.check_start(dashboard=True):
        where = f"joins the Ray cluster {address}, which answers; its room for the ranks is not checked"
    else:
        node = {"CPU": float(max(cores, min(workers, cores) + 1)), "GPU": float(ray_train.torch.cuda.device_count())}
        room.worker_resources(config.cluster, [room.ClusterNode("", "this machine", node)])
        where = f"starts a local Ray cluster, {cores} cores"
    cost = cost_model.training_cost(config, catalog.manifest, catalog.modalities(config.model.modalities))
    memory = {name: size for name, size in cost.memory.items() if size >= 0.005 * GIB}
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sorted(memory.items(), key=lambda part: -part[1]))
    threads = config.cluster.threads or max(1, cores // workers - 1)
    seconds = cost.seconds_per_step(threads)
    epoch = f"about {duration(cost.steps * seconds)} without validations, {seconds:.3g} s a step"
    lines = [
        f"catalog       {catalog.users:,} users, {catalog.items:,} items, "
        f"{catalog.manifest.interactions['train']:,} train interactions",
        f"epoch         {cost.steps:,} steps of {config.train.batch_size:,} interactions, up to {config.train.epochs} "
        "epochs",
        f"memory        {sum(cost.memory.values()) / GIB:.2f} GiB a rank ({parts}), without activations",
        f"graph         {graphs.bytes / GIB:.2f} GiB, once a node",
        f"traffic       {cost.sent / 1e6:,.1f} MB a rank and step"
        + (", without refreshes" if config.has_historical_embeddings else ""),
        "time          " + ("not known for a GPU" if config.cluster.gpu else f"{epoch} (up to twice or half of that)"),
        f"ranks         {workers}; the command {where}",
    ]
    return "\n".join(lines)


def describe_preparation(
    config: Config, parquet: list[str], texts: list[str], features: dict[str, tuple[int, int]], current: bool
) -> str:
    """Size and cost of a preparation, after a check of the cluster.

    Args:
        parquet, texts: files of interactions. The rows of text files are not known before they are read.
        features: modality -> rows and width.
        current: the catalog is up to date.

    Raises:
        InputError, Unreachable: there is no such cluster.
    """
    address, rows = ray_start.check_start(dashboard=False), 0
    for uri in parquet:
        with storage.open_input(uri) as file:
            rows += pq.ParquetFile(file).metadata.num_rows
    rows += sum(_estimated_rows(uri, size) for uri, size, _ in storage.file_signatures(texts))
    read = f"about {rows:,} rows" if texts else f"{rows:,} rows"
    values = sum(count * width for count, width in features.values())
    items = max(count for count, _ in features.values())
    seconds = 10 + rows / PREPARED_INTERACTIONS + values / PREPARED_VALUES + items / SEARCHED_ITEMS
    lines = [
        f"catalog       {storage.absolute(config.data.catalog)} " + ("is up to date" if current else "would be built"),
        f"interactions  {read} in {len(parquet) + len(texts)} files; users are counted when they are read",
        *(f"{name:<13} {count:,} items, {width} values each" for name, (count, width) in features.items()),
        f"memory        {config.prepare.memory_gib:g} GiB (prepare.memory_gib), and the ids",
        f"scratch       {2 * values / GIB:.2f} GiB of features in {config.prepare.scratch or 'the temporary folder'}",
        f"time          about {duration(seconds)} on two cores",
        "Ray           " + (f"joins {address}, which answers" if address else "starts a local cluster"),
    ]
    return "\n".join(lines)


def _estimated_rows(uri: str, size: int) -> int:
    """Rows of a file of text, if its other lines are as long as those at its head; packed ones shrink by its head's
    ratio."""
    with storage.open_input(uri) as file:
        packed = file.read(COUNTED_BYTES)
    head = zlib.decompressobj(wbits=31).decompress(packed) if packed.startswith(b"\x1f\x8b") else packed
    return round(size * head.count(b"\n") / max(len(packed), 1))
