"""Check and measure training on the GPU of this machine: a table on screen and one JSON file, in at most 8 minutes.

    python tools/gpu_check.py [--out gpu-check.json] [--minutes 8] [--size 1.0]

It makes two catalogs of random interactions and features: one of the size of TikTok (9,308 users, 6,710 items), one of
a million users and items with four million interactions. Then, each case with as many steps as ten seconds allow:

    parity     loss and gradients of one step on the GPU and on the CPU, from the same weights and batch
    sampler    sampled edges that differ between the GPU and the CPU, and milliseconds of a batch's subgraph on each
    transfer   losses of steps whose batches are copied while the step before computes, against batches waited for
    step       milliseconds of a step, interactions a second, the share of the time in which the GPU computes, operators
               launched, and the share of the floor that is reached (tools/benchmark.py step): whole graph and sampled,
               float32 and bf16, with and without torch.compile
    memory     GPU memory of both catalogs, and the largest catalog that fits by the slope between them

Cases that the time does not allow are left out, the most informative ones run first. Needs all of the project's
packages but Ray; dgl for sampling on the CPU. Without a GPU the same runs on the CPU; give a smaller --size.
"""

import argparse
import gc
import importlib.util
import json
import platform
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from measure_training import MIB, best_seconds, endless_batches, measure_floor, measure_gpu, measure_steps

from gtc_dist.config_file import build_config
from gtc_dist.data.catalog import CSC, SPLITS, Catalog, CatalogWriter, ModalityEntry
from gtc_dist.data.feature_transform import FeatureTransform
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.device_transfer import to_device
from gtc_dist.errors import InputError
from gtc_dist.graph import user_item_graph
from gtc_dist.graph.csc import load_graphs
from gtc_dist.graph.device_sampler import DeviceSampler
from gtc_dist.training.trainer import Trainer

WIDTHS = {"visual": 128, "textual": 768}
NEIGHBOURS = 10  # in the item-item graph
SMALL = {"users": 9_308, "items": 6_710, "interactions": 59_541}  # TikTok
LARGE = {"users": 1_000_000, "items": 1_000_000, "interactions": 4_000_000}
RUN = {"storage": "none", "name": "check"}
SECONDS = 10  # of steps in each case
FULL = {"model": {"propagation": "full"}, "train": {"batch_size": 2048}}
SAMPLED = {"model": {"propagation": "sampled", "layer_nodes": 2048}, "train": {"batch_size": 2048}}
LARGE_SAMPLED = {
    "model": {"propagation": "sampled", "layer_nodes": 2048, "masked_members": 0},
    "train": {"batch_size": 2048, "loss": "softmax", "negatives": {"mode": "shared", "count": 512}}
    | {"table_optimizer": "rowwise_adam"},
}
BY_DGL = {**LARGE_SAMPLED, "model": {**LARGE_SAMPLED["model"], "sampler_device": "cpu"}}
FAST = {"precision": "bf16", "compile": True}
# name, catalog, sections, options of train; in the order in which they run
CASES = [
    ("full", "small", FULL, {}),
    ("full, compiled, bf16", "small", FULL, FAST),
    ("sampled", "small", SAMPLED, {}),
    ("sampled, a million items", "large", LARGE_SAMPLED, {}),
    ("sampled by DGL, a million items", "large", BY_DGL, {}),
    ("full, compiled", "small", FULL, {"compile": True}),
    ("full, bf16", "small", FULL, {"precision": "bf16"}),
    ("full, batch of 32,768, compiled, bf16", "small", FULL, {**FAST, "batch_size": 32_768}),
    ("sampled, a million items, compiled, bf16", "large", LARGE_SAMPLED, FAST),
    ("sampled, a million items, batch of 32,768", "large", LARGE_SAMPLED, {"batch_size": 32_768}),
]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu-check.json", help="JSON file")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case starts later")
    parser.add_argument("--size", type=float, default=1.0, help="factor of users, items, interactions and batches")
    args = parser.parse_args(argv)
    started = time.monotonic()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    report = {"machine": machine(device), "cases": {}, "left_out": {}}
    on_cpu = device.type == "cpu"
    has_dgl = importlib.util.find_spec("dgl") is not None
    with tempfile.TemporaryDirectory(prefix="gtc-gpu-check-") as folder:
        catalogs = {
            name: random_catalog(f"{folder}/{name}", **{key: max(60, int(n * args.size)) for key, n in sizes.items()})
            for name, sizes in (("small", SMALL), ("large", LARGE))
        }
        report["parity"] = parity(catalogs["small"], device, folder, args.size)
        report["sampler"] = sampler_difference(catalogs["large"], device)
        report["transfer"] = transfer_difference(catalogs["small"], device, folder, args.size)
        for name, catalog, sections, train in CASES:
            if time.monotonic() - started > 60 * args.minutes:
                report["left_out"][name] = "no time"
            elif not has_dgl and sections["model"]["propagation"] == "sampled" and (on_cpu or sections is BY_DGL):
                report["left_out"][name] = "dgl is not installed"
            else:
                print(f"{time.monotonic() - started:4.0f} s  {name}", file=sys.stderr, flush=True)
                try:
                    report["cases"][name] = measure(catalogs[catalog], device, folder, sections, train, args.size)
                except (RuntimeError, InputError) as error:  # no memory, no compiler: the others go on
                    report["left_out"][name] = f"{type(error).__name__}: {str(error)[:200]}"
                free_memory(device)
            Path(args.out).write_text(json.dumps(report, indent=2))
    report["largest_catalog"] = largest_catalog(report["cases"], device, args.size)
    report["seconds"] = round(time.monotonic() - started, 1)
    Path(args.out).write_text(json.dumps(report, indent=2))
    print(table(report))
    print(f"written to {args.out}")
    return report


