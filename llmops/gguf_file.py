"""Reads GGUF, llama.cpp's file of weights and everything that belongs to them.

Layout, little-endian: "GGUF", version, counts of tensors and fields; the fields (name, type,
value); per tensor its name, shape, type and offset; padding; the tensors. The `gguf` package knows
the quantized types and dequantizes them. Its reader makes an array of every string of the
vocabulary, which takes seconds and 160 MB for SmolLM2, hence this one: 0.1 s.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


class _Stored(NamedTuple):
    shape: tuple[int, ...]  # as in torch: the file has the fastest dimension first
    type: int
    offset: int


class GGUFFile:
    """fields: name -> value; shapes: tensor name -> shape; read(name): the tensor in fp32."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            empty = not path.stat().st_size  # which mmap refuses
            self._bytes = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        try:
            self._read_head()
        except (struct.error, LookupError, MemoryError, OverflowError, RecursionError) as error:
            raise self._damaged(f"near byte {self._at}") from error

    def _read_head(self) -> None:
        if self._bytes[:4] != b"GGUF":
            raise ValueError(f"{self.path}: this is no GGUF file (it does not begin with GGUF)")
        self._at = 4
        version, tensors, fields = self._take("I"), self._take("Q"), self._take("Q")
        if version not in (2, 3):
            raise ValueError(
                f"{self.path}: its GGUF version is {version}, read are 2 and 3 (little-endian); "
                "convert the model again with a current llama.cpp"
            )
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            name = self._text()
            self.fields[name] = self._value(self._take("I"))
        self._stored = {}
        for _ in range(tensors):
            name = self._text()
            shape = tuple(self._take("Q") for _ in range(self._take("I")))[::-1] or (1,)
            self._stored[name] = _Stored(shape, self._take("I"), self._take("Q"))
        alignment = int(self.fields.get("general.alignment", 32)) or 1
        self._data = math.ceil(self._at / alignment) * alignment
        self.shapes = {name: stored.shape for name, stored in self._stored.items()}

    def _take(self, kind: str) -> Any:
        value = struct.unpack_from("<" + kind, self._bytes, self._at)[0]
        self._at += struct.calcsize(kind)
        return value

    def _text(self) -> str:
        length = self._take("Q")
        self._at += length
        if self._at > len(self._bytes):
            raise struct.error
        return str(self._bytes[self._at - length : self._at], "utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._take(_SCALARS[kind])
        kind, length = self._take("I"), self._take("Q")
        if kind in _SCALARS:
            values = struct.unpack_from(f"<{length}{_SCALARS[kind]}", self._bytes, self._at)
            self._at += struct.calcsize(f"<{length}{_SCALARS[kind]}")
            return list(values)
        return [self._value(kind) for _ in range(length)]

    def read(self, name: str) -> Tensor:
        """The tensor in fp32, [out, in] as in torch."""
        import gguf
        import numpy

        stored = self._stored[name]
        try:
            kind = gguf.GGMLQuantizationType(stored.type)
            block, size = gguf.GGML_QUANT_SIZES[kind]  # elements, and the bytes that hold them
        except (ValueError, KeyError) as error:
            raise self._unknown(name, f"type {stored.type}") from error
        shape = (*stored.shape[:-1], stored.shape[-1] // block * size)
        start, length = self._data + stored.offset, math.prod(shape)
        if start + length > len(self._bytes) or stored.shape[-1] % block:
            raise self._damaged(f"within {name}")
        raw = numpy.frombuffer(self._bytes, numpy.uint8, length, start).reshape(shape)
        try:
            return torch.tensor(gguf.quants.dequantize(raw, kind))
        except NotImplementedError as error:
            raise self._unknown(name, kind.name) from error

    def _damaged(self, where: str) -> ValueError:
        return ValueError(f"{self.path}: the file breaks off or is damaged {where}; get it anew")

    def _unknown(self, name: str, kind: str) -> ValueError:
        return ValueError(
            f"{self.path}: {name} is stored as {kind}, which the installed gguf package cannot "
            "read; pip install --upgrade gguf"
        )
