"""The masked diffusion: its loss, its masks, and what it learns."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from ranks import run_ranks
from small import small_catalog, small_config
from steps import assert_same_step, whole_gradient
from trainings import fit, trainer_of

from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError
from gtc_dist.evaluation.ranking import RankingOptions, evaluate_on_items, load_ground_truth, popularity
from gtc_dist.graph.csc import load_graphs
from gtc_dist.inference import masked_content as masked_content_module
from gtc_dist.inference.masked_content import fit_projection, masked_content
from gtc_dist.inference.masked_embeddings import embed_masked
from gtc_dist.model import masked_diffusion, user_masks
from gtc_dist.model.build import build_network, load_features
from gtc_dist.model.user_masks import UserMasks

STEPS = 4
MEMBERS = 2
MASKED = {"masked_members": MEMBERS}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c", users=90)


@pytest.fixture(scope="module")
def parts(catalog):
    return parts_of(catalog)


def parts_of(catalog: Catalog, comm: Communicator | None = None) -> tuple:
    """Graphs, network, tables and content of a catalog."""
    comm = comm or Communicator()
    config = small_config(catalog.uri, model=MASKED)
    network, tables = build_network(config, catalog, comm)
    features, graphs = load_features(network.modalities, catalog, comm), load_graphs(config, catalog)
    fit_projection(network.masked, features)
    return graphs, network, tables, masked_content(network.masked, features, graphs, chunk=9)


def positives(graphs) -> list[set]:
    pairs = graphs.nodes.indptr, graphs.nodes.indices - graphs.users
    return [set(pairs[1][pairs[0][u] : pairs[0][u + 1]].tolist()) for u in range(graphs.users)]


def masks_of(graphs, content) -> UserMasks:
    return UserMasks(graphs, content, seed=0, members=MEMBERS, device=torch.device("cpu"))


def test_a_pass_masks_every_user_once(parts):
    graphs, _, _, content = parts
    masks, seen, truth = masks_of(graphs, content), [], positives(graphs)
    for step in range(STEPS):
        users, counts, seed = masks.draw(1, step, STEPS)
        assert counts == [len(users)]
        batch = masks.build(users, counts, seed)
        ends = batch.kept_start.tolist()
        assert ends[0] == 0
        assert ends[-1] == len(batch.kept)
        for n, user in enumerate(users):
            kept = set(batch.kept[ends[n] : ends[n + 1]].tolist())
            masked = set(batch.target[batch.target_start[n] : batch.target_start[n + 1]].tolist())
            assert kept
            assert masked
            assert not kept & masked
            assert kept | masked == truth[user]
        seen += users.tolist()
    assert sorted(seen) == [user for user, items in enumerate(truth) if len(items) > 1]
    again = masks.build(users, counts, seed)
    assert torch.equal(again.kept, batch.kept)
    assert torch.equal(again.has_id, batch.has_id)
    assert masks.draw(2, 0, STEPS)[0].tolist() != masks.draw(1, 0, STEPS)[0].tolist()


def test_at_most_so_many_interactions_of_a_user(parts, monkeypatch):
    graphs, _, _, content = parts
    monkeypatch.setattr(user_masks, "MAX_ITEMS", 3)
    masks = masks_of(graphs, content)
    users, counts, seed = masks.draw(1, 0, STEPS)
    batch = masks.build(users, counts, seed)
    count = batch.kept_start.diff() + batch.target_start.diff()
    assert count.tolist() == np.minimum(graphs.user_degree[users], 3).tolist()


def test_the_loss_is_that_of_its_definition(parts):
    graphs, network, tables, content = parts
    masked, masks = network.masked, masks_of(graphs, content)
    users, counts, seed = masks.draw(1, 0, STEPS)
    batch = masks.build(users, counts, seed)
    rows = torch.randn(graphs.items, tables.masked_item.width, generator=torch.Generator().manual_seed(1))
    loss = masked(batch, rows)
    expected = 0.0
    for member in range(MEMBERS):
        columns = slice(128 * member, 128 * (member + 1))
        ids = rows[:, columns] * batch.has_id[:, member, None]
        vectors = F.normalize(ids + content.weight.float() @ masked.content_map[:, columns], dim=1)
        for n in range(len(users)):
            own = batch.kept[batch.kept_start[n] : batch.kept_start[n + 1]]
            hidden = F.normalize(vectors[own].sum(0), dim=0) * 8
            log_p = torch.log_softmax(vectors @ hidden + rows[:, 128 * MEMBERS + member], 0)
            expected -= log_p[batch.target[batch.target_start[n] : batch.target_start[n + 1]]].sum() / MEMBERS
    torch.testing.assert_close(loss, expected / len(users), rtol=1e-4, atol=1e-4)


def test_sampled_items_estimate_the_loss_over_all(tmp_path, monkeypatch):
    catalog = small_catalog(tmp_path / "c", users=90, items=300)
    graphs, network, tables, content = parts_of(catalog)
    masked = network.masked
    rows = 0.5 * torch.randn(graphs.items, tables.masked_item.width, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(user_masks, "ID_DROP", 0.0)
    masks = masks_of(graphs, content)
    drawn = [masks.draw(1 + seed, 0, STEPS)[0][:12] for seed in range(40)]  # the expectation is over users, too
    whole = [masked(masks.build(users, [12], seed), rows).item() for seed, users in enumerate(drawn)]
    monkeypatch.setattr(user_masks, "FULL_SOFTMAX", 0)
    monkeypatch.setattr(user_masks, "NEGATIVES", 120)
    masks, sampled, uncorrected = masks_of(graphs, content), [], []
    for seed, users in enumerate(drawn):
        batch = masks.build(users, [12], seed)
        own = rows[torch.from_numpy(items_of(batch))]
        sampled.append(masked(batch, own).item())
        batch.log_inclusion = torch.zeros_like(batch.log_inclusion)
        uncorrected.append(masked(batch, own).item())
    error = np.std(np.subtract(sampled, whole)) / 40**0.5
    bias, bias_uncorrected = np.mean(sampled) - np.mean(whole), np.mean(uncorrected) - np.mean(whole)
    assert abs(bias) < 4 * error + 0.01 * np.mean(whole)  # the logarithm of an estimate is a little low
    assert bias_uncorrected < -10 * max(error, abs(bias))


def items_of(batch) -> np.ndarray:
    """Catalog indexes of a sampled batch's items."""
    return batch.item_lookup.outgoing[batch.item_lookup.position].numpy()