def free_memory(device: torch.device) -> None:
    """Free what the last trainer held; it has reference cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def random_catalog(uri: str, users: int, items: int, interactions: int) -> Catalog:
    """A catalog of random interactions, popular items more often, of normal features and of random item neighbours."""
    rng = np.random.default_rng(0)
    writer, split = CatalogWriter(uri), {}
    for name, share in zip(SPLITS, (1.0, 0.01, 0.01), strict=True):
        count = max(int(interactions * share), 20)
        item = (items * rng.random(count) ** 2).astype(np.int64)
        key = np.unique(rng.integers(0, users, count) * items + item)
        split[name] = (key // items).astype(np.int32), (key % items).astype(np.int32)
        writer.interactions(name, *split[name])
    for kind, count in (("users", users), ("items", items)):
        writer.ids(kind, pa.array(np.arange(count)))
    item_user, user_item = user_item_graph.build_user_item_graph(*split["train"], users, items)
    for name, width in WIDTHS.items():
        writer.features(name, 0, 0, rng.standard_normal((items, width), dtype=np.float32).astype(np.float16))
        FeatureTransform(np.zeros(width), np.ones(width)).save(writer, name)
    neighbours = np.sort(
        (np.arange(items)[:, None] + 1 + rng.integers(0, 40, (items, 1)) + np.arange(NEIGHBOURS)) % items
    )
    item_item = CSC(
        np.arange(items + 1) * NEIGHBOURS,
        neighbours.reshape(-1).astype(np.int32),
        np.full(items * NEIGHBOURS, 1 / NEIGHBOURS, np.float32),
    )
    graphs = {"item_user": item_user, "user_item": user_item, "item_item": item_item}
    for name, graph in graphs.items():
        writer.graph(name, graph)
    writer.finish(
        fingerprint="random",
        users=users,
        items=items,
        interactions={name: len(pair[0]) for name, pair in split.items()},
        cold_items=int((user_item.degree == 0).sum()),
        modalities={n: ModalityEntry(dim=width, raw_dim=width, missing=0) for n, width in WIDTHS.items()},
        graphs={name: len(graph.indices) for name, graph in graphs.items()},
        dropped={},
    )
    return Catalog(uri)


def trainer_of(
    catalog: Catalog, device: torch.device, folder: str, sections: dict, train: dict, size: float
) -> Trainer:
    """A trainer of this process alone."""
    train = {**sections["train"], **train}
    train["batch_size"] = max(32, int(train["batch_size"] * size))
    model = {**sections["model"], "hybrid": {"graph_filter": 0, "content_profile": 0}}
    tree = {"data": {"raw": "none", "catalog": catalog.uri}, "run": {**RUN, "storage": folder}}
    config = build_config(tree | {"model": model, "train": train}, "gpu_check")
    users, items = catalog.interactions("train")
    return Trainer(
        config, catalog, f"{folder}/check", users, items, load_graphs(config, catalog), Communicator(device=device)
    )


def parity(catalog: Catalog, device: torch.device, folder: str, size: float) -> dict[str, float]:
    """Relative difference between the device and the CPU in one step: of the loss, and the largest of a gradient."""
    found = []
    for each in (torch.device("cpu"), device):
        trainer = trainer_of(catalog, each, folder, FULL, {"w_tc": 0.1, "w_diff": 0.1}, size)
        trainer.network.train()
        loader = trainer.loader
        batch = to_device(loader.assemble(loader.draw(1, 0, loader._order(1)[loader._rows(0)])), each)
        terms = trainer.forward_backward(batch, trainer.look_up(batch))
        gradients = [p.grad for p in trainer.network.parameters() if p.grad is not None]
        gradients += [table.gradient()[1] for table in trainer.tables.all()]
        found.append((float(sum(terms.values())), [gradient.double().cpu() for gradient in gradients]))
    (loss, gradients), (other_loss, others) = found
    differences = [float((a - b).norm() / a.norm().clamp(min=1e-12)) for a, b in zip(gradients, others, strict=True)]
    return {"loss": abs(other_loss - loss) / abs(loss), "gradient": max(differences)}


def sampler_difference(catalog: Catalog, device: torch.device) -> dict[str, float]:
    """Edges of two sampled layers that differ between the device and the CPU, and milliseconds of the layers on each,
    with the batch's nodes and the sources on the host before and after."""
    graphs = load_graphs(
        build_config({"data": {"raw": "none", "catalog": catalog.uri}, "run": RUN}, "gpu_check"), catalog
    )
    nodes = torch.from_numpy(np.random.default_rng(0).permutation(catalog.users + catalog.items)[:5000])
    samplers = {"cpu": DeviceSampler(graphs.nodes, torch.device("cpu")), "device": DeviceSampler(graphs.nodes, device)}

    def layers(sampler: DeviceSampler) -> list[torch.Tensor]:
        sampler.seed(1)
        layer = sampler.layer(nodes.to(sampler.graph.indptr.device), 10)
        further = sampler.layer(layer.sources, 10)
        return [layer.edges.cpu(), further.edges.cpu(), further.sources.cpu()]

    pairs = list(zip(layers(samplers["cpu"]), layers(samplers["device"]), strict=True))
    different = sum(len(a) if len(a) != len(b) else int((a != b).sum()) for a, b in pairs)
    result = {"different": different}
    for name, sampler in samplers.items():
        times = []
        for _ in range(5):
            start = time.perf_counter()
            layers(sampler)
            times.append(time.perf_counter() - start)
        result[f"milliseconds_{name}"] = 1e3 * min(times)
    return result


