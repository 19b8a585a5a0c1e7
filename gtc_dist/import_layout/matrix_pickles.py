"""Pickled SciPy matrices, read without running anything that a pickle may ask for.

A pickle names the classes and functions that rebuild its objects, so loading one can run any code. Here the names of
SciPy's matrices and NumPy's arrays stand for the plain classes below, which only keep what they are given, and every
other name is refused. The matrix is then built from the kept numbers by its constructor, which checks them.
"""

import io
import pickle
import re
from typing import Any

import numpy as np
import scipy.sparse

from gtc_dist.errors import InputError

KINDS = ("coo", "csr", "csc")  # of matrices and arrays
NUMBERS = r"[biuf][1248]"  # names of admitted dtypes


class _PickledDtype:
    """Stands for numpy.dtype: a type of numbers."""

    def __init__(self, name: str, *_):
        if not re.fullmatch(NUMBERS, name):
            raise ValueError(f"it holds values of the type {name!r}, not numbers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])  # (version, byte order, ...)


class _PickledArray:
    """Stands for numpy.ndarray. `array` is missing until the state is set."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data  # of Python 2
        numbers = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")
        self.array = numbers.astype(dtype.dtype.newbyteorder("="))  # a copy, as SciPy sorts indices in place


class _PickledMatrix:
    """Stands for a matrix; its attributes are those of the pickle."""

    kind: str


_MATRICES = {kind: type(kind, (_PickledMatrix,), {"kind": kind}) for kind in KINDS}


def _empty_matrix(kind: type[_PickledMatrix], *_) -> _PickledMatrix:
    """Stands for copyreg._reconstructor, of protocols 0 and 1."""
    return kind()


def _empty_array(*_) -> _PickledArray:
    return _PickledArray()


def _array_from_buffer(data: Any, dtype: _PickledDtype, shape: tuple, order: str, *_) -> _PickledArray:
    array = _PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _scalar(dtype: _PickledDtype, data: Any) -> np.generic:
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype.dtype)[0]


def _latin1_bytes(text: str, *_) -> bytes:
    """Stands for _codecs.encode, by which pickles of protocol 2 hold bytes."""
    return text.encode("latin1")


ADMITTED: dict[tuple[str, str], Any] = {  # (module, name), as old and new versions call them -> what stands for it
    **{
        (f"scipy.sparse.{underscore}{kind}", f"{kind}_{shape}"): _MATRICES[kind]
        for kind in KINDS
        for shape in ("matrix", "array")
        for underscore in ("", "_")
    },
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array_from_buffer for core in ("core", "_core")},
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledDtype,
    **{(module, "_reconstructor"): _empty_matrix for module in ("copyreg", "copy_reg")},
    **{(module, "object"): None for module in ("builtins", "__builtin__")},  # an argument of _reconstructor
    ("_codecs", "encode"): _latin1_bytes,
}


def unpickle_matrix(uri: str, data: bytes) -> scipy.sparse.csr_matrix:
    """The matrix of a pickle.

    Args:
        uri: the file, for errors.

    Raises:
        InputError: the pickle holds another class or function.
        Exception: of any type, if the bytes are broken or hold no matrix of numbers.
    """
    found = _Unpickler(uri, data).load()
    if not isinstance(found, _PickledMatrix):
        raise ValueError(f"it holds a {type(found).__name__.removeprefix('_Pickled')}")
    state, shape = vars(found), tuple(map(int, found._shape))
    values = state["data"].array
    if found.kind == "coo":
        row, col = state["coords"] if "coords" in state else (state["row"], state["col"])
        return scipy.sparse.coo_matrix((values, (row.array, col.array)), shape).tocsr()
    build = {"csr": scipy.sparse.csr_matrix, "csc": scipy.sparse.csc_matrix}[found.kind]
    matrix = build((values, state["indices"].array, state["indptr"].array), shape)
    matrix.check_format(full_check=True)  # before SciPy's compiled code follows the indices
    return matrix.tocsr()


class _Unpickler(pickle.Unpickler):
    def __init__(self, uri: str, data: bytes):
        super().__init__(io.BytesIO(data), encoding="latin1")  # pickles of Python 2 hold bytes as text
        self.uri = uri

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise InputError(
                f"{self.uri} is a pickle with {module}.{name}, which is refused because it could run code; expected a "
                f"SciPy matrix ({', '.join(KINDS)}) of numbers"
            )
        return ADMITTED[module, name]
