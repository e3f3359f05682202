"""Triton kernels launched without the work that Triton's own launcher does anew every time.

`kernel[grid](...)` looks at every argument to find the compiled variant: 20 to 60 microseconds of the
processor, hundreds of times per forward. Here the variant is found by a short key (types, constants, whether
all pointers are multiples of 16 bytes) and is given plain addresses. Numbers must be declared
`do_not_specialize` in the kernel, so that a variant does not depend on their values.

The first call of each variant, Triton's interpreter, and versions of Triton or torch whose internals were not
checked or have changed take Triton's own launcher; the reason is logged.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import triton_is_installed

if triton_is_installed():
    import triton

logger = logging.getLogger(__name__)

# What `_launch_of` and the calls of its result assume of `CompiledKernel.run`.
CHECKED_VERSIONS = ("3.6",)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A variant of a kernel that calls with such arguments run, see `Launcher.__call__`; all pointers are
    multiples of 16 bytes.

    Attributes:
        launcher: of the kernel.
        types: what the pointers point to.
        numbers, constants, num_warps, num_stages: as in a call; what the numbers are does not matter.
    """

    launcher: "Launcher"
    types: tuple[torch.dtype, ...]
    numbers: tuple[float, ...]
    constants: tuple[Any, ...]
    num_warps: int
    num_stages: int | None = None

    def compile(self) -> None:
        """Compile and load it on the current device, so that the first call finds it."""
        self.launcher.compile(self)


class Launcher:
    """One Triton kernel whose parameters are pointers, then numbers, then constants."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._variants: dict[tuple[Any, ...], tuple[Any, Any, tuple[Any, ...]]] = {}
        self._why_not = _why_not_direct(kernel)

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: Sequence[Tensor],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
        num_warps: int,
        offsets: Sequence[int] | None = None,
        num_stages: int | None = None,
    ) -> None:
        """Launch on the current stream of the tensors' device.

        Args:
            grid: programs along three axes.
            tensors: one per pointer, all on one device.
            numbers: values of the parameters after the pointers.
            constants: values of the `tl.constexpr` parameters at the end.
            num_warps: warps per program.
            offsets: elements to add to each pointer.
            num_stages: steps of a loop that are loaded ahead; Triton's choice if not given.
        """
        device = tensors[0].get_device()
        if self._why_not is not None:
            _say(self._why_not)
        elif device == _current_device():
            pointers = [tensor.data_ptr() for tensor in tensors]
            if offsets is not None:
                for index, offset in enumerate(offsets):
                    if offset:
                        pointers[index] += offset * tensors[index].element_size()
            bits = 0
            for pointer in pointers:
                bits |= pointer
            key = (
                device,
                bits & 15 == 0,
                num_warps,
                num_stages,
                constants,
                *[tensor.dtype for tensor in tensors],
            )
            variant = self._variants.get(key)
            if variant is not None:
                launch, function, settings = variant
                stream = torch._C._cuda_getCurrentRawStream(device)
                launch(*grid, stream, function, *settings, *pointers, *numbers, *constants)
                return
            if bits & 15 == 0:  # other mixtures of alignments are several variants: left to Triton
                compiled = self._slowly(grid, tensors, numbers, constants, num_warps, offsets, num_stages)
                found = _launch_of(compiled)
                if found is None:
                    self._why_not = "what Triton compiles has other attributes"
                else:
                    self._variants[key] = found
                return
        self._slowly(grid, tensors, numbers, constants, num_warps, offsets, num_stages)

    def compile(self, variant: Variant) -> None:
        """See `Variant`; Triton's interpreter has nothing to compile."""
        if not hasattr(self._kernel, "device_caches"):
            return
        options = {} if variant.num_stages is None else {"num_stages": variant.num_stages}
        compiled = self._kernel.warmup(
            *variant.types,
            *variant.numbers,
            *variant.constants,
            grid=(1, 1, 1),
            num_warps=variant.num_warps,
            **options,
        )
        _ = compiled.run  # made when it is first asked for: some versions of Triton call a C compiler for it

    def _slowly(
        self,
        grid: tuple[int, int, int],
        tensors: Sequence[Tensor],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
        num_warps: int,
        offsets: Sequence[int] | None,
        num_stages: int | None,
    ) -> Any:
        moved = [
            _from(tensor, offset)
            for tensor, offset in zip(tensors, offsets or [0] * len(tensors), strict=True)
        ]
        with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
            options = {} if num_stages is None else {"num_stages": num_stages}
            return self._kernel[grid](*moved, *numbers, *constants, num_warps=num_warps, **options)


def _why_not_direct(kernel: Any) -> str | None:
    version = ".".join(triton.__version__.split(".")[:2])
    if not hasattr(kernel, "device_caches"):
        return "the kernel is interpreted"
    if version not in CHECKED_VERSIONS:
        return f"Triton {version} was not checked, only {', '.join(CHECKED_VERSIONS)}"
    if not hasattr(torch._C, "_cuda_getCurrentRawStream"):
        return "this version of torch does not tell its stream"
    return None


@lru_cache(maxsize=8)
def _say(reason: str) -> None:
    logger.info("Kernels are launched by Triton itself, which takes more of the processor: %s.", reason)


def _launch_of(compiled: Any) -> tuple[Any, Any, tuple[Any, ...]] | None:
    """What launches a variant, its function, and the arguments between that and the kernel's own.

    `CompiledKernel.run` is a Python object around a C function. What it adds is memory that some kernels ask
    for; ours do not, and call the C function. None if Triton's classes are not as they were.
    """
    if not all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
        return None
    run, settings = compiled.run, (compiled.packed_metadata, None, None, None)
    if not all(hasattr(run, name) for name in _OF_RUN):
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return run, compiled.function, settings
    return run.launch, compiled.function, (run.launch_cooperative_grid, run.launch_pdl, None, None, *settings)


_OF_RUN = ("launch", "global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")


def _current_device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1


def _from(tensor: Tensor, offset: int) -> Tensor:
    """What begins `offset` elements after the tensor's first."""
    if offset == 0:
        return tensor
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + offset)


@lru_cache(maxsize=64)
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 where there is none and programs run one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def power_of_2(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << (value - 1).bit_length()
