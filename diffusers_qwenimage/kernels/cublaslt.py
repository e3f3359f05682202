"""Linear layers by cuBLASLt with a tile of our choice.

torch takes the library's first proposal, which is the quickest where a product has the GPU to itself. In a
forward of this model it has not: the text stream's products run beside the image stream's. There the product
that keeps the fewest processors busy is the best, and not the one that is done first (benchmarks/LOG.md).
The library is called directly, by its C interface, which is stable since CUDA 11.

    y[n, o] = sum_i x[n, i] * weight[o, i] + bias[o], then GELU (tanh) if wanted

Shapes: N tokens, I inputs, O outputs; a tile is O x N. A product that is not split adds up its inputs in one
order, whatever the tile: the same bits.
"""

import ctypes
import logging
import sys
import threading
from ctypes import byref, c_float, c_int, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# cublasLt.h and library_types.h
_COMPUTE_32F = 68
_REAL_32F = 0
_TYPES = {torch.float16: 2, torch.bfloat16: 14}
_DESC_TRANSA, _DESC_EPILOGUE, _DESC_BIAS_POINTER, _DESC_BIAS_TYPE = 3, 7, 8, 26
_EPILOGUE_BIAS, _EPILOGUE_GELU_BIAS = 4, 36
_PREFERENCE_WORKSPACE, _PREFERENCE_REDUCTIONS = 1, 3
_PREFERENCE_ALIGNMENTS = (5, 6, 7, 8)
_SUMS_IN_FP32 = 1 | 2  # how split sums may be added: in place or in the type of computation
_CONFIGURATION = {
    "id": (0, c_int),
    "tile": (1, c_uint32),
    "splits": (2, c_int),
    "swizzle": (4, c_uint32),
    "custom": (5, c_uint32),
    "stages": (6, c_uint32),
    "inner": (7, c_uint16),
    "cluster": (8, c_uint16),
}

MOST_WORKSPACE = 32 * 2**20
MANY_TOKENS = 1024  # from here on a product fills a large GPU
# Tiles as cublasLtMatmulTile_t counts them; None: torch's choice.
TILE_128x128, TILE_256x128 = 20, 24
tile_of_few: int | None = None
tile_of_many: int | None = None


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None, *, with_gelu: bool = False
) -> Tensor | None:
    """The layer of `x` [N, I] with the chosen tile: [N, O], in `out` (rows of any stride) if given.

    No gradients. None if torch shall compute it.
    """
    tile = tile_of_many if x.shape[0] >= MANY_TOKENS else tile_of_few
    if tile is None or not _fits(x, weight, bias, out):
        return None
    outputs = weight.shape[0]
    stride = outputs if out is None else out.stride(0)
    key = (tile, x.get_device(), x.dtype, x.shape, outputs, stride, with_gelu)
    chosen: dict[Any, tuple[Product, Proposal | None]] = _of_thread.__dict__.setdefault("chosen", {})
    if key not in chosen:
        problem = Problem(
            num_rows=x.shape[0],
            inputs=x.shape[1],
            outputs=outputs,
            stride=stride,
            dtype=x.dtype,
            with_gelu=with_gelu,
        )
        chosen[key] = _choose(problem, x.device, tile)
    product, proposal = chosen[key]
    if proposal is None:
        return None
    y = x.new_empty(x.shape[0], outputs) if out is None else out
    product(y, x, weight, bias, proposal)
    return y


def _fits(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None) -> bool:
    """Whether the library can be given these as they are, on a GPU for which tiles were chosen."""
    if not x.is_cuda or x.dtype not in _TYPES or x.shape[0] == 0 or not _is_hopper(x.get_device()):
        return False
    if not x.dtype == weight.dtype == bias.dtype:
        return False
    if not (x.is_contiguous() and weight.is_contiguous() and bias.is_contiguous()):
        return False
    multiples = x.data_ptr() | weight.data_ptr() | bias.data_ptr() | 2 * x.shape[1] | 2 * weight.shape[0]
    if out is not None:
        if out.dtype != x.dtype or out.stride(1) != 1:
            return False
        multiples |= out.data_ptr() | 2 * out.stride(0)
    return multiples % 16 == 0


