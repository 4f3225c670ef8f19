"""What classes are called: files of labels beside a model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from penstock.wire.models import MAX_LABELS, ModelSpec, TensorSpec
from penstock.worker.classlabels import problem_of_file, read_labels
from penstock.worker.repository import find_models

SPEC = ModelSpec("m", "1", "onnx", (), (TensorSpec("y", "FP32", (-1, 3)), TensorSpec("z", "FP32", (-1,))), False, 1)


def test_a_label_in_each_line(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufeffant \r\n\r\nbee Ü\n\n".encode())
    spec, said = read_labels(SPEC, [("y", path)])
    assert (spec, said) == (SPEC._replace(labels=(("y", "ant\n\nbee Ü"),)), [])


def test_files_that_say_nothing_are_told(tmp_path: Path) -> None:
    for name, content in (("good", b"a\nb"), ("long", b"x" * MAX_LABELS), ("raw", b"\xff\xfe\x00")):
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    files = [("nope", tmp_path / "good"), ("y", tmp_path / "good"), ("z", tmp_path / "long")]
    spec, said = read_labels(SPEC, files)
    assert spec.labels == (("y", "a\nb"),)
    assert said[0].endswith("the model has no output 'nope'; its outputs are y, z; classes are told by their numbers")
    assert said[1].startswith(
        f"labels of output 'z' in {tmp_path / 'long'}: it has more than the {MAX_LABELS - 3} char"
    )
    for name, reason in (("raw", "it is not UTF-8"), ("pipe", "it is no file"), ("gone", "No such file or directory")):
        spec, [sentence] = read_labels(SPEC, [("y", tmp_path / name)])
        assert spec == SPEC
        assert reason in sentence


def test_they_lie_in_the_models_directory(tmp_path: Path) -> None:
    assert problem_of_file("labels.txt") == problem_of_file("a/b.txt") == ""
    for name in ("", "/etc/passwd", "../x", "a/../../x", "a\nb", "x" * 256):
        assert "is no file in the model's directory" in problem_of_file(name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.toml", 'class_labels = {y = "labels.txt"}'),
        ("config.pbtxt", 'output { name: "y" data_type: TYPE_FP32 dims: 3 label_filename: "labels.txt" }'),
    ],
)
def test_a_configuration_names_them_and_a_change_is_seen(tmp_path: Path, name: str, text: str) -> None:
    directory = tmp_path / "m"
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "model.onnx").write_bytes(b"x")
    (directory / name).write_text(text)
    labels = directory / "labels.txt"
    marks = []
    for content in (None, "ant", "ant\nbee"):
        if content is not None:
            labels.write_text(content)
        [file] = find_models(tmp_path)
        assert file.labels == (("y", labels),)
        assert file.problem == ""
        marks.append(file.mark)
    assert len(set(map(str, marks))) == 3