def gradients(comm: Communicator, uri: str, counts: list[int]) -> dict:
    """Loss of the global batch and all gradients, where the ranks share the users of one step."""
    graphs, network, tables, content = parts_of(Catalog(uri), comm)
    users = np.flatnonzero(graphs.user_degree > 1)[: sum(counts)]
    whole = masks_of(graphs, content).build(users, counts, 5)
    first = sum(counts[: comm.rank])
    own = slice(first, first + counts[comm.rank] + 1)
    kept, target = whole.kept_start[own], whole.target_start[own]
    batch = replace(
        whole,
        kept=whole.kept[kept[0] : kept[-1]],
        kept_start=kept - kept[0],
        target=whole.target[target[0] : target[-1]],
        target_start=target - target[0],
    )
    loss = network.masked(batch, tables.masked_item.lookup(batch.item_lookup))
    (comm.size * loss).backward()
    dense = {name: comm.all_reduce(p.grad.clone()) / comm.size for name, p in network.masked.named_parameters()}
    total = comm.all_reduce(loss.detach().clone())
    return {"parts": {"masked": total.item()}, "dense": dense, "tables": {"m": whole_gradient(tables.masked_item)}}


def test_ranks_give_the_loss_and_gradients_of_one(catalog):
    alone = run_ranks(gradients, 1, catalog.uri, [24])[0]
    assert all(gradient.abs().sum() > 0 for gradient in [*alone["dense"].values(), *alone["tables"].values()])
    for result in run_ranks(gradients, 3, catalog.uri, [15, 0, 9]):
        assert_same_step(result, alone)


def narrow(monkeypatch) -> None:
    """Content of 4 columns from each modality; those of the small catalog have 6 and 7."""
    for module in (masked_diffusion, masked_content_module):
        monkeypatch.setattr(module, "CONTENT_WIDTH", 4)


