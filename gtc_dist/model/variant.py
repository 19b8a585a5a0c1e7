"""The two networks of `model.variant`, as the parts that they are made of.

Which one ranks better depends on the catalog (docs/model.md): `paper` where the content itself tells tastes apart,
`gated` where interactions do. The parts stay separate in the code, so that an experiment can combine them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """Parts of the network.

    gated_content: a content view is the id embedding, gated by the filtered content (behaviour-guided gating, MGCN, Yu
        et al., ACM MM 2023), and items take their neighbours' content view before the user-item convolution; False: it
        is the filtered content itself. Needs unit_rows False, since a gate acts on norms.
    unit_rows: rows are L2-normalised before they enter the graph; False: their norms are learned from init_std on, so
        that a user or an item with few interactions stays near the mean.
    sum_views: the views that leave the graph are summed into the embedding; False: concatenated.
    view_attention: views are weighted by a softmax over how well each agrees with the others; False: equally.
    correlates_outputs: total correlation of the views that leave the graph, of users and of items; False: of the items'
        views that enter it.
    additive_critic: critic of the total correlation: mean over pairs of views; False: the product of all views.
    init_std: standard deviation of the initial values of the user and item tables.
    """

    gated_content: bool
    unit_rows: bool
    sum_views: bool
    view_attention: bool
    correlates_outputs: bool
    additive_critic: bool
    init_std: float


PAPER = Variant(
    gated_content=False,
    unit_rows=True,
    sum_views=False,
    view_attention=True,
    correlates_outputs=False,
    additive_critic=False,
    init_std=0.1,
)
GATED = Variant(
    gated_content=True,
    unit_rows=False,
    sum_views=True,
    view_attention=False,
    correlates_outputs=True,
    additive_critic=True,
    init_std=0.01,
)
VARIANTS = {"paper": PAPER, "gated": GATED}
