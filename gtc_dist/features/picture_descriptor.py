"""Built-in picture encoder: a fixed descriptor of colours, edges and layout, which needs no model.

A picture is scaled to SIDE x SIDE pixels. The vector has its histogram of colours (hue, saturation, value), a histogram
of the directions of edges in each of GRID x GRID cells (as in HOG, Dalal and Triggs 2005), and a thumbnail. It tells
colours, shapes and patterns, not what a picture shows; a pretrained network does (`--encoder module:callable`).
"""

import numpy as np
from PIL import Image

SIDE, GRID, THUMBNAIL = 64, 4, 8
COLOURS = (12, 3, 4)  # bins of hue, saturation and value
EDGE_DIRECTIONS = 8  # bins of an edge's direction, without its sign


def describe_pictures(pictures: list[Image.Image]) -> np.ndarray:
    """Vectors float32 [n, 144 + 128 + 192] of RGB pictures."""
    return np.stack([_describe(picture) for picture in pictures])


def _describe(picture: Image.Image) -> np.ndarray:
    small = picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    hsv = np.asarray(small.convert("HSV"), np.float32).reshape(-1, 3) / 256
    bins = (hsv * COLOURS).astype(np.int64)
    colour = np.bincount(np.ravel_multi_index(bins.T, COLOURS), minlength=int(np.prod(COLOURS))) / len(bins)
    grey = np.asarray(small.convert("L"), np.float32) / 255
    down, right = np.gradient(grey)
    strength = np.hypot(down, right)
    direction = (np.arctan2(down, right) % np.pi / np.pi * EDGE_DIRECTIONS).astype(np.int64) % EDGE_DIRECTIONS
    cell = np.arange(SIDE) * GRID // SIDE
    place = (cell[:, None] * GRID + cell[None, :]) * EDGE_DIRECTIONS + direction
    edges = np.bincount(place.ravel(), strength.ravel(), minlength=GRID * GRID * EDGE_DIRECTIONS)
    edges = edges / max(float(np.linalg.norm(edges)), 1e-6)
    thumbnail = np.asarray(picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.float32).ravel() / 255
    return np.concatenate([np.sqrt(colour), edges, thumbnail - thumbnail.mean()]).astype(np.float32)
