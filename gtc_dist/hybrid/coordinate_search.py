"""Weights that are found by moving one of them at a time, as long as that helps."""

from gtc_dist.distributed.sharded_table import ShardedTable

Embeddings = tuple[ShardedTable, ShardedTable]  # embeddings of users and items


def grid_neighbours(
    weights: dict[str, float], name: str, steps: tuple[float, ...], reach: int = 1
) -> list[dict[str, float]]:
    """The weights themselves, which win where others are worth as much, and those with one of them moved by up to
    `reach` steps; from a weight that is no step, to those around it too."""
    at = nearest_step(steps, weights[name])
    around = steps[max(at - reach, 0) : at + reach + 1]
    return [weights, *({**weights, name: step} for step in around if step != weights[name])]


def nearest_step(steps: tuple[float, ...], value: float) -> int:
    """Place of the step that is nearest to a value."""
    return min(range(len(steps)), key=lambda n: abs(steps[n] - value))
