"""What a run's filter keeps of the content, against what users of a generated catalog were made to care about.

    python tools/planted.py --run RUN --dataset DIR [--users 500] [--items 500]

DIR is the folder that tools/make_dataset.py wrote (`truth/`), RUN a run on its catalog with `condition: user`. Each
item's content is taken through the filter, once for each of a sample of users and once for nobody, and read out factor
by factor with a linear map that is fitted on the unfiltered content. Prints one JSON object, for each modality:

    decodable    R^2 of each planted factor in the content stream; factors above 0.1 count below
    kept         slope of a factor after the filter on the same before, over items: 1 is kept as it is, 0 is dropped;
                 mean over users of those that the user cares about, of the others, and of what is no factor at all
    mask         correlation over factors of kept with the user's mask, mean over users and its standard error
    mask_nobody  the same of the filter without the user
    taste        correlation over factors of how far the filter moves all items along a factor with the user's signed
                 taste in it
"""

import argparse
import json

import numpy as np
import torch

from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError, run_command
from gtc_dist.inference.trained_run import TrainedRun, find_run, load_run
from gtc_dist.personal.personal_filter import PersonalFilter

DECODABLE = 0.1


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="URI of a run with model.diffusion.condition=user")
    parser.add_argument("--dataset", required=True, help="URI of the generated dataset")
    parser.add_argument("--users", type=int, default=500)
    parser.add_argument("--items", type=int, default=500)
    args = parser.parse_args(argv)

    run = load_run(find_run(args.run))
    factors = truth(args.dataset, "items", "item_id", "factors", run.catalog.ids("items"))
    tastes = truth(args.dataset, "users", "user_id", "taste", run.catalog.ids("users"))
    rng = np.random.default_rng(0)
    users = np.sort(rng.permutation(np.flatnonzero(run.graphs.user_degree > 0))[: args.users])
    items = np.sort(rng.permutation(np.flatnonzero(run.graphs.item_degree > 0))[: args.items])
    print(json.dumps(study(run, factors, tastes[users], users, items), indent=1))


def truth(dataset: str, kind: str, key: str, column: str, ids) -> np.ndarray:
    """Planted vectors float64 [n, K] in the order of the catalog's ids."""
    names = sorted(storage.listing(storage.join(dataset, "truth", kind)))
    if not names:
        raise InputError(f"{dataset} holds no truth/{kind}; give the folder that tools/make_dataset.py wrote")
    rows = {}
    for name in names:
        table = formats.read_table(storage.join(dataset, "truth", kind, name), [key, column])
        rows |= dict(zip(table[key].to_pylist(), table[column].to_pylist(), strict=True))
    missing = [one for one in ids.to_pylist() if one not in rows]
    if missing:
        raise InputError(f"{dataset} does not know {kind} {missing[0]!r} of the catalog: is it another dataset?")
    return np.array([rows[one] for one in ids.to_pylist()], np.float64)


@torch.no_grad()
def study(run: TrainedRun, factors: np.ndarray, tastes: np.ndarray, users: np.ndarray, items: np.ndarray) -> dict:
    """Figures of each modality, of the first member; factors [all items, K], tastes [len(users), K]."""
    personal, network = PersonalFilter(run), run.network
    member, audience = network.members[0], network.split(personal.audience.weight)[0]
    ids = network.split(run.tables.item.weight)[0]
    content = member.content({name: table.weight for name, table in run.features.items()})
    of_users = network.split(personal.users.weight)[0][torch.from_numpy(users)]
    chosen = torch.from_numpy(items)
    some = ids[chosen], {name: x[chosen] for name, x in content.items()}, audience[chosen]
    nobody = member.filtered(*some)
    for_users = [member.filtered(*some, user.expand(len(chosen), -1)) for user in of_users]
    result = {}
    for name, x0 in content.items():
        decode = Decoder(x0.double().numpy(), factors)
        seen = decode.r2 > DECODABLE
        before = decode(some[1][name])
        kept_nobody, _ = slopes(before, decode(nobody[name]))
        rows = [slopes(before, decode(filtered[name])) for filtered in for_users]
        kept = np.array([slope for slope, _ in rows])
        moved = np.array([mean for _, mean in rows]) - slopes(before, decode(nobody[name]))[1]
        mask = tastes != 0
        result[name] = {
            "decodable": [round(float(value), 3) for value in decode.r2],
            "kept": {
                "cared": float(kept[:, :-1][mask & seen].mean()),
                "others": float(kept[:, :-1][~mask & seen].mean()),
                "no factor": float(kept[:, -1].mean()),
            },
            "mask": correlation(kept[:, :-1][:, seen], mask[:, seen]),
            "mask_nobody": correlation(np.tile(kept_nobody[:-1][seen], (len(users), 1)), mask[:, seen]),
            "taste": correlation(moved[:, :-1][:, seen], tastes[:, seen]),
        }
    return result


class Decoder:
    """Linear map from content streams, rows of length one, to factors, with what no factor explains as a last column.

    r2: share of each factor's variance that the map explains, over all items.
    """

    def __init__(self, x0: np.ndarray, factors: np.ndarray):
        x = self._unit(x0)
        self.mean = x.mean(0)
        x = x - self.mean
        y = factors - factors.mean(0)
        ridge = 1e-3 * np.trace(x.T @ x) / x.shape[1]
        self.map = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)
        self.r2 = 1 - ((y - x @ self.map) ** 2).sum(0) / (y**2).sum(0)
        # leading direction of what the factors leave over
        rest = x - y @ np.linalg.lstsq(y, x, rcond=None)[0]
        self.rest = np.linalg.svd(rest, full_matrices=False)[2][0]

    def __call__(self, x: torch.Tensor) -> np.ndarray:
        rows = self._unit(x.double().numpy()) - self.mean
        return np.concatenate([rows @ self.map, (rows @ self.rest)[:, None]], axis=1)

    @staticmethod
    def _unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)


def slopes(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope of each column after on the same before, over rows, and the mean move."""
    x = before - before.mean(0)
    return (x * (after - after.mean(0))).sum(0) / (x * x).sum(0), (after - before).mean(0)


def correlation(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Pearson's, of each row of a with the same of b, [n, K]: mean, standard error, share of rows above zero. Rows
    that are alike throughout are left out."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    size = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    values = (a * b).sum(1)[size > 0] / size[size > 0]
    se = values.std() / max(len(values), 1) ** 0.5
    return {"mean": round(float(values.mean()), 4), "se": round(float(se), 4), "above_zero": float((values > 0).mean())}


if __name__ == "__main__":
    run_command(main)
