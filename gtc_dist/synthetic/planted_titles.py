"""Titles of generated items, so that a reader of a list sees what its items have in common."""

import numpy as np

# a word for each factor and sign; further factors share them
ADJECTIVES = (
    "amber brisk calm dusty early faded gentle hollow icy jolly keen light mellow narrow open pale quiet rapid silver "
    "tall urban velvet warm young bitter crimson distant electric floral golden hidden misty"
)
NOUNS = (
    "anchor bridge candle drum ember forest garden harbour island journey kite lantern meadow needle orchard piano "
    "quarry river station tower valley window attic beacon cliff desert engine feather glacier hammer mirror sail"
)


def planted_titles(factors: np.ndarray, first: int) -> list[str]:
    """Titles such as "Velvet harbour 01234": words for an item's strongest and second strongest factor.

    Args:
        factors: float32 [n, K].
        first: index of the first item; the number at the end is the item's.
    """
    adjectives, nouns = ADJECTIVES.split(), NOUNS.split()
    order = np.argsort(-np.abs(factors), axis=1, kind="stable")[:, :2]
    sign = np.take_along_axis(factors, order, axis=1) > 0
    word = (2 * order + sign) % len(adjectives)
    pairs = zip(word[:, 0].tolist(), word[:, -1].tolist(), strict=True)  # of one factor, both are its own
    return [f"{adjectives[a].capitalize()} {nouns[b]} {number:05d}" for number, (a, b) in enumerate(pairs, first)]
