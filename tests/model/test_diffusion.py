"""Identities of the diffusion filter."""

import pytest
import torch

from gtc_dist.model.diffusion import ContentFilter, Denoiser, NoiseSchedule

SCHEDULE = NoiseSchedule(600, 1e-4, 0.02)


def test_schedule_is_the_running_product_of_one_minus_beta():
    beta = torch.linspace(1e-4, 0.02, 600, dtype=torch.float64)
    product = 1.0
    for t in range(1, 601):
        product *= 1 - float(beta[t - 1])
        assert float(SCHEDULE.signal[t]) ** 2 == pytest.approx(product, rel=1e-5)
    assert float(SCHEDULE.signal[0]) == 1
    torch.testing.assert_close(SCHEDULE.signal**2 + SCHEDULE.noise**2, torch.ones(601))


def test_clean_inverts_diffuse():
    t = torch.tensor([1, 17, 300, 600])
    x0, eps = torch.randn(4, 8), torch.randn(4, 8)
    torch.testing.assert_close(SCHEDULE.clean(SCHEDULE.diffuse(x0, t, eps), t, eps), x0, rtol=1e-3, atol=1e-4)


def test_diffused_content_has_the_right_moments():
    torch.manual_seed(0)
    x0, t = torch.full((20000, 2), 3.0), torch.full((20000,), 250)
    xt = SCHEDULE.diffuse(x0, t, torch.randn_like(x0))
    assert float(xt.mean()) == pytest.approx(3 * float(SCHEDULE.signal[250]), abs=0.02)
    assert float(xt.std()) == pytest.approx(float(SCHEDULE.noise[250]), abs=0.02)


class Oracle(torch.nn.Module):
    """Knows that the data is a single point: the exact noise follows."""

    def __init__(self, point):
        super().__init__()
        self.point = point

    def forward(self, xt, t, condition):
        return (xt - SCHEDULE.signal[t, None] * self.point) / SCHEDULE.noise[t, None]


@pytest.mark.parametrize("ddim_steps", [1, 4])
def test_with_an_exact_denoiser_the_filter_lands_on_the_data_and_the_loss_is_zero(ddim_steps):
    point = torch.randn(8)
    content = ContentFilter(SCHEDULE, 8, 3, 16, start_step=200, ddim_steps=ddim_steps)
    content.denoiser = Oracle(point)
    x0, condition = torch.randn(5, 8), torch.zeros(5, 3)
    torch.testing.assert_close(content(x0, condition), point.expand(5, 8), rtol=1e-3, atol=1e-3)
    loss = content.loss(point.expand(5, 8), condition, torch.full((5,), 100), torch.randn(5, 8))
    assert float(loss.max()) < 1e-6


def test_an_untrained_filter_changes_nothing_and_is_deterministic():
    content = ContentFilter(SCHEDULE, 8, 3, 16, start_step=100, ddim_steps=3)
    x0, condition = torch.randn(5, 8), torch.randn(5, 3)
    torch.testing.assert_close(content(x0, condition), x0, rtol=1e-4, atol=1e-4)
    torch.nn.init.normal_(content.denoiser.leave.weight)
    assert torch.equal(content(x0, condition), content(x0, condition))
    assert not torch.allclose(content(x0, condition), x0, atol=1e-2)


def test_the_loss_is_the_mean_square_of_the_noise_error():
    denoiser = Denoiser(8, 3, 16)
    torch.nn.init.normal_(denoiser.leave.weight)
    content = ContentFilter(SCHEDULE, 8, 3, 16, 100, 1)
    content.denoiser = denoiser
    x0, condition, eps, t = torch.randn(5, 8), torch.randn(5, 3), torch.randn(5, 8), torch.tensor([1, 5, 50, 200, 600])
    loss = content.loss(x0, condition, t, eps)
    for n in range(5):
        a = SCHEDULE.signal[t[n]] ** 2
        xt = a.sqrt() * x0[n] + (1 - a).sqrt() * eps[n]
        predicted = denoiser(xt[None], t[n : n + 1], condition[n : n + 1])[0]
        assert float(loss[n]) == pytest.approx(float(((predicted - eps[n]) ** 2).mean()), rel=1e-4)


def test_training_the_denoiser_lowers_its_loss_and_the_condition_matters():
    torch.manual_seed(0)
    content = ContentFilter(SCHEDULE, 4, 2, 32, 100, 1)
    label = torch.randint(0, 2, (256,))
    x0 = torch.where(label[:, None] == 1, 2.0, -2.0) + 0.1 * torch.randn(256, 4)
    condition = torch.nn.functional.one_hot(label, 2).float()
    optimizer = torch.optim.Adam(content.parameters(), lr=1e-2)

    def loss(condition):
        generator = torch.Generator().manual_seed(1)
        t = torch.randint(1, 601, (256,), generator=generator)
        return content.loss(x0, condition, t, torch.randn(256, 4, generator=generator)).mean()

    before = float(loss(condition).detach())
    for _ in range(300):
        optimizer.zero_grad()
        t = torch.randint(1, 601, (256,))
        content.loss(x0, condition, t, torch.randn(256, 4)).mean().backward()
        optimizer.step()
    after = float(loss(condition).detach())
    assert after < 0.5 * before
    assert float(loss(condition.flip(1)).detach()) > 1.5 * after
