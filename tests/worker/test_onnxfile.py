"""What an .onnx file says, against the onnx package; and bytes that somebody made up."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from penstock.worker import onnxfile
from penstock.worker.onnxfile import OnnxFile, OnnxFileError, Port, read_onnx

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING
# A bit that is flipped makes any type of any other.
BITS = {
    number: bits
    for name, number in TensorProto.DataType.items()
    for bits, names in {
        2: "UINT2 INT2",
        4: "UINT4 INT4 FLOAT4E2M1",
        8: "UINT8 INT8 BOOL FLOAT8E4M3FN FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ FLOAT8E8M0",
        16: "UINT16 INT16 FLOAT16 BFLOAT16",
        32: "UINT32 INT32 FLOAT",
        64: "UINT64 INT64 DOUBLE COMPLEX64",
        128: "COMPLEX128",
    }.items()
    if name in names.split()
}
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)


# --- what the onnx package says of the same bytes ---


def expected(model: onnx.ModelProto) -> OnnxFile:
    operators: Counter[tuple[str, str]] = Counter()
    tensors: list[tuple[int, list[str]]] = []

    def tensor(proto: onnx.TensorProto) -> tuple[int, list[str]]:
        external = proto.data_location == TensorProto.EXTERNAL
        files = (
            [os.fsdecode(entry.value) for entry in proto.external_data if entry.key == "location"] if external else []
        )
        if proto.data_type == STRING:
            return sum(len(each) for each in proto.string_data), files
        elements = int(np.prod([max(dim, 0) for dim in proto.dims], dtype=object))
        return (elements * BITS.get(proto.data_type, 0) + 7) // 8, files

    def sparse(proto: onnx.SparseTensorProto) -> tuple[int, list[str]]:
        values, indices = tensor(proto.values), tensor(proto.indices)
        return values[0] + indices[0], values[1] + indices[1]

    def attribute(proto: onnx.AttributeProto) -> None:
        tensors.extend(tensor(each) for each in proto.tensors)
        tensors.extend(sparse(each) for each in proto.sparse_tensors)
        for each in proto.graphs:
            graph(each)
        if proto.HasField("t"):
            tensors.append(tensor(proto.t))
        if proto.HasField("g"):
            graph(proto.g)
        if proto.HasField("sparse_tensor"):
            tensors.append(sparse(proto.sparse_tensor))

    def node(proto: onnx.NodeProto) -> None:
        for each in proto.attribute:
            attribute(each)
        operators[domain(proto.domain), text(proto.op_type)] += 1

    def graph(proto: onnx.GraphProto) -> None:
        for each in proto.node:
            node(each)
        tensors.extend(tensor(each) for each in proto.initializer)
        tensors.extend(sparse(each) for each in proto.sparse_initializer)

    graph(model.graph)
    for function in model.functions:
        for each in function.node:
            node(each)
        for proto in function.attribute_proto:
            attribute(proto)
    return OnnxFile(
        model.ir_version,
        text(model.producer_name),
        {domain(each.domain): each.version for each in model.opset_import},
        dict(operators),
        tuple(port(each) for each in model.graph.input),
        tuple(port(each) for each in model.graph.output),
        (
            *(text(each.name) for each in model.graph.initializer),
            *(text(each.values.name) for each in model.graph.sparse_initializer),
        ),
        len(tensors),
        sum(size for size, files in tensors if not files),
        sum(size for size, files in tensors if files),
        tuple(dict.fromkeys(name for _, files in tensors for name in files)),
    )


def text(value: str | bytes) -> str:
    """Protobuf gives what is not UTF-8 as bytes."""
    return value if isinstance(value, str) else value.decode("utf-8", "replace")


def domain(value: str | bytes) -> str:
    return "" if value == "ai.onnx" else text(value)


def port(proto: onnx.ValueInfoProto) -> Port:
    kind, element, shape = kind_of(proto.type)
    return Port(text(proto.name), kind, element, shape)


def kind_of(proto: onnx.TypeProto) -> tuple[str, str, Any]:
    match proto.WhichOneof("value"):
        case "tensor_type" | "sparse_tensor_type" as member:
            of = getattr(proto, member)
            shape = tuple(dim(each) for each in of.shape.dim) if of.HasField("shape") else None
            return member.split("_")[0], element(of.elem_type), shape
        case "sequence_type" | "optional_type" as member:
            return member.split("_")[0], written(*kind_of(getattr(proto, member).elem_type)), None
        case "map_type":
            value = written(*kind_of(proto.map_type.value_type))
            return "map", f"{element(proto.map_type.key_type)},{value}", None
        case "opaque_type":
            return "opaque", "", None
    return "", "", None


def written(kind: str, element: str, shape: Any) -> str:
    prefix = {"sequence": "seq", "sparse": "sparse_tensor"}.get(kind, kind)
    return f"{prefix}({element})" if kind else ""


def element(code: int) -> str:
    return str(TensorProto.DataType.Name(code)).lower() if 0 < code < 27 else f"type {code}"


def dim(proto: Any) -> int | str | None:
    which = proto.WhichOneof("value")
    if which == "dim_param":
        return text(proto.dim_param) or None
    return int(proto.dim_value) if which else None


# --- models of all kinds ---


@st.composite
def tensors(draw: st.DrawFn) -> onnx.TensorProto:
    proto = TensorProto(name=draw(NAMES), data_type=draw(st.sampled_from([*BITS, STRING])))
    proto.dims.extend(draw(st.lists(st.integers(-1, 9), max_size=3)))
    if proto.data_type == STRING:
        proto.string_data.extend(draw(st.lists(st.binary(max_size=4), max_size=3)))
    else:
        proto.raw_data = draw(st.binary(max_size=20))
    if draw(st.booleans()):
        proto.data_location = draw(st.sampled_from([TensorProto.DEFAULT, TensorProto.EXTERNAL]))
        for key in draw(st.lists(st.sampled_from(["location", "offset", "length"]), max_size=3)):
            proto.external_data.add(key=key, value=draw(NAMES))
    return proto


@st.composite
def sparse_tensors(draw: st.DrawFn) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=draw(tensors()), indices=draw(tensors()), dims=[3])


@st.composite
def types(draw: st.DrawFn, depth: int = 0) -> onnx.TypeProto:
    proto = onnx.TypeProto()
    members = ["tensor_type", "sparse_tensor_type", "sequence_type", "map_type", "optional_type", "opaque_type", ""]
    match draw(st.sampled_from(members[: 2 if depth == 3 else None])):
        case "tensor_type" | "sparse_tensor_type" as member:
            of = getattr(proto, member)
            of.elem_type = draw(st.sampled_from([0, 1, 7, 8, 16, 99]))
            if draw(st.booleans()):
                of.shape.SetInParent()
                for each in draw(st.lists(st.integers(-1, 1 << 40) | NAMES | st.none(), max_size=4)):
                    added = of.shape.dim.add()
                    if isinstance(each, str):
                        added.dim_param = each
                    elif each is not None:
                        added.dim_value = each
        case "sequence_type" | "optional_type" as member:
            getattr(proto, member).elem_type.CopyFrom(draw(types(depth + 1)))
        case "map_type":
            proto.map_type.key_type = draw(st.sampled_from([7, 8]))
            proto.map_type.value_type.CopyFrom(draw(types(depth + 1)))
        case "opaque_type":
            # The onnx package's own message for it is empty.
            proto.ParseFromString(proto.SerializeToString())
    return proto


@st.composite
def nodes(draw: st.DrawFn, depth: int) -> onnx.NodeProto:
    proto = onnx.NodeProto(op_type=draw(NAMES), domain=draw(st.sampled_from(["", "ai.onnx", "com.example"])))
    for kind in draw(st.lists(st.sampled_from(["t", "g", "tensors", "graphs", "sparse_tensor", "f", "s"]), max_size=2)):
        attribute = proto.attribute.add(name=draw(NAMES))
        match kind:
            case "t":
                attribute.t.CopyFrom(draw(tensors()))
            case "tensors":
                attribute.tensors.extend(draw(st.lists(tensors(), max_size=2)))
            case "sparse_tensor":
                attribute.sparse_tensor.CopyFrom(draw(sparse_tensors()))
            case "g" if depth < 2:
                attribute.g.CopyFrom(draw(graphs(depth + 1)))
            case "graphs" if depth < 2:
                attribute.graphs.extend(draw(st.lists(graphs(depth + 1), max_size=2)))
            case "f":
                attribute.f = 1.5
            case "s":
                attribute.s = draw(st.binary(max_size=300))
    return proto


@st.composite
def graphs(draw: st.DrawFn, depth: int = 0) -> onnx.GraphProto:
    proto = onnx.GraphProto(name=draw(NAMES), doc_string=draw(NAMES))
    proto.node.extend(draw(st.lists(nodes(depth), max_size=3)))
    proto.initializer.extend(draw(st.lists(tensors(), max_size=3)))
    proto.sparse_initializer.extend(draw(st.lists(sparse_tensors(), max_size=1)))
    for kind, most in ("input", 3), ("output", 3), ("value_info", 1):
        for each in draw(st.lists(types(), max_size=most)):
            getattr(proto, kind).add(name=draw(NAMES)).type.CopyFrom(each)
    return proto


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    proto = onnx.ModelProto(ir_version=draw(st.integers(-1, 12)), producer_name=draw(NAMES), graph=draw(graphs()))
    for each in draw(st.lists(st.sampled_from(["", "ai.onnx", "com.example"]), max_size=3)):
        proto.opset_import.add(domain=each, version=draw(st.integers(-1, 30)))
    for name in draw(st.lists(NAMES, max_size=2)):
        function = proto.functions.add(name=name)
        function.node.extend(draw(st.lists(nodes(1), max_size=2)))
        function.attribute_proto.add(name="a").t.CopyFrom(draw(tensors()))
    return proto


def sort(found: OnnxFile) -> OnnxFile:
    """Whatever the order in which names were met."""
    names, files = tuple(sorted(found.initializers)), tuple(sorted(found.external_files))
    return dataclasses.replace(found, initializers=names, external_files=files)


def read(content: bytes) -> OnnxFile:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        return read_onnx(path)


@given(models())
def test_it_says_what_the_onnx_package_says(model: onnx.ModelProto) -> None:
    assert sort(read(model.SerializeToString())) == sort(expected(model))


@settings(max_examples=60)
@given(models(), models())
def test_parts_of_one_message_are_joined_as_protobuf_does(one: onnx.ModelProto, other: onnx.ModelProto) -> None:
    both = one.SerializeToString() + other.SerializeToString()
    assert sort(read(both)) == sort(expected(onnx.ModelProto.FromString(both)))


@settings(max_examples=150)
@given(models(), st.data())
def test_bytes_that_were_tampered_with_are_read_alike_or_refused(model: onnx.ModelProto, data: st.DataObject) -> None:
    content = bytearray(model.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "set", "cut", "double"])):
            case "flip":
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                content[at] = data.draw(st.sampled_from([0, 0x7F, 0x80, 0xFF]))
            case "cut":
                del content[at : at + data.draw(st.integers(1, 9))]
            case "double":
                content[at:at] = content[at : at + 9]
        if not content:
            return
    try:
        found = read(bytes(content))
        wanted = expected(onnx.ModelProto.FromString(bytes(content)))
    except (OnnxFileError, DecodeError, UnicodeDecodeError):
        return  # what is stepped over, as weights are, is not looked at by one of the two
    assert sort(found) == sort(wanted)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_model_or_refused(content: bytes) -> None:
    with contextlib.suppress(OnnxFileError):
        read(content)


# --- what real exporters write ---


def save(tmp_path: Path, graph: onnx.GraphProto, **more: Any) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path, **more)
    return path


def test_weights_are_stepped_over_and_counted(tmp_path: Path) -> None:
    weights = np.zeros((1000, 1000), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 1000]), helper.make_tensor_value_info("w", FLOAT, None)],
        [helper.make_tensor_value_info("y", FLOAT, ["N", 1000])],
        [numpy_helper.from_array(weights, "w")],
    )
    found = read_onnx(save(tmp_path, graph))
    assert (found.weights, found.inline_bytes, found.external_bytes) == (1, weights.nbytes, 0)
    assert found.initializers == ("w",)
    assert found.inputs == (Port("x", "tensor", "float", ("N", 1000)), Port("w", "tensor", "float", None))
    assert found.operators == {("", "MatMul"): 1}


def test_external_files_are_those_of_subgraphs_and_constants_too(tmp_path: Path) -> None:
    def outside(name: str, file: str) -> onnx.TensorProto:
        proto = TensorProto(name=name, data_type=FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        proto.external_data.add(key="location", value=file)
        return proto

    inner = helper.make_graph(
        [], "inner", [], [helper.make_tensor_value_info("b", FLOAT, [4])], [outside("b", "b.bin")]
    )
    graph = helper.make_graph(
        [
            helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
            helper.make_node("Constant", [], ["k"], value=outside("", "c.bin")),
        ],
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", FLOAT, [4])],
        [outside("a", "a/a.bin"), outside("a2", "a/a.bin")],
    )
    found = read_onnx(save(tmp_path, graph))
    assert sorted(found.external_files) == ["a/a.bin", "b.bin", "c.bin"]
    assert (found.weights, found.inline_bytes, found.external_bytes) == (5, 0, 80)
    assert found.inputs[0].shape == ()


def test_type_is_written_as_onnx_runtime_does() -> None:
    tensor = helper.make_tensor_type_proto(FLOAT, None)
    kinds = helper.make_sequence_type_proto(helper.make_map_type_proto(INT64, tensor))
    graph = helper.make_graph([], "g", [], [helper.make_value_info("y", kinds)])
    found = read(helper.make_model(graph).SerializeToString())
    assert (found.outputs[0].kind, found.outputs[0].type) == ("sequence", "seq(map(int64,tensor(float)))")


# --- what is no model ---


def refused(content: bytes) -> str:
    with pytest.raises(OnnxFileError) as raised:
        read(content)
    return str(raised.value).partition("is no ONNX model: ")[2]


def field(number: int, content: bytes) -> bytes:
    """A field of bytes; protobuf's packing of small numbers and lengths."""
    head, length = bytes([number << 3 | 2]), len(content)
    while length >= 0x80:
        head += bytes([length & 0x7F | 0x80])
        length >>= 7
    return head + bytes([length]) + content


