"""The content filter: a conditional diffusion model that keeps the part of an item's content that drives preference.

Forward process: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, a_t the running product of 1 - beta, beta linear (DDPM, Ho et
al. 2020; GTC, arXiv 2604.03014). A denoiser predicts eps from (x_t, t, condition). The filter is deterministic: it
starts at a fixed step from the clean content without fresh noise and follows DDIM (Song et al. 2021) to step 0, so the
network removes what it predicts to be noise under the condition, and the same catalog always gives the same result.
"""

import math

import torch
from torch import nn

BETA_START, BETA_END = 1e-4, 0.02  # of the linear noise schedule
HIDDEN = 128  # width of the denoiser's hidden layers
DDIM_STEPS = 1


class NoiseSchedule(nn.Module):
    """a_t for t = 0..steps; a_0 = 1. Buffers, float32 [steps + 1]."""

    def __init__(self, steps: int, beta_start: float = BETA_START, beta_end: float = BETA_END):
        super().__init__()
        beta = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        alpha = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])
        self.register_buffer("signal", alpha.sqrt().float(), persistent=False)
        self.register_buffer("noise", (1 - alpha).sqrt().float(), persistent=False)

    def diffuse(self, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """x_t for x0 [n, D], t int64 [n], eps [n, D]."""
        return self.signal[t, None] * x0 + self.noise[t, None] * eps

    def clean(self, xt: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """x0_hat = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t), the inverse of `diffuse` for the same eps."""
        return (xt - self.noise[t, None] * eps) / self.signal[t, None]


class Denoiser(nn.Module):
    """eps_hat = net(x_t, t, c): two hidden layers over content, sinusoidal timestep and condition.

    The last layer starts at zero, so that an untrained filter returns the content itself, up to scale.
    """

    def __init__(self, width: int, condition: int, hidden: int):
        super().__init__()
        self.width = width
        self.enter = nn.Linear(2 * width + condition, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.leave = nn.Linear(hidden, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, xt: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """xt [n, D], t int64 [n] or [1], condition [n, C] -> eps_hat [n, D]."""
        time = _sinusoid(t, self.width).expand(len(xt), -1)
        hidden = nn.functional.silu(self.enter(torch.cat([xt, time, condition], dim=1)))
        return self.leave(nn.functional.silu(self.middle(hidden))).float()


class ContentFilter(nn.Module):
    """One modality's denoiser with its loss and its deterministic filter.

    Args:
        schedule: shared by the modalities.
        width: D of the content; condition: width C of the condition.
        start_step: step at which the filter starts; ddim_steps: number of steps in which it reaches 0.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        width: int,
        condition: int,
        hidden: int = HIDDEN,
        start_step: int = 100,
        ddim_steps: int = DDIM_STEPS,
    ):
        super().__init__()
        self.schedule = schedule
        self.denoiser = Denoiser(width, condition, hidden)
        self.path = torch.linspace(start_step, 0, ddim_steps + 1).round().long().tolist()

    def loss(self, x0: torch.Tensor, condition: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """||eps - eps_hat||^2 / D for each row, [n]; x0 [n, D], condition [n, C], t int64 [n] in 1..T, eps [n, D]."""
        predicted = self.denoiser(self.schedule.diffuse(x0, t, eps), t, condition)
        return (predicted - eps).square().mean(dim=1)

    def forward(self, x0: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Filtered content x0_hat [n, D] of content x0 [n, D] under condition [n, C]."""
        x = self.schedule.signal[self.path[0]] * x0
        for step, next_step in zip(self.path[:-1], self.path[1:], strict=True):
            here, there = (torch.full((1,), t, device=x0.device) for t in (step, next_step))
            eps = self.denoiser(x, here, condition)
            clean = self.schedule.clean(x, here, eps)
            x = self.schedule.diffuse(clean, there, eps)
        return x


def _sinusoid(t: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoidal embedding of timesteps, [n] -> [n, width] (Vaswani et al. 2017)."""
    half = width // 2
    rate = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device) / max(half, 1))
    angle = t[:, None].float() * rate
    return nn.functional.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, width - 2 * half))
