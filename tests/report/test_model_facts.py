"""What the parts of a model do, against brute force; on one rank and on two."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small import small_catalog, write_config
from trainings import train_without_ray

from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.config import Config
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.inference.layerwise import embed_catalog
from gtc_dist.inference.trained_run import load_run
from gtc_dist.model.build import build_network
from gtc_dist.report.model_facts import (
    COMPARED,
    ListQuestion,
    embeddings_of_parts,
    embeddings_without_filter,
    model_facts,
    trained_embeddings,
    typical_users,
)

PARTS = ["model.masked_members=1", "model.hybrid.graph_filter=4", "model.hybrid.content_profile=4", "train.epochs=2"]
NAMES = ["network", "masked diffusion", "graph filter", "content: m0", "content: m1", "untrained scorers together"]


@pytest.fixture(scope="module")
def run_ref(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    catalog = small_catalog(folder / "catalog")
    return find_run(train_without_ray(write_config(folder, catalog.uri, str(folder / "runs")), *PARTS))


@pytest.fixture(scope="module")
def facts(run_ref) -> dict:
    return model_facts(Communicator(), None, run_ref, ListQuestion(None, None))


def first_items(users: np.ndarray, items: np.ndarray, seen: list[set]) -> list[set]:
    """The first COMPARED items of each user by brute force, without those that the user has in train."""
    scores = users.astype(np.float64) @ items.astype(np.float64).T
    for user, own in enumerate(seen):
        scores[user, list(own)] = -np.inf
    order = np.argsort(-scores, axis=1)[:, :COMPARED]
    return [set(row[np.isfinite(scores[user, row])].tolist()) for user, row in enumerate(order)]


def test_overlaps_and_groups_are_those_of_brute_force(run_ref, facts):
    run = load_run(run_ref)
    users, items = run.catalog.interactions("train")
    seen = [set(items[users == user].tolist()) for user in range(run.catalog.users)]
    ranked = [user for user in np.unique(run.catalog.interactions("valid")[0]).tolist() if seen[user]]
    assert facts["users"] == len(ranked)
    final = first_items(*(table.weight.numpy() for table in run.final_embeddings()), seen)
    degree = np.array([len(seen[user]) for user in ranked])
    assert sum(count for _, count, _, _ in facts["groups"]) == len(ranked)
    for _, count, least, most in facts["groups"]:
        assert count == ((degree >= least) & (degree <= most)).sum()
    found = {part["name"]: part for part in facts["parts"]}
    assert list(found) == [*NAMES, "popularity alone"]
    for name, weight, embeddings in embeddings_of_parts(run):
        own = first_items(*(table.weight.float().numpy() for table in embeddings), seen)
        shares = np.array([len(own[user] & final[user]) / COMPARED for user in ranked])
        assert found[name]["overlap"] == pytest.approx(shares.mean(), abs=0.01), name  # ties may fall otherwise
        for (_, _, least, most), share in zip(facts["groups"], found[name]["by_group"], strict=True):
            assert share == pytest.approx(shares[(degree >= least) & (degree <= most)].mean(), abs=0.02)
        assert found[name]["weight"] == weight
    assert found["network"]["weight"] == run.scorer.fusion.weights["members"]
    assert facts["reference"] == "untrained scorers together"
    overlaps = [each["overlap"] for each in facts["most_different"]]
    assert overlaps == sorted(overlaps)
    assert overlaps[0] <= found["untrained scorers together"]["overlap"]


def test_without_the_filter_content_enters_as_it_is(run_ref, facts):
    """Against a network that was built without filters."""
    run = load_run(run_ref)
    generator = torch.Generator().manual_seed(1)
    for parameter in run.network.members[0].filters.parameters():  # at first, a filter changes nothing
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    before = run.final_embeddings()
    found = embeddings_without_filter(run)
    train = run_ref.config.train.model_copy(update={"w_diff": 0.0})
    plain: Config = run_ref.config.model_copy(update={"train": train})
    network, _ = build_network(plain, run.catalog, Communicator(), trainable=False)
    network.load({name: value for name, value in run.network.state_dict().items() if ".filters." not in name})
    of_network = embed_catalog(network, run.tables, run.features, run.graphs, run_ref.config.eval.block_rows)
    expected = run.scorer(of_network, trained_embeddings(run)[1])
    for one, other, old, again in zip(found, expected, before, run.final_embeddings(), strict=True):
        torch.testing.assert_close(one.weight, other.weight)
        assert torch.equal(old.weight, again.weight)  # the filters are back
        assert one.weight.shape == old.weight.shape
    assert not torch.allclose(found.users.weight, before.users.weight)
    assert 0 < facts["filter"]["overlap"] <= 1


def test_lists_name_what_users_have_and_get(run_ref, facts):
    run = load_run(run_ref)
    ids = {kind: run.catalog.ids(kind).to_pylist() for kind in ("users", "items")}
    owned: dict[str, dict] = {split: {} for split in ("train", "valid", "test")}
    for split, by_user in owned.items():
        for user, item in zip(*run.catalog.interactions(split), strict=True):
            by_user.setdefault(ids["users"][user], set()).add(str(ids["items"][item]))
    assert len(facts["lists"]) == 3
    counts = [entry["train"] for entry in facts["lists"]]
    assert counts == sorted(counts)
    for entry in facts["lists"]:
        train = owned["train"][entry["user"]]
        assert entry["train"] == len(train)
        assert {item["id"] for item in entry["has"]} <= train
        everything = set().union(*(by_user.get(entry["user"], set()) for by_user in owned.values()))
        assert not everything & {item["id"] for item in entry["gets"]}
        scores = [item["score"] for item in entry["gets"]]
        assert len(scores) == 10
        assert scores == sorted(scores, reverse=True)


def facts_of_rank(comm: Communicator, run_ref) -> dict:
    return model_facts(comm, None, run_ref, ListQuestion(np.array([3, 50]), None))


def test_two_ranks_find_what_one_does(run_ref):
    alone = facts_of_rank(Communicator(), run_ref)
    one, other = run_ranks(facts_of_rank, 2, run_ref)
    assert one == other
    assert one["groups"] == alone["groups"]
    assert [entry["user"] for entry in one["lists"]] == [entry["user"] for entry in alone["lists"]]
    for ours, theirs in zip(one["parts"], alone["parts"], strict=True):
        assert ours["overlap"] == pytest.approx(theirs["overlap"], abs=0.02)
        assert ours["recall@20"] == pytest.approx(theirs["recall@20"], abs=0.02)


@pytest.mark.parametrize(
    ("degree", "expected"),
    [([0, 0], []), ([0, 4], [4]), ([1, 2, 3], [1, 2]), ([5, 0, 1, 2, 9, 7, 3, 3, 8, 6, 4], [2, 4, 8])],
)
def test_typical_users_have_few_some_and_many_interactions(degree, expected):
    assert sorted(degree[user] for user in typical_users(np.array(degree))) == expected
