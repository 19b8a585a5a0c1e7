"""Greedy coordinate search on a grid: one weight at a time moves to a better value, as long as there is one."""

from collections.abc import Callable


def coordinate_search(
    start: dict[str, float],
    grid: tuple[float, ...],
    radius: int,
    rounds: int,
    value: Callable[[dict[str, float]], float],
) -> dict[str, float]:
    """Weights of a sum, of which only the ratios matter: the largest is 1. Each round moves every weight once, to its
    best value within `radius` grid steps or to 0; the search ends with a round that moves none.

    Args:
        grid: ascending from 0 to 1.
        value: to be maximised; -inf where all weights are 0.
    """
    weights = _largest_one(start)
    for _ in range(rounds):
        before = weights
        for name in weights:
            weights = max([*grid_neighbours(weights, name, grid, radius), {**weights, name: 0.0}], key=value)
        weights = _largest_one(weights)
        if weights == before:
            break
    return weights


def grid_neighbours(
    weights: dict[str, float], name: str, grid: tuple[float, ...], radius: int = 1
) -> list[dict[str, float]]:
    """Candidates: the current weights first (`max` keeps them on a tie), then each grid value of `name` within `radius`
    steps of the current one, which need not be on the grid."""
    at = nearest_step(grid, weights[name])
    around = grid[max(at - radius, 0) : at + radius + 1]
    return [weights, *({**weights, name: value} for value in around if value != weights[name])]


def _largest_one(weights: dict[str, float]) -> dict[str, float]:
    largest = max(weights.values())
    return {name: weight / largest for name, weight in weights.items()}


def nearest_step(grid: tuple[float, ...], value: float) -> int:
    """Index of the grid value that is nearest to `value`."""
    return min(range(len(grid)), key=lambda n: abs(grid[n] - value))