@lru_cache(maxsize=16)
def _is_hopper(device_index: int) -> bool:
    """Whether this is a GPU for which tiles were chosen, and the library can be called."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device_index) != (9, 0):
        return False
    try:
        _library()
    except OSError as error:
        logger.info("torch chooses the tiles of matrix products: %s", error)
        return False
    return True


def _choose(problem: "Problem", device: torch.device, tile: int) -> "tuple[Product, Proposal | None]":
    """The problem's first proposal with that tile, or one that is proposed for many rows and fits."""
    product = Product(problem, device)
    many = Product(replace(problem, num_rows=4 * MANY_TOKENS, stride=problem.outputs), device)
    for proposal in product.proposals(32) + many.proposals(32):
        is_tile = proposal.configuration["tile"] == tile and proposal.configuration["splits"] <= 1
        if is_tile and (accepted := product.accepted(proposal)) is not None:
            return product, accepted
    return product, None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What decides which algorithms there are.

    Attributes:
        num_rows, inputs, outputs: N, I, O.
        stride: elements between two rows of y.
        dtype: of x, weight, bias and y: bf16 or fp16.
        with_gelu: whether GELU follows.
    """

    num_rows: int
    inputs: int
    outputs: int
    stride: int
    dtype: torch.dtype
    with_gelu: bool


class _Algorithm(ctypes.Structure):
    _fields_ = (("data", c_uint64 * 8),)


class _Result(ctypes.Structure):
    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """An algorithm for a problem.

    Attributes:
        algorithm: the library's, opaque.
        workspace: bytes of device memory that it needs.
        configuration: what it is like, for people: tile and so on, by the library's numbers.
    """

    algorithm: _Algorithm
    workspace: int
    configuration: dict[str, int]


class Product:
    """A problem's descriptions for the library, on one device and for one thread."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self._library, self._handle = _library(), _handle(device.index)
        self.problem, self._device = problem, device
        self._layouts: list[c_void_p] = []
        kind = _TYPES[problem.dtype]
        self._description = c_void_p()
        self._call("cublasLtMatmulDescCreate", byref(self._description), _COMPUTE_32F, _REAL_32F)
        self._set(_DESC_TRANSA, c_int(1))
        self._set(_DESC_EPILOGUE, c_uint32(_EPILOGUE_GELU_BIAS if problem.with_gelu else _EPILOGUE_BIAS))
        self._set(_DESC_BIAS_TYPE, c_int(kind))
        # Column by column, as the library counts: y' [O, N] = weight [O, I] x' [I, N].
        self._weight = self._layout(kind, problem.inputs, problem.outputs, problem.inputs)
        self._x = self._layout(kind, problem.inputs, problem.num_rows, problem.inputs)
        self._y = self._layout(kind, problem.outputs, problem.num_rows, problem.stride)
        self._one, self._zero = c_float(1), c_float(0)

    def proposals(self, most: int, *, workspace: int = MOST_WORKSPACE) -> list[Proposal]:
        """At most so many algorithms, the library's favourite first."""
        preference = c_void_p()
        self._call("cublasLtMatmulPreferenceCreate", byref(preference))
        try:
            settings = [
                (_PREFERENCE_WORKSPACE, c_uint64(workspace)),
                (_PREFERENCE_REDUCTIONS, c_uint32(_SUMS_IN_FP32)),
                *[(which, c_uint32(16)) for which in _PREFERENCE_ALIGNMENTS],
            ]
            for which, value in settings:
                name = "cublasLtMatmulPreferenceSetAttribute"
                self._call(name, preference, which, byref(value), c_size_t(ctypes.sizeof(value)))
            results, found = (_Result * most)(), c_int()
            self._call(
                "cublasLtMatmulAlgoGetHeuristic",
                self._handle,
                self._description,
                self._weight,
                self._x,
                self._y,
                self._y,
                preference,
                most,
                results,
                byref(found),
            )
        finally:
            self._library.cublasLtMatmulPreferenceDestroy(preference)
        return [
            Proposal(
                algorithm=_copied(result.algorithm),
                workspace=result.workspace,
                configuration=self._configuration(result.algorithm),
            )
            for result in results[: found.value]
            if result.state == 0
        ]

    def accepted(self, proposal: Proposal) -> Proposal | None:
        """A proposal for another problem as one for this; None if it does not fit."""
        result = _Result()
        layouts = (self._weight, self._x, self._y, self._y)
        status = self._library.cublasLtMatmulAlgoCheck(
            self._handle, self._description, *layouts, byref(proposal.algorithm), byref(result)
        )
        if status or result.workspace > MOST_WORKSPACE:
            return None
        return replace(proposal, workspace=result.workspace)

    def __call__(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, proposal: Proposal) -> None:
        """Write the layer of `x` into `out`; all of them as the problem says, at multiples of 16 bytes."""
        self._set(_DESC_BIAS_POINTER, c_void_p(bias.data_ptr()))
        size = proposal.workspace
        workspace = torch.empty(size, dtype=torch.uint8, device=self._device) if size else None
        self._call(
            "cublasLtMatmul",
            self._handle,
            self._description,
            byref(self._one),
            c_void_p(weight.data_ptr()),
            self._weight,
            c_void_p(x.data_ptr()),
            self._x,
            byref(self._zero),
            c_void_p(out.data_ptr()),
            self._y,
            c_void_p(out.data_ptr()),
            self._y,
            byref(proposal.algorithm),
            c_void_p(None if workspace is None else workspace.data_ptr()),
            c_size_t(size),
            c_void_p(torch.cuda.current_stream(self._device).cuda_stream),
        )

    def __del__(self) -> None:
        for layout in self.__dict__.get("_layouts", ()):
            self._library.cublasLtMatrixLayoutDestroy(layout)
        if "_description" in self.__dict__:
            self._library.cublasLtMatmulDescDestroy(self._description)

    def _layout(self, kind: int, rows: int, columns: int, stride: int) -> c_void_p:
        layout = c_void_p()
        name = "cublasLtMatrixLayoutCreate"
        self._call(name, byref(layout), kind, c_uint64(rows), c_uint64(columns), ctypes.c_int64(stride))
        self._layouts.append(layout)
        return layout

    def _set(self, attribute: int, value: Any) -> None:
        name = "cublasLtMatmulDescSetAttribute"
        self._call(name, self._description, attribute, byref(value), c_size_t(ctypes.sizeof(value)))

    def _configuration(self, algorithm: _Algorithm) -> dict[str, int]:
        configuration = {}
        for name, (attribute, kind) in _CONFIGURATION.items():
            value, written = kind(), c_size_t()
            size = c_size_t(ctypes.sizeof(kind))
            self._library.cublasLtMatmulAlgoConfigGetAttribute(
                byref(algorithm), attribute, byref(value), size, byref(written)
            )
            configuration[name] = value.value
        return configuration

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} of cuBLASLt returned status {status}, for {self.problem}.")


def _copied(algorithm: _Algorithm) -> _Algorithm:
    return _Algorithm.from_buffer_copy(algorithm)


@lru_cache(maxsize=1)
def _library() -> Any:
    """The library that torch has loaded. Calls keep Python's lock: they only queue work."""
    major = str(torch.version.cuda).split(".")[0]
    name = f"cublasLt64_{major}.dll" if sys.platform == "win32" else f"libcublasLt.so.{major}"
    return ctypes.PyDLL(name)


def _handle(device_index: int) -> c_void_p:
    handles: dict[int, c_void_p] = _of_thread.__dict__.setdefault("handles", {})
    if device_index not in handles:
        handle = c_void_p()
        with torch.cuda.device(device_index):
            status = _library().cublasLtCreate(byref(handle))
        if status:
            raise RuntimeError(f"cublasLtCreate returned status {status}.")
        handles[device_index] = handle
    return handles[device_index]


_of_thread = threading.local()
