"""Greedy coordinate search on a grid: one weight at a time moves to a better value, as long as there is one."""


def grid_neighbours(
    weights: dict[str, float], name: str, grid: tuple[float, ...], radius: int = 1
) -> list[dict[str, float]]:
    """Candidates: the current weights first (`max` keeps them on a tie), then each grid value of `name` within `radius`
    steps of the current one, which need not be on the grid."""
    at = nearest_step(grid, weights[name])
    around = grid[max(at - radius, 0) : at + radius + 1]
    return [weights, *({**weights, name: value} for value in around if value != weights[name])]


def nearest_step(grid: tuple[float, ...], value: float) -> int:
    """Index of the grid value that is nearest to `value`."""
    return min(range(len(grid)), key=lambda n: abs(grid[n] - value))