def transfer_difference(catalog: Catalog, device: torch.device, folder: str, size: float) -> float:
    """Largest relative difference of a loss in some steps, between batches that the prefetch thread brings to the
    device while the step before computes, and batches for which the host waits."""
    losses = []
    for ahead in (True, False):
        trainer = trainer_of(catalog, device, folder, FULL, {"w_tc": 0.1, "w_diff": 0.1}, size)
        trainer.network.train()
        loader = trainer.loader
        batches = loader.epoch(1) if ahead else (to_device(batch, device) for batch in loader._batches(1, 0))
        with closing(batches):
            steps = [trainer.train_step(next(batches)) for _ in range(min(20, loader.steps))]
        losses.append([float(sum(terms.values())) for terms in steps])
        trainer.guard.settle()
        free_memory(device)
    return max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))


def measure(
    catalog: Catalog, device: torch.device, folder: str, sections: dict, train: dict, size: float
) -> dict[str, float]:
    """Figures of one case."""
    trainer = trainer_of(catalog, device, folder, sections, train, size)
    trainer.network.train()
    with closing(endless_batches(trainer)) as batches:
        for _ in range(3):  # compiles
            trainer.train_step(next(batches))
        once = best_seconds(lambda: trainer.train_step(next(batches))["l2"], device, repeats=3)
    repeats = int(max(5, min(200, SECONDS / max(once, 1e-4))))
    if device.type == "cuda":
        gpu = measure_gpu(trainer, repeats)
        result = {
            "milliseconds_per_step": 1e3 * gpu["gpu/seconds_per_step"],
            "interactions_per_second": gpu["gpu/interactions_per_second"],
            "busy_share": gpu["gpu/busy_share"],
            "gpu_mib": gpu["gpu/peak_mib"],
        }
        steps = measure_steps(trainer, 5) | gpu
    else:
        steps = measure_steps(trainer, repeats)
        result = {
            "milliseconds_per_step": 1e3 * steps["seconds_per_step"],
            "interactions_per_second": steps["interactions_per_second"],
        }
    result["waiting_for_batch"] = steps["waiting_for_batch"]
    floor = measure_floor(trainer, steps)
    if not train.get("compile") and train.get("precision") != "bf16":  # operators are counted without these
        result |= {name: floor[f"operators/{name}"] for name in ("launches", "waits")}
    return result | {"rows": catalog.users + catalog.items, "share_of_floor": floor["floor/share_reached"]}


