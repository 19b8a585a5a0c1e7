"""Encoders by name, and what a task does with them.

ngrams             texts: hashed n-grams and truncated SVD, fitted to the texts (text_ngrams.py)
descriptor         pictures: colours, edges and layout (picture_descriptor.py)
FAMILY:MODEL       a pretrained network of an optional package, such as sentence-transformers:FOLDER (pretrained.py)
module:callable    a function from a list of texts, or of RGB pictures (PIL), to an array [n, d]; or a class, which
                   each process instantiates once without arguments and then calls in the same way
"""

import functools
import hashlib
import importlib
import inspect
import io
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from gtc_dist.data import storage
from gtc_dist.errors import InputError
from gtc_dist.features.picture_descriptor import describe_pictures
from gtc_dist.features.pretrained import (
    FAMILIES,
    check_pretrained,
    is_pretrained,
    load_pretrained,
    pretrained_digest,
)
from gtc_dist.features.text_ngrams import NgramEncoder

Encoder = Callable[[list], np.ndarray]
BUILT_IN = {"text": "ngrams", "picture": "descriptor"}
FILE = "_encoder.npz"  # of a fitted encoder, in the output folder
READERS = 8  # threads of a task that read pictures


def check_encoder(name: str, kind: str) -> str:
    """The name, with absolute paths. Raises InputError for an encoder that does not exist, does not take this kind of
    content, or lacks its package or weights."""
    if is_pretrained(name):
        return check_pretrained(name, kind)
    if name in BUILT_IN.values():
        if BUILT_IN[kind] != name:
            raise InputError(f"the encoder {name} does not take {kind}s; use {BUILT_IN[kind]} or module:callable")
    else:
        _import(name)
    return name


@functools.cache
def make_encoder(name: str, folder: str, search: str | None, digest: str, gpu: bool) -> Encoder:
    """The encoder, made once in a process.

    Args:
        folder: URI of the output, or of that of which the encoder was fitted.
        search: folder in which to look for the module, too.
        digest: of the content and the encoder: another fit in the same folder is another encoder.
        gpu: a pretrained network runs on the process's GPU.
    """
    if search is not None and search not in sys.path:
        sys.path.append(search)
    if name == "ngrams":
        return NgramEncoder.load(storage.join(folder, FILE))
    if name == "descriptor":
        return describe_pictures
    if is_pretrained(name):
        return load_pretrained(name, gpu)
    found = _import(name)
    return found() if inspect.isclass(found) else found


def module_digest(name: str) -> str:
    """SHA-256 of the file that an encoder is written in, without what it imports; of a pretrained network, of the
    sizes and times of its files; empty for built-in ones."""
    if is_pretrained(name):
        return pretrained_digest(name)
    if name in BUILT_IN.values():
        return ""
    file = getattr(importlib.import_module(name.partition(":")[0]), "__file__", None)
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def search_path(name: str) -> str | None:
    """Folder that the encoder's module was found in, for tasks whose search path lacks it; None for other kinds."""
    if name in BUILT_IN.values() or is_pretrained(name):
        return None
    top = name.partition(":")[0].partition(".")[0]
    file = getattr(importlib.import_module(top), "__file__", None)
    if file is None:
        return None
    path = Path(file).resolve()
    return str(path.parent.parent if path.name == "__init__.py" else path.parent)


def _import(name: str) -> Callable:
    module, separator, attribute = name.partition(":")
    if not separator or not module or not attribute:
        known = ", ".join([*BUILT_IN.values(), *(f"{family}:MODEL" for family in FAMILIES)])
        raise InputError(f"unknown encoder {name!r}; use {known} or module:callable")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"the encoder {name} cannot be imported: {error}") from error
    if not callable(found):
        raise InputError(f"the encoder {name} is not callable")
    return found


def encode_batch(encoder: Encoder, name: str, content: list) -> np.ndarray:
    """Vectors float32 [n, d]. Raises InputError where the encoder fails or returns something else."""
    try:
        vectors = np.asarray(encoder(content), np.float32)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the encoder {name} failed: {type(error).__name__}: {error}") from error
    if vectors.ndim != 2 or len(vectors) != len(content) or not vectors.shape[1]:
        found, wanted = list(vectors.shape), f"[{len(content)}, d]"
        raise InputError(f"the encoder {name} returned an array {found} for {len(content)} items; expected {wanted}")
    if not np.isfinite(vectors).all():
        raise InputError(f"the encoder {name} returned a value that is not finite")
    return vectors


def load_pictures(pictures: list, side: int | None) -> tuple[list[Image.Image], list[int], list[str]]:
    """Read pictures from URIs or bytes, as RGB.

    Args:
        side: a JPEG may be read smaller, if it stays larger than this; None: as it is.

    Returns:
        The pictures that could be read, their positions in the list, and what was wrong with the others.

    Raises:
        Unreachable, InputError: the storage cannot be read; a file that is missing is no such error.
    """
    with ThreadPoolExecutor(READERS) as pool:
        read = list(pool.map(functools.partial(_load_picture, side=side), pictures))
    good = [position for position, (picture, _) in enumerate(read) if picture is not None]
    return [read[position][0] for position in good], good, [problem for picture, problem in read if picture is None]


def _load_picture(picture: str | bytes, side: int | None) -> tuple[Image.Image | None, str]:
    named = picture if isinstance(picture, str) else f"{len(picture)} bytes"
    try:
        data = storage.read_bytes(picture) if isinstance(picture, str) else picture
    except (IsADirectoryError, FileNotFoundError):
        return None, f"{named} does not exist"
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None, f"{named} does not exist"
        raise
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if side is not None:
                opened.draft("RGB", (side, side))
            return opened.convert("RGB"), ""
    except Exception:  # Pillow raises errors of many types for damaged files
        return None, f"{named} is not a picture that can be read"
