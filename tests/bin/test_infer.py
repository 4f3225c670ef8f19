"""What ``penstock infer`` reads, asks and prints."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from penstock.bin.cli import cli
from penstock.bin.infer import InputError, read_inputs
from penstock.wire.models import ModelSpec, TensorSpec
from tests.system.models import dense
from tests.system.servers import Server

TWO_BY_TWO = np.array([[1, 2], [3, 4]], np.int32)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
datatypes = st.sampled_from(["BOOL", "UINT8", "INT32", "INT64", "FP16", "BF16", "FP32", "FP64", "BYTES", "FP33"])
tensors = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text() | json_values,
        "datatype": datatypes | json_values,
        "shape": st.lists(st.integers(-1, 4)) | json_values,
        "data": st.lists(st.integers() | st.floats() | st.text() | st.booleans()) | json_values,
    },
)


def spec(*names: str) -> ModelSpec:
    inputs = tuple(TensorSpec(name, "FP32", (-1, 2)) for name in names)
    return ModelSpec("m", "1", "onnx", inputs, inputs, True, 32)


def save(path: Path, array: Any = TWO_BY_TWO) -> str:
    np.save(path, array)
    return str(path)


def put(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def complaint(*inputs: str, model: ModelSpec | None = None) -> str:
    with pytest.raises(InputError) as raised:
        read_inputs(inputs, model)
    return str(raised.value)


# --- files ---


def test_an_array_belongs_to_the_only_input(tmp_path: Path) -> None:
    arrays = read_inputs([save(tmp_path / "a.npy")], spec("image"))
    np.testing.assert_array_equal(arrays.pop("image"), TWO_BY_TWO)
    assert arrays == {}


def test_arrays_are_given_to_inputs_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "a=b.npy")
    arrays = read_inputs([f"a={path}", f"b={path}"], spec("a", "b"))
    assert list(arrays) == ["a", "b"]
    np.testing.assert_array_equal(arrays["b"], TWO_BY_TWO)


def test_a_name_that_the_model_has_not_is_left_to_the_model(tmp_path: Path) -> None:
    assert list(read_inputs([f"x={save(tmp_path / 'a.npy')}"], spec("image"))) == ["x"]


def test_one_array_for_several_inputs_needs_a_name(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy")
    assert complaint(path, model=spec("a", "b")) == (
        f"{path} holds one array, and the model has several inputs; write NAME={path}"
    )


def test_an_array_for_a_model_that_is_not_known_needs_no_name(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy")
    assert list(read_inputs([path, path], None)) == [""]


def test_an_archive_holds_an_array_for_each_input(tmp_path: Path) -> None:
    path = tmp_path / "with=sign.npz"
    np.savez(path, a=TWO_BY_TWO, b=TWO_BY_TWO * 2)
    arrays = read_inputs([str(path)], spec("a", "b"))
    assert list(arrays) == ["a", "b"]
    np.testing.assert_array_equal(arrays["b"], TWO_BY_TWO * 2)


def test_an_input_that_two_files_hold_is_refused(tmp_path: Path) -> None:
    first, second = save(tmp_path / "first.npy"), save(tmp_path / "second.npy")
    assert complaint(first, second, model=spec("x")) == f"{second} holds input 'x', and so does a file before it"
    third = put(tmp_path / "third.json", {"a": [1]})
    assert complaint(f"a={first}", third, model=spec("a", "b")).startswith(f"{third} holds input 'a'")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none.npy", "No such file or directory"), ("none.json", "No such file or directory"), (".", "Is a directory")],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path, name: str, reason: str) -> None:
    assert complaint(f"{tmp_path}/{name}") == f"cannot read {tmp_path}/{name}: {reason}"


def test_objects_in_a_file_are_not_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", np.array([{}], object))
    assert complaint(path).startswith(f"{path} is no .npy, .npz or JSON file that can be used: Object arrays")


def test_a_shape_that_no_memory_holds_is_refused(tmp_path: Path) -> None:
    content = bytearray(Path(save(tmp_path / "a.npy")).read_bytes())
    at = content.index(b"(2, 2), }       ")
    content[at : at + 16] = b"(9999999999999,)"
    content[at + 16 : at + 18] = b"} "
    (tmp_path / "a.npy").write_bytes(content)
    assert "Unable to allocate" in complaint(str(tmp_path / "a.npy"))


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["?", "u1", "i4", "i8", "f2", "f4", "f8", "U3"]).flatmap(
        lambda dtype: hypothesis_numpy.arrays(dtype, hypothesis_numpy.array_shapes(min_dims=0, min_side=0, max_side=4))
    )
)
def test_an_array_that_was_saved_is_read_as_it_was(tmp_path_factory: pytest.TempPathFactory, array: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "same.npy"
    found = read_inputs([save(path, array)], spec("x"))["x"]
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def saved() -> list[bytes]:
    """One array as each kind of file that numpy reads."""
    plain = io.BytesIO()
    np.save(plain, TWO_BY_TWO)
    files = [plain.getvalue()]
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", compression) as writer:
            writer.writestr("x.npy", plain.getvalue())
        files.append(archive.getvalue())
    return files


damage = st.tuples(st.integers(0, 400), st.binary(max_size=3), st.integers(0, 3))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(saved()), st.lists(damage, min_size=1, max_size=3))
def test_a_damaged_file_gives_arrays_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, damages: list[tuple[int, bytes, int]]
) -> None:
    for at, instead, length in damages:
        at %= len(content)
        content = content[:at] + instead + content[at + length :]
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    path.write_bytes(content)
    said = ""
    with warnings.catch_warnings(action="ignore"):
        try:
            arrays = read_inputs([str(path)], None)
        except InputError as error:
            said = str(error)
        else:
            assert isinstance(arrays, dict)
    assert not said or str(path) in said


@pytest.mark.parametrize(
    "damaged", [b"(2, 2, }    ", b"(2, (2), }  ", b"((((((2, 2 }", b"b'a', 'b'  }", b"'\\', (2,)} "]
)
def test_a_damaged_header_is_a_sentence(tmp_path: Path, damaged: bytes) -> None:
    """Found by damaging files at random: numpy has many exceptions for them."""
    path = tmp_path / "a.npy"
    content = Path(save(path)).read_bytes()
    path.write_bytes(content.replace(b"(2, 2), }   ", damaged))
    with warnings.catch_warnings(action="ignore"):
        assert complaint(str(path)).startswith(f"{path} is no .npy, .npz or JSON file")


# --- JSON ---


def test_lists_by_name_are_left_for_the_model_to_type(tmp_path: Path) -> None:
    content = {"x": [[1, 2]], "y": ["a"]}
    assert read_inputs([put(tmp_path / "a.json", content)], spec("x", "y")) == content


def test_an_input_may_be_called_inputs(tmp_path: Path) -> None:
    content = {"inputs": 1.5}
    assert read_inputs([put(tmp_path / "a.json", content)], spec("inputs")) == content


@pytest.mark.parametrize(
    ("datatype", "data", "dtype"),
    [
        ("INT32", [1, 2], "<i4"),
        ("UINT64", [0, 2**64 - 1], "<u8"),
        ("BOOL", [True, False], "?"),
        ("FP32", [1, 2.5], "<f4"),
        ("FP16", [1, 2.5], "<f2"),
        ("BF16", [1, 2.5], "<f4"),
        ("BYTES", ["a", "b"], "O"),
    ],
)
def test_a_request_says_what_its_tensors_are(tmp_path: Path, datatype: str, data: list[Any], dtype: str) -> None:
    tensor = {"name": "x", "datatype": datatype, "shape": [2, 1], "data": data}
    array = read_inputs([put(tmp_path / "a.json", {"inputs": [tensor]})], None)["x"]
    assert (array.dtype, array.shape, array.ravel().tolist()) == (np.dtype(dtype), (2, 1), data)


def test_a_request_may_nest_its_data_and_have_none(tmp_path: Path) -> None:
    nested = {"name": "x", "datatype": "INT32", "shape": [2, 2], "data": [[1, 2], [3, 4]]}
    empty = {"name": "y", "datatype": "INT32", "shape": [0, 2], "data": []}
    arrays = read_inputs([put(tmp_path / "a.json", {"inputs": [nested, empty]})], None)
    np.testing.assert_array_equal(arrays["x"], TWO_BY_TWO)
    assert (arrays["y"].dtype, arrays["y"].shape) == (np.dtype("<i4"), (0, 2))


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("INT32", [1.5, 2]),
        ("INT32", ["1", "2"]),
        ("INT32", [1, None]),
        ("INT32", [1, 2**40]),
        ("UINT8", [1, -1]),
        ("BOOL", [1, 0]),
        ("FP32", [1, None]),
        ("FP32", ["1", "2"]),
        ("BYTES", ["1", 2]),
        ("FP16", [1.0, 1e6]),
        ("FP32", [[1], [2, 3]]),
        ("FP32", [1]),
        ("FP33", [1, 2]),
        ([], [1, 2]),
    ],
)
def test_data_that_do_not_fit_their_datatype_are_refused(tmp_path: Path, datatype: Any, data: list[Any]) -> None:
    tensor = {"name": "x", "datatype": datatype, "shape": [2], "data": data}
    path = put(tmp_path / "a.json", {"inputs": [tensor]})
    assert complaint(path).startswith(f"{path} is no .npy, .npz or JSON file that can be used: ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "it is not a JSON object"),
        ("", "Expecting value"),
        ("[" * 100_000, ""),
        ('{"inputs": [1]}', "its inputs are not those of a v2 request"),
        ('{"inputs": [{"name": "x"}]}', "its inputs are not those of a v2 request (KeyError"),
        ("9" * 5000, "Exceeds the limit"),
    ],
)
def test_json_that_is_no_request_is_refused_with_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert complaint(str(path)).startswith(f"{path} is no .npy, .npz or JSON file that can be used: {reason}")


def test_json_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"x": "\xff"}')
    assert "codec can't decode byte" in complaint(str(tmp_path / "a.json"))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20) | st.builds(json.dumps, st.fixed_dictionaries({"inputs": st.lists(tensors) | json_values})))
def test_any_json_gives_inputs_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    said = ""
    try:
        arrays = read_inputs([str(path)], spec("x"))
    except InputError as error:
        said = str(error)
    else:
        assert isinstance(arrays, dict)
    assert not said or str(path) in said


# --- the command, and a server ---


def infer(server: Server | Path, *arguments: str, text: str | None = None) -> Result:
    runtime = server.runtime if isinstance(server, Server) else server
    return CliRunner().invoke(cli, ["infer", *arguments, f"--runtime-dir={runtime}"], input=text)


def test_outputs_are_printed_with_name_type_shape_and_where_the_largest_is(server: Server, tmp_path: Path) -> None:
    rows = np.array([[0, 1, 0, 0], [0, 0, 0, 1]], np.float32)
    weights = onnx.numpy_helper.to_array(dense().graph.initializer[0])
    shown = infer(server, "dense", save(tmp_path / "x.npy", rows))
    assert (shown.exit_code, shown.stderr) == (0, "")
    first, *values, last = shown.stdout.splitlines()
    assert first == "y float32 [2, 3]"
    printed = [[float(word) for word in line.strip("[ ]").split()] for line in values]
    np.testing.assert_allclose(printed, weights[[1, 3]], atol=1e-4)
    assert last == f"largest at {weights[1].argmax()}, {weights[3].argmax()}"


def test_outputs_of_the_server_are_one_json_object(server: Server, tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy")
    shown = infer(server, "sums", f"a={path}", f"b={path}", "--json")
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout) == {"sum": [[2, 4], [6, 8]], "difference": [[0, 0], [0, 0]]}
    assert shown.stdout.count("\n") == 1


def test_strings_are_printed_as_text_in_json(server: Server) -> None:
    shown = infer(server, "strings", "-", "--json", text='{"x": [["Grüße", "b"]]}')
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout) == {"y": [["Grüße", "b"]]}


def test_fractions_reach_a_model_of_bfloat16(server: Server) -> None:
    request = {"inputs": [{"name": "x", "datatype": "BF16", "shape": [1, 2], "data": [1.5, -2]}]}
    shown = infer(server, "brain", "-", text=json.dumps(request))
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.startswith("y ")


def test_the_version_is_the_one_that_is_asked_for(server: Server) -> None:
    row = '{"x": [[1, 2, 3, 4]]}'
    assert infer(server, "dense", "-", "--version=3", text=row).exit_code == 0
    shown = infer(server, "dense", "-", "--version=4", text=row)
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert shown.stderr == "penstock: Request for unknown model: 'dense' version 4 is not found\n"


def test_an_unknown_model_is_told_even_when_an_input_has_no_name(server: Server, tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy")
    shown = infer(server, "nope", path, path)
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert shown.stderr == "penstock: Request for unknown model: 'nope' is not found\n"


def test_what_does_not_fit_the_model_is_said_in_one_line(server: Server) -> None:
    shown = infer(server, "dense", "-", text='{"x": [[1, 2, 3]]}')
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert shown.stderr.startswith("penstock: ")
    assert "Expected [-1, 4], got [1, 3]" in shown.stderr
    assert shown.stderr.count("\n") == 1


def test_standard_input_that_is_no_json_is_called_by_its_name(server: Server) -> None:
    shown = infer(server, "dense", "-", text="{")
    assert shown.exit_code == 1
    assert shown.stderr.startswith("penstock: standard input is no .npy, .npz or JSON file that can be used: ")


def test_nobody_there_is_an_error_within_the_time_that_was_given(nowhere: Path) -> None:
    shown = infer(nowhere, "digits", "-", "--timeout=0.05", text="{}")
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert shown.stderr.startswith(f"penstock: no Penstock broker answered at {nowhere} within 0.05 s; ")


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "1e9"])
def test_a_timeout_that_is_none_is_refused(nowhere: Path, timeout: str) -> None:
    shown = infer(nowhere, "digits", "-", f"--timeout={timeout}")
    assert shown.exit_code == 1
    assert shown.stderr.startswith("penstock: a timeout is more than 0 and at most 86400 seconds, not ")


def test_inputs_have_to_be_given(nowhere: Path) -> None:
    shown = infer(nowhere, "digits")
    assert shown.exit_code == 2
    assert "Missing argument 'INPUT...'" in shown.stderr
