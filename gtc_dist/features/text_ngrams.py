"""Built-in text encoder: hashed n-grams of words and characters, weighted by TF-IDF, on their principal directions.

It needs no model and no download, and knows the words of the catalog alone (latent semantic analysis, Deerwester et
al. 1990). Characters inside words find what is written in several ways.
"""

import io

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from gtc_dist.data import storage
from gtc_dist.errors import InputError

HASHES = 1 << 16  # of words and of characters, each
MAX_FITTED = 200_000  # texts that weights and directions are fitted to
HASHERS = [
    HashingVectorizer(analyzer="word", ngram_range=(1, 2), n_features=HASHES, alternate_sign=False, norm=None),
    HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=HASHES, alternate_sign=False, norm=None),
]


class NgramEncoder:
    """Texts to vectors.

    Args:
        idf: float32 [2, HASHES], weights of the n-grams of words and of characters.
        directions: float32 [2 * HASHES, width].
    """

    def __init__(self, idf: np.ndarray, directions: np.ndarray):
        self.idf, self.directions = idf, directions

    @staticmethod
    def fit(texts: list[str], width: int, seed: int = 0) -> "NgramEncoder":
        """Fit weights and directions to texts, at most `MAX_FITTED` of them, with fewer columns for fewer texts."""
        if len(texts) > MAX_FITTED:
            chosen = np.random.default_rng(seed).choice(len(texts), MAX_FITTED, replace=False)
            texts = [texts[row] for row in np.sort(chosen)]
        counted = [hasher.transform(texts) for hasher in HASHERS]
        idf = np.stack([TfidfTransformer().fit(each).idf_ for each in counted]).astype(np.float32)
        weighted = _weighted(counted, idf)
        used = np.unique(weighted.indices)
        width = min(width, len(texts) - 1, len(used) - 1)
        if width < 1:
            raise InputError(f"{len(texts)} texts with {len(used)} different n-grams are too few to fit an encoder to")
        directions = np.zeros((2 * HASHES, width), np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):  # its shares of the variance, of texts that are all alike
            directions[used] = TruncatedSVD(width, random_state=seed).fit(weighted[:, used]).components_.T
        return NgramEncoder(idf, directions)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Vectors float32 [n, width]."""
        return np.asarray(_weighted([hasher.transform(texts) for hasher in HASHERS], self.idf) @ self.directions)

    def save(self, uri: str) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, idf=self.idf, directions=self.directions)
        storage.write_bytes(uri, buffer.getbuffer())

    @staticmethod
    def load(uri: str) -> "NgramEncoder":
        with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as file:
            return NgramEncoder(file["idf"], file["directions"])


def _weighted(counted: list[sp.csr_array], idf: np.ndarray) -> sp.csr_array:
    """TF-IDF of words and characters side by side, each with rows of length one: float32 [n, 2 * HASHES]."""
    parts = []
    for counts, weights in zip(counted, idf, strict=True):
        part = sp.csr_array(counts, dtype=np.float32)
        part.data = (1 + np.log(part.data)) * weights[part.indices]
        norm = np.sqrt(np.asarray(part.multiply(part).sum(axis=1)).ravel())
        parts.append(sp.diags_array((1 / np.maximum(norm, 1e-12)).astype(np.float32)) @ part)
    return sp.hstack(parts, format="csr", dtype=np.float32)
