"""Vectors in a `.pt` file of torch.save: a tensor [n, width] whose row number is the id, a dict of `ids` and `vectors`,
or a dict id -> vector. Loaded with weights_only=True, which runs no code of the file, and mapped into memory.

torch is imported only where such a file is read.
"""

import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from gtc_dist.config_data import ModalityConfig
from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError
from gtc_dist.prepare.vector_formats.feature_chunk import FeatureChunk, FeatureHead, check_matrix, rows_at_once
from gtc_dist.raw import ids as id_columns

EXPECTED = "save a tensor [rows, width], a dict of `ids` and `vectors`, or a dict id -> vector with torch.save"


def inspect_pt(uri: str, modality: ModalityConfig) -> FeatureHead:
    """Read the ids, and check the shapes. Raises InputError: a broken file, or one that holds something else."""
    import torch

    ids, vectors = _contents(uri)
    if isinstance(vectors, torch.Tensor):
        rows, width = check_matrix(uri, tuple(vectors.shape), vectors.dtype, _has_numbers(vectors))
        types = {vectors.dtype}
    else:
        rows, width = len(vectors), len(vectors[0]) if vectors and vectors[0] is not None else None
        for item, vector in zip(ids, vectors, strict=True):
            if vector is None:
                raise InputError(f"{uri}: the value of {item!r} is not a vector of numbers; {EXPECTED}")
            if len(vector) != width:
                raise InputError(
                    f"{uri}: the vector of item {item!r} has {len(vector)} values, but others have {width}"
                )
        types = {vector.dtype for vector in vectors}
    ids = None if ids is None else _id_array(uri, ids)
    if ids is not None and len(ids) != rows:
        raise InputError(f"{uri} has {len(ids)} ids, but {rows} vectors")
    return FeatureHead(rows, ids, width or None, types == {torch.float16})


def read_pt(chunk: FeatureChunk) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of a whole file."""
    import torch

    _, vectors = _contents(chunk.uri)
    step = rows_at_once(chunk.width, 4)
    for start in range(0, len(vectors), step):
        block = vectors[start : start + step]
        block = block if isinstance(block, torch.Tensor) else torch.stack([each.float() for each in block])
        values = block.detach().to(getattr(torch, chunk.dtype)).numpy()
        yield chunk.first + start + np.arange(len(values)), values


def _contents(uri: str) -> tuple[Any, Any]:
    """Ids, None where the row number is the id; and vectors: a tensor, or a list of 1-D tensors, None for one that is
    no vector. Raises InputError."""
    import torch

    found = _load(uri)
    if isinstance(found, torch.Tensor):
        return None, found
    if not isinstance(found, dict):
        raise InputError(f"{uri} holds a {type(found).__name__}; {EXPECTED}")
    if found.keys() == {"ids", "vectors"}:
        if not isinstance(found["vectors"], torch.Tensor):
            raise InputError(f"{uri}: `vectors` is a {type(found['vectors']).__name__}; {EXPECTED}")
        return found["ids"], found["vectors"]
    return list(found), [_vector(value) for value in found.values()]


def _load(uri: str) -> Any:
    """The object in a file. A file in object storage is copied to a temporary one, which is mapped, too."""
    import torch

    with tempfile.NamedTemporaryFile(suffix=".pt") as copy:
        path = storage.absolute(uri)
        if not storage.is_local(uri):
            path = copy.name
            with formats.parsing(uri, "readable"), storage.open_input(uri) as file:
                shutil.copyfileobj(file, copy)
            copy.flush()
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # torch raises errors of many types for damaged files
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise InputError(
                f"{uri} is not a .pt file that torch.load(weights_only=True) can read ({type(error).__name__}); "
                f"{EXPECTED}"
            ) from error


def _vector(value: Any) -> Any:
    """A 1-D tensor of numbers, or None."""
    import torch

    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return found if found.ndim == 1 and _has_numbers(found) else None


def _has_numbers(tensor: Any) -> bool:
    import torch

    is_plain = tensor.layout == torch.strided and not tensor.is_quantized
    return is_plain and not tensor.is_complex() and tensor.dtype != torch.bool


def _id_array(uri: str, ids: Any) -> pa.Array:
    """Ids of one kind from a tensor or a list. Raises InputError."""
    import torch

    try:
        found = pa.array(ids.numpy() if isinstance(ids, torch.Tensor) else ids)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InputError(f"{uri}: the ids are not all integers or all strings ({error})") from error
    if len(found) and id_columns.plain_type(found.type) is None:
        raise InputError(f"{uri} has ids of type {found.type}; expected one integer or string per row")
    return found if len(found) else pa.array([], pa.int64())