def test_what_is_no_protobuf_is_refused() -> None:
    assert refused(b"") == "it has no graph"
    assert refused(b"{}") == "wire type 3 at byte 0"
    assert refused(b"\x00\x01") == "field number 0 at byte 0"
    assert refused(b"\x3a") == "a number is cut off"
    assert refused(b"\x3a\x05ab") == "5 bytes from byte 2 on exceed what they lie in, which ends at 4"
    assert refused(b"\x08" + b"\xff" * 11) == "a number is too long"
    assert refused(b"\x3a\x02\x0a\x05") == "5 bytes from byte 4 on exceed what they lie in, which ends at 4"


def test_length_beyond_any_file_is_refused() -> None:
    assert "exceed" in refused(b"\x3a" + b"\xff" * 9 + b"\x01")


def test_graphs_nested_too_deep_are_refused() -> None:
    content = b""
    for _ in range(200):
        content = field(1, field(5, field(6, content)))  # graph: node: attribute: graph
    assert refused(field(7, content)) == "it nests deeper than 100 messages"


def test_types_nested_too_deep_are_refused() -> None:
    content = b""
    for _ in range(400):
        content = field(4, field(1, content))
    assert refused(field(7, field(11, field(2, content)))) == "it nests deeper than 100 messages"


def test_tensor_of_too_many_dimensions_is_refused() -> None:
    many = field(7, field(5, b"\x08\x01" * 2000))
    assert refused(many) == "a tensor has more than 1000 dimensions"
    packed = field(7, field(5, field(1, b"\x01" * 20_000)))
    assert "bytes of dimensions" in refused(packed)
    huge = field(7, field(5, field(1, (b"\xff" * 8 + b"\x7f") * 900) + b"\x10\x01"))
    assert read(huge).inline_bytes == 1 << 62


