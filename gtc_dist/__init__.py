"""GTC at scale: distributed training of a multi-modal recommender (arXiv 2604.03014)."""

__version__ = "0.9.0"
