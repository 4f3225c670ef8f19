"""What ``fuzz.py`` puts into a repository of models."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random
from typing import Final

from bench.fuzzexamples import model_contents
from bench.fuzzmutate import changed_bytes
from bench.fuzztarget import Target
from penstock.worker.config import ConfigError, load_config
from penstock.worker.onnxfile import OnnxFileError, read_onnx


class Files(Target):
    """The readers of what lies in a repository: model.toml and model.onnx."""

    name = "files"
    share = 0.02
    _TOML: Final = (
        b'max_batch_size = 32\nmax_queue_delay = "2ms"\npreferred_batch_sizes = [8, 16, 32]\nweight = 1.0\n'
        b'instances = 2\nintra_op_spinning = false\nproviders = ["cuda", "cpu"]\ngpu_memory_limit = 8589934592\n'
    )

    def begin(self, random: Random) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._path = Path(self._directory.name, "file")
        self._onnx = model_contents()["other"]

    def make(self, random: Random) -> tuple[str, bytes]:
        if random.random() < 0.6:
            return "onnx", self._changed(random, self._onnx, self._TOML)
        odd = (b"9" * 5000, b"[" * 2000, b"nan", b'"9e9s"', b"{a.b.c=1}", b"-1", b"1e400", b'"\\ud800"', b"\0")
        values = [*odd, b"[]", b"0", b'""', b"true", b"1" * 300, b'"' + b"9" * 400 + b's"', b"1979-05-27"]
        lines = self._TOML.splitlines(keepends=True)
        for at in range(len(lines)):
            if random.random() < 0.3:
                lines[at] = lines[at].partition(b"=")[0] + b"= " + random.choice(values) + b"\n"
        random.shuffle(lines)
        text = b"".join(lines[: random.randrange(len(lines) + 1)])
        return "toml", self._changed(random, text, self._onnx) if random.random() < 0.5 else text

    @staticmethod
    def _changed(random: Random, data: bytes, other: bytes) -> bytes:
        for _ in range(random.choice((1, 1, 2, 5))):
            data = changed_bytes(random, data, other)
        return data

    def feed(self, each: tuple[str, bytes]) -> bool:
        kind, data = each
        self._path.write_bytes(data)
        try:
            if kind == "toml":
                load_config(self._path)
            else:
                read_onnx(self._path)
        except (ConfigError, OnnxFileError):
            return False
        return True

    def close(self) -> None:
        self._directory.cleanup()

    def bytes_of(self, each: tuple[str, bytes]) -> bytes:
        return each[1]

    def with_bytes(self, each: tuple[str, bytes], data: bytes) -> tuple[str, bytes]:
        return each[0], data
