"""Reads the tensors of a file that torch.save wrote. Code that the file refers to is neither imported nor run."""

from __future__ import annotations

import argparse
import pickle
import sys
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # Python 2 names, which pickles of protocol 2 use
from collections import OrderedDict
from pathlib import Path
from tarfile import is_tarfile
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch import _tensor, _utils

# Modules of the standard library whose objects users store with weights. They are replaced by `Inert` objects.
HARMLESS = frozenset(
    (
        "_codecs", "abc", "argparse", "builtins", "collections", "copyreg", "dataclasses", "datetime", "decimal", "enum",
        "fractions", "functools", "ipaddress", "numbers", "pathlib", "re", "types", "typing", "uuid", "zoneinfo",
    )
)  # fmt: skip
REFUSED_BUILTINS = frozenset(("__import__", "breakpoint", "compile", "eval", "exec", "input", "open"))
ZIP_MAGIC = b"PK\x03\x04"  # torch.load recognises an archive by these bytes


def load_tensors(path: Path) -> Any:
    """Return the content of a file of torch.save, on the CPU. Objects other than tensors and plain values become inert.

    Raises:
        pickle.UnpicklingError: if the file refers to a global that could run code. The message names it.
        Exception: any error of torch, if the file is damaged.
    """
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    # With mmap, the optimizer's state, which is twice the size of the weights, is not read.
    load = {"map_location": "cpu", "mmap": is_zip}
    try:
        # The warning is about a newer pickle protocol, which the second attempt reads.
        quiet = warnings.catch_warnings(action="ignore", category=UserWarning)
        with torch.serialization.safe_globals([argparse.Namespace]), quiet:
            return torch.load(path, weights_only=True, **load)  # type: ignore[arg-type]
    except pickle.UnpicklingError:
        # torch.load would run the program of a TorchScript archive, and unpack the files of a tar.
        if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records() if is_zip else is_tarfile(path):
            raise
    module = SimpleNamespace(__name__=__name__, Unpickler=TensorUnpickler, load=_load)
    return torch.load(path, weights_only=False, pickle_module=module, **load)  # type: ignore[arg-type]


class Inert:
    """A replacement for an object whose class is not loaded. It accepts all calls of an unpickler and does nothing."""

    def __new__(cls, *_args: object, **_options: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_args: object, **_options: object) -> None: ...

    def __call__(self, *_args: object, **_options: object) -> Inert:
        return self

    def _ignore(self, *_values: object) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = _ignore


class Rebuild:
    """Calls a function of torch that creates a tensor. The file cannot set attributes of the function."""

    __slots__ = ("_function",)

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class Names(OrderedDict[str, Any]):
    """An OrderedDict that accepts no attributes from a file."""

    def __setstate__(self, _state: object) -> None: ...


DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
CLASSES = {
    ("collections", "OrderedDict"): Names,
    ("torch", "Size"): torch.Size,
    ("torch", "Tensor"): torch.Tensor,
    ("torch", "device"): torch.device,
    ("torch.nn.parameter", "Parameter"): torch.nn.Parameter,
}
FUNCTIONS = {
    ("torch._utils", "_rebuild_tensor"): _utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _utils._rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _utils._rebuild_parameter_with_state,
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor._rebuild_from_type_v2,
}


class TensorUnpickler(pickle.Unpickler):
    """An unpickler that supports only the classes of tensors. It imports nothing. Other globals are inert or refused."""

    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) in CLASSES:
            return CLASSES[module, name]
        if (module, name) in FUNCTIONS:
            return Rebuild(FUNCTIONS[module, name])
        package = module.partition(".")[0]
        is_code = package in sys.stdlib_module_names and package not in HARMLESS
        if is_code or (package == "builtins" and name in REFUSED_BUILTINS):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return Inert


def _load(file: BinaryIO, **options: Any) -> Any:
    return TensorUnpickler(file, **options).load()