def largest_catalog(cases: dict[str, dict], device: torch.device, size: float) -> dict[str, float] | None:
    """Users and items that fit the GPU without masked diffusion, by the slope of the memory between the two catalogs in
    sampled mode."""
    few, many = cases.get("sampled"), cases.get("sampled, a million items")
    if device.type != "cuda" or few is None or many is None or size != 1:
        return None
    # the small catalog's masked diffusion has 4 * 129 values an item with two moments, which the large one lacks
    masked = 12 * 4 * 129 * SMALL["items"] / MIB
    slope = (many["gpu_mib"] - (few["gpu_mib"] - masked)) / (many["rows"] - few["rows"])
    total = torch.cuda.get_device_properties(device).total_memory / MIB
    return {"mib_per_row": slope, "users_and_items": (0.9 * total - few["gpu_mib"]) / slope}


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def table(report: dict) -> str:
    """Text table of a report."""
    shown = ("milliseconds_per_step", "interactions_per_second", "busy_share", "waiting_for_batch", "launches", "waits")
    shown += ("share_of_floor", "gpu_mib")
    lines = [report["machine"], f"{'':<44}" + "".join(f"{name.replace('_', ' ')[:18]:>20}" for name in shown)]
    for name, result in report["cases"].items():
        cells = [f"{result[key]:,.3g}" if key in result else "-" for key in shown]
        lines.append(f"{name:<44}" + "".join(f"{cell:>20}" for cell in cells))
    lines += [f"{name}: {reason}" for name, reason in report["left_out"].items()]
    parity = report["parity"]
    lines.append(f"parity with the CPU: loss {parity['loss']:.1e}, gradients {parity['gradient']:.1e} (relative)")
    sampler = report["sampler"]
    lines.append(
        f"sampler: {sampler['different']} edges and sources differ from the CPU's; two layers of 5,000 nodes "
        f"{sampler['milliseconds_device']:.1f} ms, on the CPU {sampler['milliseconds_cpu']:.1f} ms"
    )
    lines.append(f"batches copied beside the computation against ones waited for: loss {report['transfer']:.1e}")
    if report["largest_catalog"]:
        fits = report["largest_catalog"]
        lines.append(f"{fits['users_and_items']:,.0f} users and items fit, without masked diffusion")
    return "\n".join([*lines, f"{report['seconds']} s"])


if __name__ == "__main__":
    main()