def test_content_is_projected_and_smoothed_over_neighbours(catalog, monkeypatch):
    narrow(monkeypatch)
    graphs, network, _, content = parts_of(catalog)
    hop, expected = graphs.item_item, []
    for table in load_features(network.modalities, catalog, Communicator()).values():
        rows = table.weight.double().numpy()
        units = rows - rows.mean(0)
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        left, values, _ = np.linalg.svd(units, full_matrices=False)
        expected.append(left[:, :4] * values[:4])
    assert list(network.masked.content_widths.values()) == [4, 4]
    smoothing = np.eye(graphs.items) + 0.3 * sp.csr_matrix((hop.weight, hop.indices, hop.indptr)).toarray()
    for first, part in zip((0, 4), expected, strict=True):
        found = content.weight[:, first : first + 4].double().numpy()
        np.testing.assert_allclose(found @ found.T, smoothing @ part @ part.T @ smoothing.T, atol=5e-3)


def test_a_checkpoint_keeps_the_projection(catalog, monkeypatch):
    narrow(monkeypatch)
    graphs, network, _, content = parts_of(catalog)
    for name, buffer in network.masked.named_buffers():
        buffer.mul_(-1 if "directions" in name else 1)  # as another machine may find them
    _, other, _, _ = parts_of(catalog)
    other.load(network.state_dict())
    features = load_features(network.modalities, catalog, Communicator())
    assert torch.equal(masked_content(other.masked, features, graphs, 9).weight, -content.weight)


def test_the_form_of_version_0_3_is_refused(parts):
    _, network, _, _ = parts
    with pytest.raises(InputError, match="the form of version"):
        network.load(network.state_dict() | {"masked.maps.0": torch.zeros(6, 256)})


def embedded(comm: Communicator, uri: str) -> dict:
    graphs, network, tables, content = parts_of(Catalog(uri), comm)
    out = embed_masked(network, tables, content, graphs, 9)
    return {"users": out.users.weight, "items": out.items.weight}


def test_ranks_embed_their_own_rows(catalog):
    alone = embedded(Communicator(), catalog.uri)
    together = run_ranks(embedded, 2, catalog.uri)
    for kind, rows in alone.items():
        torch.testing.assert_close(torch.cat([one[kind] for one in together]), rows, rtol=1e-5, atol=1e-6)


def fit_sampled(comm: Communicator, run: str, config) -> dict:
    """`fit` in a process of its own, with sampled items."""
    user_masks.FULL_SOFTMAX, user_masks.NEGATIVES = 0, 20
    return fit(comm, run, config)


@pytest.mark.parametrize("function", [fit, fit_sampled])
def test_two_ranks_train_it(catalog, tmp_path, function):
    config = small_config(catalog.uri, str(tmp_path), model={**MASKED, "propagation": "sampled"})
    results = run_ranks(function, 2, str(tmp_path / "r"), config)
    assert results[0]["test"] == results[1]["test"]
    assert results[0]["test"]["overall"]["recall@20"] > 0


@pytest.mark.parametrize("propagation", ["full", "sampled"])
def test_it_learns_to_rank(catalog, tmp_path, propagation, monkeypatch):
    if propagation == "sampled":
        monkeypatch.setattr(user_masks, "FULL_SOFTMAX", 0)
        monkeypatch.setattr(user_masks, "NEGATIVES", 20)
    model = {**MASKED, "propagation": propagation}
    config = small_config(catalog.uri, str(tmp_path), model=model, train={"epochs": 30})
    trainer = trainer_of(Communicator(), config, str(tmp_path / "r"))
    options, graphs = RankingOptions(), trainer.validator.graphs

    def ndcg(embeddings) -> float:
        truth = load_ground_truth(catalog, "test")
        return evaluate_on_items(*embeddings, graphs, truth, options, None)["ndcg@10"]

    trainer.fit()
    learned = embed_masked(trainer.network, trainer.tables, trainer.validator.content, graphs, 64)
    assert ndcg(learned) > 1.3 * ndcg(popularity(graphs, Communicator()))
    assert trainer.validator.scorer.state()["blend"].keys() >= {"masked", "members"}
