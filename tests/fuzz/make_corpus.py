"""Writes the first inputs of the fuzz targets: small files of each kind, right and wrong.

    python tests/fuzz/make_corpus.py

Inputs that a fuzzer found are beside them, under names of their own (found_*).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

from qlora_native import _C

CORPUS = Path(__file__).parent / "corpus"
Tensor = tuple[str, list[int], bytes]


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def safetensors(tensors: dict[str, Tensor]) -> bytes:
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(values)],
        }
        data += values
    return with_header(json.dumps(header).encode(), data)


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def ours() -> dict[str, Tensor]:
    """Matrices that the safetensors target loads: 2 x 64 and 3 x 33, in blocks of 32."""
    return {
        "a": ("U8", [2, 32], bytes(64)),
        "a_absmax": ("U8", [4], bytes(4)),
        "a_absmax2": ("U8", [8], floats(1, 0.5)),
        "b": ("U8", [50], bytes(50)),
        "b_absmax": ("U8", [16], floats(1, 2, 3, 4)),
    }


def bitsandbytes(double_quant: bool, nested_blocksize: int = 256) -> dict[str, Tensor]:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64]}
    tensors = {
        "a": ("U8", [64, 1], bytes(64)),
        "a.quant_map": ("F32", [16], floats(*_C.named_codebook("nf4").values)),
        "a.absmax": ("F32", [2], floats(1, 2)),
    }
    if double_quant:
        state |= {"nested_blocksize": nested_blocksize, "nested_dtype": "float32"}
        state["nested_offset"] = 0.5
        groups = -(-2 // nested_blocksize)
        tensors["a.absmax"] = ("U8", [2], bytes(2))
        tensors["a.nested_absmax"] = ("F32", [groups], floats(*[1.0] * groups))
        tensors["a.nested_quant_map"] = ("F32", [256], floats(*_C.signed_dynamic_map()))
    text = json.dumps(state).encode()
    tensors["a.quant_state.bitsandbytes__nf4"] = ("U8", [len(text)], text)
    return tensors


def dense() -> dict[str, Tensor]:
    return {
        "x": ("BF16", [2, 3], bytes(12)),
        "y": ("F4", [4], bytes(2)),
        "none": ("I64", [0, 5], b""),
        "z": ("F32", [], bytes(4)),
    }


SAFETENSORS = {
    "empty": b"",
    "no_tensors": with_header(b"{}"),
    "metadata": with_header(b'{"__metadata__":{"format":"pt"}} '),
    "long_header": struct.pack("<Q", 2**63) + b"{}",
    "dense": safetensors(dense()),
    "truncated": safetensors(dense())[:-1],
    "ours": safetensors(ours()),
    "bitsandbytes": safetensors(bitsandbytes(False)),
    "bitsandbytes_nested": safetensors(bitsandbytes(True)),
    "bitsandbytes_groups": safetensors(bitsandbytes(True, 1)),
    "overflow": with_header(
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'
    ),
    "overlap": with_header(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        b'"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
        b"abc",
    ),
    "deep": with_header(b'{"a":' * 70),
}

JSON = {
    "empty": b"",
    "numbers": b"[0,-0,1.5e-7,9223372036854775807,9223372036854775808,1e308,1e999]",
    "words": b" [null , true,false ]\n",
    "escapes": rb'["\"\\\/\b\f\n\r\t\u00e9\ud83d\ude00", "\ud800"]',
    "utf8": '["é€😀"]'.encode(),
    "not_utf8": b'["\xed\xa0\x80"]',
    "duplicate": b'{"a":1,"\\u0061":2}',
    "deep": b"[" * 70,
    "nested": b'{"a":{"b":[{"c":[]}]}}',
    "config": b'{"quantization_config":{"quant_method":"qlora_native","quant_type":"nf4",'
    b'"block_size":64,"double_quant":true,"overrides":{"a":{"block_size":32}}}}',
}


def main() -> None:
    for folder, inputs in (("safetensors", SAFETENSORS), ("json", JSON)):
        for name, content in inputs.items():
            (CORPUS / folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
