"""Parts of an embedding whose scores are added: the trained members, the spectral part, and the content profiles.

Cold items have no interaction to be scored by: in all parts but the profiles they get what their warm neighbours have.
What they have in the end is chosen after all this (`cold.py`).

A user's scores of each part have a standard deviation of one over all items, so that weights compare. The weights of
the untrained parts are chosen once, before training, on the valid split; a part that does not help gets none. The
members' weight is chosen at every validation, as early on they are worth little, and kept with the checkpoint.

Two more are chosen with it. `NORM_DAMPING`: members' item rows are divided by their length to this power. The length is how
popular an item was in training. Alone, members need it; beside a spectral part that knows better which items are
central, what they add is the direction. `NEIGHBOR_SMOOTHING`: a user also gets the rows of the items one step of co-interaction
from its own (N C of `walk.py`, of rows less their mean), as the row of a user with one or two interactions had little
to be trained by. How much it is worth: docs/quality.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.hybrid.cold_start import WarmNeighbours
from gtc_dist.hybrid.content_profile import inverse_spread, item_moments
from gtc_dist.hybrid.coordinate_search import Embeddings, grid_neighbours
from gtc_dist.hybrid.graph_filter import CooccurrenceOperator

MEMBERS = "members"
NORM_DAMPING = "length"
NEIGHBOR_SMOOTHING = "walked"
# of the members; the last ones leave hardly anything of the others
MEMBER_STEPS = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0)
NORM_DAMPING_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEIGHBOR_SMOOTHING_STEPS = (0.0, 0.5, 1.0, 2.0, 4.0)  # beside a user's own row, both in their spread
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a content profile, beside a spectral part of one
START = {
    MEMBERS: 2.0,
    NORM_DAMPING: 1.0,
    NEIGHBOR_SMOOTHING: 2.0,
}  # where the first choice of them sets out; lower, it may end lower
ROUNDS = 3  # of a choice, at most
SEARCH_RADIUS = {NORM_DAMPING: 2, NEIGHBOR_SMOOTHING: 2}  # how many steps a choice looks up and down; one for others


class ScoreFusion:
    """Untrained parts and the weights of all.

    Args:
        parts: name -> (users, items); the first one is the measure of the others.
        profiles: names of those that are content profiles.
        neighbours: None: cold items are treated like others.
        walk: None: members are joined without walks.
    """

    def __init__(
        self,
        parts: dict[str, Embeddings],
        profiles: list[str],
        neighbours: WarmNeighbours | None,
        walk: CooccurrenceOperator | None = None,
    ):
        self.profiles, self.neighbours, self.walk = profiles, neighbours, walk
        self.parts = {
            name: unit_variance(part if name in profiles else self._filled(part)) for name, part in parts.items()
        }
        self.weights = dict.fromkeys([MEMBERS, *parts], 1.0) | {NORM_DAMPING: 0.0, NEIGHBOR_SMOOTHING: 0.0}

    def choose(self, worth: Callable[[Embeddings], float]) -> None:
        """Weights of the parts after the first, one after the other, by what the untrained scores alone are worth."""
        first, *others = self.parts
        self.weights = {MEMBERS: 0.0, first: 1.0} | dict.fromkeys(others, 0.0)
        for name in others:
            tried = {step: worth(self._joined(None, {**self.weights, name: step})) for step in STEPS}
            self.weights[name] = max(tried, key=lambda step: (tried[step], -step))
        self.weights |= START

    def choose_members(self, members: Embeddings, worth: Callable[[Embeddings], float]) -> None:
        """The members' weight, length and walks beside the others, and what they change for the profiles: from what was
        chosen before, up or down as long as that helps. A collective."""
        known: dict[tuple, float] = {}
        forms: dict[float, NetworkScores] = {}

        def value(weights: dict[str, float]) -> float:
            length, key = weights[NORM_DAMPING], tuple(weights.items())
            if key not in known:
                if length not in forms:
                    forms.clear()  # one at a time: they are as large as the members
                    forms[length] = self._form(members, length)
                known[key] = worth(self._joined(forms[length].pair(weights[NEIGHBOR_SMOOTHING]), weights))
            return known[key]

        steps = {MEMBERS: MEMBER_STEPS, NORM_DAMPING: NORM_DAMPING_STEPS} | (
            {NEIGHBOR_SMOOTHING: NEIGHBOR_SMOOTHING_STEPS} if self.walk else {}
        )
        steps |= dict.fromkeys(self.profiles, STEPS)
        for _ in range(ROUNDS):
            before = dict(self.weights)
            for name, values in steps.items():
                while (
                    best := max(grid_neighbours(self.weights, name, values, SEARCH_RADIUS.get(name, 1)), key=value)
                ) != self.weights:
                    self.weights = best
            if self.weights == before:
                break

    def joined(self, members: Embeddings) -> Embeddings:
        """One pair of tables with the weighted sum of all scores. A collective."""
        form = self._form(members, self.weights[NORM_DAMPING])
        return self._joined(form.pair(self.weights[NEIGHBOR_SMOOTHING]), self.weights)

    def profile_columns(self, width: int) -> dict[str, slice]:
        """Where the items' profiles stand in joined tables of this width; those without a weight do not."""
        widths = {name: part[1].width for name, part in self.parts.items() if self.weights[name]}
        at, columns = width - sum(widths.values()), {}
        for name, size in widths.items():
            if name in self.profiles:
                columns[name] = slice(at, at + size)
            at += size
        return columns

    def _form(self, members: Embeddings, power: float) -> "NetworkScores":
        """The trained part with the length of items taken out to this power. A collective."""
        users, items = members
        rows = items.weight.float()
        rows = rows * rows.norm(dim=1, keepdim=True).clamp(min=1e-12) ** -power  # rows of zeros stay what they are
        items = self._filled((users, items.holding(rows)))[1]
        moments = item_moments(items)
        own = users.weight.float()
        walked = None
        if self.walk is not None:
            walked = self.walk.to_users(self.walk(rows - self.walk.mean(rows)))
            walked = users.holding(walked * inverse_spread(walked, moments))
        return NetworkScores(users.holding(own * inverse_spread(own, moments)), walked, items)

    def _filled(self, part: Embeddings) -> Embeddings:
        return part if self.neighbours is None else (part[0], self.neighbours.filled(part[1]))

    def _joined(self, members: Embeddings | None, weights: dict[str, float]) -> Embeddings:
        pairs = ({} if members is None else {MEMBERS: members}) | self.parts
        pairs = {name: part for name, part in pairs.items() if weights[name]}
        users = torch.cat([part[0].weight * weights[name] for name, part in pairs.items()], dim=1)
        items = torch.cat([part[1].weight for part in pairs.values()], dim=1)
        first = next(iter(pairs.values()))
        return first[0].holding(users), first[1].holding(items)


@dataclass(frozen=True)
class NetworkScores:
    """Members of one length: what users learned and what walks bring them, in units of their spread, and items."""

    users: ShardedTable
    walked: ShardedTable | None
    items: ShardedTable

    def pair(self, weight: float) -> Embeddings:
        """Both added, with this weight for the walks. A collective."""
        rows = self.users.weight if self.walked is None else self.users.weight + weight * self.walked.weight
        return unit_variance((self.users.holding(rows), self.items))


def unit_variance(part: Embeddings) -> Embeddings:
    """The part with each user's scores in units of their standard deviation over all items. A collective."""
    users, items = part
    spread = inverse_spread(users.weight, item_moments(items))
    return users.holding(users.weight.float() * spread), items.holding(items.weight.float())
