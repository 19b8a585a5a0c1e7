"""Fusion weights by maximum likelihood: derivatives, the maximum, and ranks that share the users."""

import pytest
import torch
from ranks import run_ranks

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.hybrid import conditional_logit
from gtc_dist.hybrid.conditional_logit import Candidates, _likelihood, fit_weights, model_scores, weight_names

SCORERS = ["a", "b"]
N = len(weight_names(SCORERS))
TRUE = {
    "a": 1.0,
    "a/activity": 0.4,
    "a/taste": -0.3,
    "a/popularity": -0.5,
    "b": 0.2,
    "b/mean": 0.8,
    "popularity": 0.7,
    "popularity_squared/taste": 0.2,
}


def candidates(users: int = 50, items: int = 30, seed: int = 0, weights: dict[str, float] | None = None) -> Candidates:
    """Random scores; a hit of each user, at random or drawn from the model with these weights."""
    rng = torch.Generator().manual_seed(seed)
    scores, means = ({n: torch.randn(users, items, generator=rng) for n in SCORERS} for _ in range(2))
    features = torch.cat([torch.ones(users, 1), torch.randn(users, 2, generator=rng)], dim=1)
    popularity = torch.randn(users, items, generator=rng)
    listed = torch.rand(users, items, generator=rng) < 0.9
    made = Candidates(scores, means, features, popularity, listed, torch.zeros_like(listed))
    vector = torch.tensor([(weights or {}).get(name, 0.0) for name in weight_names(SCORERS)])
    share = model_scores(made, vector)[0].masked_fill(~listed, float("-inf")).softmax(1)
    made.hit.scatter_(1, torch.multinomial(share, 1, generator=rng), True)
    return made


def log_likelihood(made: Candidates, weights: torch.Tensor) -> torch.Tensor:
    """From the formula in the module's text, differentiable."""
    total, z = torch.zeros_like(made.popularity, dtype=torch.float64), made.popularity.double()
    f = made.user_features.double()
    for at, name in enumerate(SCORERS):
        own, mean, exponent = weights[8 * at : 8 * at + 8].split([3, 3, 2])
        part = made.scores[name].double() * (f @ own)[:, None] + made.mean_scores[name].double() * (f @ mean)[:, None]
        total = total + torch.exp(exponent[0] * z + exponent[1] * z**2 / 3) * part
    for at, power in enumerate((z, z**2, z**3 / 3)):
        total = total + power * (f @ weights[16 + 3 * at : 19 + 3 * at])[:, None]
    return total.masked_fill(~made.listed, float("-inf")).log_softmax(1)[made.hit].sum()


def test_likelihood_and_gradient_are_those_of_the_formula(monkeypatch):
    monkeypatch.setattr(conditional_logit, "BLOCK_VALUES", 5000)  # a few users at once
    made = candidates(users=200)
    weights = (torch.randn(N, generator=torch.Generator().manual_seed(1)) / 6).double().requires_grad_()
    found = _likelihood(made, weights.detach())
    expected = -log_likelihood(made, weights)
    torch.testing.assert_close(found[0], expected.detach(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found[1 : N + 1], torch.autograd.grad(expected, weights)[0], rtol=1e-3, atol=1e-3)
    curvature = found[N + 1 :].view(N, N)
    torch.testing.assert_close(curvature, curvature.T, rtol=1e-4, atol=1e-3)
    assert torch.linalg.eigvalsh((curvature + curvature.T) / 2).min() > 0


def test_the_fit_is_the_maximum_and_finds_the_weights_that_made_the_hits():
    made = candidates(users=8000, weights=TRUE)
    found = fit_weights(made, {"a": 0.5, "b": 0.5}, Communicator(), penalty=1.0)
    assert list(found) == weight_names(SCORERS)
    for name, weight in found.items():
        assert weight == pytest.approx(TRUE.get(name, 0.0), abs=0.12), name
    vector = torch.tensor(list(found.values()), dtype=torch.float64, requires_grad=True)
    start = torch.tensor([0.5 if name in SCORERS else 0.0 for name in found])
    penalised = log_likelihood(made, vector) - ((vector - start) ** 2).sum() / 2
    assert torch.autograd.grad(penalised, vector)[0].abs().max() < 20  # of 8000 hits


def test_a_penalty_draws_towards_the_initial_weights():
    made = candidates(weights=TRUE)
    found = fit_weights(made, {"a": 3.0, "b": 0.25}, Communicator(), penalty=1e7)
    assert found["a"] == pytest.approx(3, abs=1e-3)
    assert found["b"] == pytest.approx(0.25, abs=1e-3)
    assert found["a/popularity"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("listed", [True, False])
def test_without_a_hit_the_initial_weights_remain(listed):
    made = candidates()
    made.hit.zero_()
    made.listed.fill_(listed)
    found = fit_weights(made, {"a": 1.0}, Communicator())
    assert found == {name: float(name == "a") for name in weight_names(SCORERS)}


def fit_part(comm: Communicator) -> dict[str, float]:
    """The weights from some of the users on each rank; the last rank has none."""
    made = candidates(users=200, weights=TRUE)
    parts = {1: [slice(0, 200)], 3: [slice(0, 30), slice(30, 200), slice(200, 200)]}[comm.size]
    return fit_weights(made.users(parts[comm.rank]), {"a": 0.5, "b": 0.5}, comm)


def test_ranks_fit_the_weights_of_all_users():
    alone = run_ranks(fit_part, 1)[0]
    together = run_ranks(fit_part, 3)
    assert together[0] == together[1] == together[2]
    assert together[0] == pytest.approx(alone, abs=1e-4)


def test_a_scorer_of_another_scale_gets_the_weight_for_it():
    made = candidates(users=2000, weights={"a": 1.0})
    made.scores["a"] = made.scores["a"] * 4
    found = fit_weights(made, {"a": 1.0, "b": 1.0}, Communicator(), penalty=0.1)
    assert found["a"] == pytest.approx(0.25, abs=0.03)
    assert abs(found["b"]) < 0.1


def test_a_start_near_the_result_gives_the_same():
    made = candidates(users=2000, weights=TRUE)
    alone = fit_weights(made, {"a": 0.5}, Communicator())
    again = fit_weights(made, {"a": 0.5}, Communicator(), start={name: w + 0.05 for name, w in alone.items()})
    assert again == pytest.approx(alone, abs=2e-2)