def test_message_in_too_many_parts_is_refused() -> None:
    assert refused(field(7, b"") * 2000) == "a message comes in more than 1000 parts"


def test_fields_and_names_of_a_file_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = field(7, field(11, field(1, b"name" * 10)) * 10)
    assert len(read(content).inputs) == 10
    monkeypatch.setattr(onnxfile, "_FIELDS_MAX", 20)
    assert refused(content) == "it has more than 20 fields"
    monkeypatch.undo()
    monkeypatch.setattr(onnxfile, "_TEXT_MAX_BYTES", 399)
    assert refused(content) == "its names take more than 399 bytes"


def test_what_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(OnnxFileError, match=r"cannot read .*missing"):
        read_onnx(tmp_path / "missing")
    with pytest.raises(OnnxFileError, match="is no file"):
        read_onnx(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OnnxFileError, match="is no file"):
        read_onnx(tmp_path / "pipe")


def test_file_larger_than_any_memory_is_read_where_it_counts(tmp_path: Path) -> None:
    """A tensor of 1 TB, of which the file system keeps no byte."""
    path, size = tmp_path / "model.onnx", 1 << 40
    head = b"\x4a" + _varint(size)  # the tensor's raw_data
    tensor = b"\x2a" + _varint(len(head) + size) + head
    with path.open("wb") as file:
        try:
            file.write(b"\x3a" + _varint(len(tensor) + size) + tensor)
            file.truncate(file.tell() + size)
            file.seek(0, os.SEEK_END)
            file.write(b"\x08\x09")
        except OSError:
            pytest.skip("no file system for such a file")
    assert (read_onnx(path).weights, read_onnx(path).ir_version) == (1, 9)


def _varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])
