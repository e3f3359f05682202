"""The kernels compile for GPUs that are not there, at the widths of the published model."""

import os
import subprocess
import sys

import pytest
from fused_cases import needs_triton

CODE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from diffusers_qwenimage.kernels import int8, norm, norm_backward, packing, quantized, rope

BF16, I32, F32, FP8, INT8 = "*bf16", "*i32", "*fp32", "*fp8e4nv", "*i8"
NORM = dict(D=3072, BLOCK=4096, HAS_GATE=True, HAS_NORM=True)
ROPE = dict(H=24, DIM=128, HEADS=16, BLOCK=128, FROM_SOURCE=False)
GELU = dict(X_STRIDE=12288, D=12288, BLOCK=4096, PARTS=3, GELU=True)
INT8_SIZES = dict(INPUTS=3072, OUTPUTS=9216, OUT_STRIDE=9216, HAS_BIAS=True, ROWS=128, GROUP=8)


def kernels(has_fp8):
    yield rope._rope_kernel, [BF16, BF16, I32, BF16, BF16, F32, "i32", "fp32"], ROPE, {"num_warps": 2}
    for tile in (dict(COLUMNS=128, DEPTH=64), dict(COLUMNS=256, DEPTH=128)):
        pointers = [INT8, F32, INT8, F32, BF16, BF16]
        options = {"num_warps": 8, "num_stages": 3}
        yield int8._int8_kernel, [*pointers, "i32"], {**INT8_SIZES, **tile}, options
    words = ["*u8", "*u8", "*u8", "*i16", "i32"]
    yield packing._unpack_kernel, words, dict(HALF=1024), {"num_warps": 4}
    backward = dict(D=3072, BLOCK=4096, HAS_GATE=True, HAS_NORM=True, HAS_TOTAL=True)
    yield norm_backward._kernel, [*[BF16] * 8, F32, "i32", "i32", "fp32"], backward, {"num_warps": 8}
    for out, limit, rotation in ((BF16, 0.0, 0), (FP8, 448.0, 0), (INT8, 127.0, 256)):
        if out == FP8 and not has_fp8:
            continue
        constants = dict(LIMIT=limit, ROTATION=rotation)
        pointers = [BF16] * 5 + [I32, BF16, out, F32]
        for stride in (0, 18432):
            arguments = {**NORM, **constants, "STRIDE": stride, "HAS_INDEX": stride > 0}
            yield norm._norm_kernel, [*pointers, "i32", "fp32"], arguments, {"num_warps": 4}
        if limit:
            yield quantized._quantize_kernel, [BF16, out, F32], {**GELU, **constants}, {"num_warps": 16}
            sizes = dict(D=3072, BLOCK=4096, ROTATION=rotation)
            yield quantized._dequantize_kernel, [out, F32, BF16], sizes, {"num_warps": 8}


capability = int(sys.argv[1])
for kernel, types, constants, options in kernels(capability >= 89):
    names = [parameter.name for parameter in kernel.params]
    rest = iter(types)
    signature = {p.name: "constexpr" if p.is_constexpr else next(rest) for p in kernel.params}
    given = {(names.index(name),): value for name, value in constants.items()}
    pointers = [index for index, name in enumerate(names) if signature[name].startswith("*")]
    aligned = {(index,): [["tt.divisibility", 16]] for index in pointers}
    source = ASTSource(kernel, signature, given, aligned)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(kernel.__name__, len(compiled.asm["cubin"]), "spilled" if "ld.local" in compiled.asm["ptx"] else "")
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_gpu(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = [sys.executable, "-c", CODE, str(capability)]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert len(lines) == (15 if capability >= 89 else 11) and not any("spilled" in line for line in lines)
