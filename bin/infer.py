"""``penstock infer``"""

from __future__ import annotations

import json
import lzma
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

from penstock.bin import options
from penstock.client import Client, PenstockError, Result
from penstock.wire.models import ModelSpec
from penstock.wire.tensors import DTYPES

# What numpy raises for files that are none, beside OSError.
_UNREADABLE: Final = (
    ValueError,
    EOFError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    TypeError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
# What of JSON a kind of numpy's types takes: numpy itself would cut 1.5 to 1, and make null a NaN.
_FITTING: Final[dict[str, set[type]]] = {
    "b": {bool},
    "i": {bool, int},
    "u": {bool, int},
    "f": {bool, int, float},
    "O": {str},
}


@click.command()
@click.argument("model")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--version", default="", help="Of the model.  [default: the newest]")
@options.runtime_dir
@options.server
@click.option("--timeout", type=float, default=30.0, show_default=True, help="Seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def infer(
    model: str,
    inputs: Sequence[str],
    version: str,
    runtime_dir: Path | None,
    server: str | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Run MODEL once on INPUT and print its outputs.

    INPUT is a .npy file (for a model with one input), NAME=FILE.npy for each input, a .npz file with an array for
    each, or a .json file: a v2 request or an object of lists by name. "-" is JSON from standard input.
    """
    try:
        # One request is sent sooner than shared memory is allocated for it, and may have any size.
        with Client(server or runtime_dir, timeout=timeout, arena_bytes=0) as client:
            spec = _spec(client, model, version)
            result = client.infer(model, read_inputs(inputs, spec), version=version)
    except (PenstockError, InputError) as error:
        click.echo(f"penstock: {error}", err=True)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps({name: _plain(array) for name, array in result.items()}))
    else:
        _print(result)


class InputError(Exception):
    """An input file that cannot be used; the message names it."""


def _spec(client: Client, model: str, version: str) -> ModelSpec | None:
    """What the model takes, where it is known; the call itself says what is wrong where it is not."""
    states = [state for state in client.models() if state.name == model and version in ("", state.version)]
    return next((state.spec for state in states if state.spec is not None), None)


def read_inputs(inputs: Sequence[str], spec: ModelSpec | None) -> dict[str, Any]:
    """Arrays by name. Of a model that is not known they may lack one: asking for it says more. Raises InputError."""
    only = spec.inputs[0].name if spec is not None and len(spec.inputs) == 1 else ""
    arrays: dict[str, Any] = {}
    for given in inputs:
        name, equals, path = given.partition("=")
        if not equals or given.endswith((".npz", ".json")):
            name, path = "", given
        for found, array in _read(path, name or only).items():
            if not found and spec is not None:
                raise InputError(f"{path} holds one array, and the model has several inputs; write NAME={path}")
            if found and found in arrays:
                raise InputError(f"{path} holds input '{found}', and so does a file before it")
            arrays[found] = array
    return arrays


def _read(path: str, name: str) -> dict[str, Any]:
    try:
        if path == "-":
            return _from_json(sys.stdin.read())
        if path.endswith(".json"):
            return _from_json(Path(path).read_text(encoding="utf-8"))
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {name: loaded}
            with loaded:
                return dict(loaded)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except _UNREADABLE as error:
        shown = "standard input" if path == "-" else path
        raise InputError(f"{shown} is no .npy, .npz or JSON file that can be used: {error}") from None


def _from_json(text: str) -> dict[str, Any]:
    """A v2 request's inputs, or lists by name. Raises ValueError, or RecursionError (a RuntimeError)."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    inputs = value.get("inputs")
    if not isinstance(inputs, list):
        return value
    try:
        return {each["name"]: _tensor(each["data"], each["datatype"]).reshape(each["shape"]) for each in inputs}
    except (KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(f"its inputs are not those of a v2 request ({error!r})") from None


def _tensor(data: Any, datatype: str) -> np.ndarray[Any, Any]:
    """Raises KeyError, TypeError, ValueError and ArithmeticError for what does not fit the datatype."""
    dtype = np.dtype("<f4") if datatype == "BF16" else DTYPES[datatype]  # the client rounds it
    with np.errstate(over="raise"):
        array = np.array(data, dtype)
    if not {type(element) for element in np.array(data, object).flat} <= _FITTING[dtype.kind]:
        raise TypeError(f"the data are not {datatype}")
    return array


def _plain(array: np.ndarray[Any, Any]) -> Any:
    if array.dtype.kind == "O":
        array = np.array([element.decode("utf-8", "replace") for element in array.flat], object).reshape(array.shape)
    return array.tolist()


def _print(result: Result) -> None:
    for name, array in result.items():
        click.echo(f"{name} {array.dtype} {list(array.shape)}")
        click.echo(np.array2string(array, precision=4, suppress_small=True, threshold=200))
        if array.dtype.kind == "f" and array.ndim == 2 and array.shape[1] > 1:
            click.echo(f"largest at {', '.join(map(str, array.argmax(axis=1)[:20]))}")
