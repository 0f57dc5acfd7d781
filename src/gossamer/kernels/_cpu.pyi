"""What csrc/module.cpp exports. Arrays are C-contiguous; results are written into the last array."""

from numpy import float32, float64, int8, int32, int64, uint8, uint16, uint64
from numpy.typing import NDArray

def unpack_codes(packed: NDArray[int32], codes: NDArray[int8], bits: int) -> None: ...
def pack_codes(codes: NDArray[int8], packed: NDArray[int32], bits: int) -> None: ...
def packed_linear(
    x: NDArray[float32],
    packed: NDArray[int32],
    scale: NDArray[float32],
    zero: NDArray[int8] | None,
    bits: int,
    threads: int,
    y: NDArray[float32],
) -> None: ...
def dequantize(
    packed: NDArray[int32],
    scale: NDArray[float32],
    zero: NDArray[int8] | None,
    bits: int,
    threads: int,
    out: NDArray[float32],
) -> None: ...
def dense_linear_bf16(x: NDArray[float32], weight: NDArray[uint16], threads: int, y: NDArray[float32]) -> None: ...
def read_bytes(data: NDArray[uint8], threads: int) -> int: ...
def sample_rows(
    logits: NDArray[float32],
    temperatures: NDArray[float64],
    top_ks: NDArray[int64],
    top_ps: NDArray[float64],
    min_ps: NDArray[float64],
    seeds: NDArray[uint64],
    positions: NDArray[int64],
    threads: int,
    out: NDArray[int64],
) -> None: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
