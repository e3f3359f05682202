"""`qwenimage env`: what is installed, which devices there are, what can be used and why the rest cannot."""

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from .placement import GIB, WORKING_MEMORY, host_bytes

PACKAGES = (
    "diffusers-qwenimage",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "huggingface-hub",
    "modelscope",
    "numpy",
    "pillow",
    "triton",
)
SHOWN = ("diffusers-qwenimage", "torch", "diffusers", "transformers")
MORE = ("Packages and attention backends: qwenimage env --all",)
# Weights of Qwen-Image in bfloat16, in GiB: transformer 38.05, text encoder 15.45, VAE 0.24.
WHOLE_MODEL = 54
SMALLEST = 2.0  # GiB free on a GPU for a picture of 1328x1328
# GiB that a picture needs on the device or pinned on the host: the transformer without its modulation (its
# other third), in bfloat16 or fp8, and the language model.
TRANSFORMER, TRANSFORMER_FP8, LANGUAGE_MODEL = 25.4, 12.8, 12.2
ACTIVATIONS = 2.0  # GiB, with the VAE, and a buffer
SPARE_HOST = 4.0  # GiB of host memory beside what is pinned
EMBEDDED_MODEL = Path(__file__).parents[1] / "assets" / "tiny"
# What a device may answer when it cannot run an attention backend.
BACKEND_ERRORS = (RuntimeError, ValueError, TypeError, ImportError, AssertionError)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `qwenimage`."""
    parser = subparsers.add_parser(
        "env",
        help="show versions, devices, memory, and what can be used",
        description="Show recommended settings, versions, devices and memory. "
        "Add the output of --all to a bug report.",
        allow_abbrev=False,
    )
    parser.add_argument("--all", action="store_true", help="show every package and attention backend")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    report = environment(try_backends=arguments.json or arguments.all)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join([*short_lines(report), *(all_lines(report) if arguments.all else MORE)]))
    return 0


def environment(*, try_backends: bool = True) -> dict[str, Any]:
    """The report, of plain JSON types; memory in GiB. Without `try_backends` they are left out."""
    devices = gpus()
    memory = host_memory()
    device = "cuda" if devices else "cpu"
    return {
        "python": f"{platform.python_version()} ({platform.platform()})",
        "packages": {name: package_version(name) for name in PACKAGES},
        "host": {"cpus": num_cpus(), **memory},
        "gpus": devices,
        "no_gpu_reason": None if devices else no_gpu_reason(),
        "attention_backends": attention_backends(device) if try_backends else {},
        "fused_path": fused_path(device),
        "embedded_model": embedded_model(),
        "recommended": recommended(devices, memory["memory_total"]),
    }


def package_version(name: str) -> str | None:
    """The installed version, None if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def num_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def host_memory() -> dict[str, float]:
    """Total and available memory in GiB; the total is a container's limit where there is one."""
    import psutil

    limit = host_bytes()
    available = min(int(psutil.virtual_memory().available), limit)
    return {"memory_total": _gib(limit), "memory_available": _gib(available)}


def gpus() -> list[dict[str, Any]]:
    """The NVIDIA (or ROCm) GPUs that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": torch.cuda.get_device_name(index),
                "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
                "memory_total": _gib(total),
                "memory_free": _gib(free),
                "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
            }
        )
    return found


def no_gpu_reason() -> str:
    """Why torch sees no NVIDIA GPU."""
    import torch

    if torch.backends.mps.is_available():
        return "Apple GPU: --device mps works in torch, but is not tested here"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without CUDA; install the one for your GPU"
    return f"torch is built for CUDA {torch.version.cuda}, but finds no GPU or driver (see nvidia-smi)"


def attention_backends(device: str) -> dict[str, str]:
    """For each name that `transformer.set_attention_backend` takes: "works", or why not.

    Tried with a small attention on `device`, but for kernels of the Hub, which would be fetched, and flex,
    which has to be compiled.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    return {backend.value: _try_backend(backend, device) for backend in AttentionBackendName}


def _try_backend(backend: Any, device: str) -> str:
    import torch
    from diffusers.models import attention_dispatch

    query = torch.ones(1, 16, 2, 64, device=device, dtype=torch.bfloat16)
    try:
        attention_dispatch._check_attention_backend_requirements(backend)
        if backend.value.endswith("_hub"):
            return "can be fetched from the Hub on use"
        if backend == attention_dispatch.AttentionBackendName.FLEX:
            return "works"
        attention_dispatch.dispatch_attention_fn(query, query, query, backend=backend)
    except BACKEND_ERRORS as error:
        return " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return "works"


def fused_path(device: str) -> str:
    """Whether the transformer's fused path runs on `device`, and why or why not."""
    import torch

    from diffusers_qwenimage.kernels import backend

    chosen = backend(torch.device(device, 0) if device == "cuda" else torch.device(device))
    return f"{chosen.name} ({chosen.reason})"


def embedded_model() -> str:
    """Whether the small model is inside the package."""
    if (EMBEDDED_MODEL / "model_index.json").is_file():
        return str(EMBEDDED_MODEL)
    return f"missing from {EMBEDDED_MODEL}; reinstall the package"


def recommended(devices: list[dict[str, Any]], host_total: float) -> dict[str, str]:
    """What `qwenimage generate` chooses here, and whether Qwen-Image fits."""
    if not devices:
        enough = "enough, but slow" if host_total > WHOLE_MODEL else "not enough"
        return {
            "device": "cpu",
            "dtype": "bfloat16, float32 for the embedded model",
            "qwen_image": f"needs {WHOLE_MODEL} GiB of memory; here are {host_total:.0f}, {enough}",
        }
    first = devices[0]
    dtype = "bfloat16" if first["bfloat16"] else "float16 (this GPU has no bfloat16; not tested)"
    placement = recommended_placement(first["memory_free"], host_total)
    return {"device": first["device"], "dtype": dtype, "qwen_image": placement}


def recommended_placement(free: float, host_total: float) -> str:
    """How Qwen-Image is best placed with so many GiB free on the GPU, and so many in the host."""
    if free > WHOLE_MODEL + WORKING_MEMORY / GIB:
        return f"all parts on the GPU ({WHOLE_MODEL} GiB of weights)"
    if free < SMALLEST:
        return f"does not fit: {free:.1f} GiB are free, {SMALLEST:g} are needed at least"
    room = max(0.0, free - ACTIVATIONS)
    pinned = max(0.0, TRANSFORMER + LANGUAGE_MODEL - room)
    in_fp8 = max(0.0, TRANSFORMER_FP8 + LANGUAGE_MODEL - room)
    if room > TRANSFORMER:
        how = "no options: the transformer stays on the GPU"
        return how + (", the text encoder streams from host memory" if pinned else "")
    if host_total >= pinned + SPARE_HOST:
        return (
            f"no options: what does not fit streams from {pinned:.0f} GiB of host memory. --vram N leaves "
            "memory of the GPU to others, --weights fp8 halves what streams"
        )
    if host_total >= in_fp8 + SPARE_HOST:
        return (
            f"--weights fp8: what does not fit streams from {in_fp8:.0f} GiB of host memory; bfloat16 needs "
            f"{pinned:.0f} of the {host_total:.0f} here"
        )
    return (
        f"--weights fp8, slowly: streaming needs {in_fp8:.0f} GiB of host memory, here are {host_total:.0f}, "
        "so that the text encoder, or all, is read from the files"
    )


def short_lines(report: dict[str, Any]) -> list[str]:
    """What decides how pictures are made here, for reading."""
    host, advice = report["host"], report["recommended"]
    versions = [f"{name} {report['packages'][name] or 'missing'}" for name in SHOWN]
    devices = [
        f"GPU          {gpu['device']}, {gpu['name']}, compute capability {gpu['compute_capability']}, "
        f"{gpu['memory_free']:.1f} of {gpu['memory_total']:.1f} GiB free"
        for gpu in report["gpus"]
    ]
    return [
        f"Recommended  {advice['device']}, {advice['dtype']}. Qwen-Image: {advice['qwen_image']}",
        *(devices or [f"GPU          none: {report['no_gpu_reason']}"]),
        f"Host         {host['cpus']} CPUs, "
        f"{host['memory_available']:.1f} of {host['memory_total']:.1f} GiB of memory available",
        f"Fused path   {report['fused_path']}",
        f"Versions     {', '.join(versions)}",
    ]


def all_lines(report: dict[str, Any]) -> list[str]:
    """The rest, for bug reports."""
    packages = [f"  {name:<20} {version or 'not installed'}" for name, version in report["packages"].items()]
    backends = report["attention_backends"]
    working = [name for name, answer in backends.items() if answer == "works"]
    others: dict[str, list[str]] = {}
    for name, answer in backends.items():
        if answer != "works":
            others.setdefault(_without_name(answer, name), []).append(name)
    return [
        f"Python       {report['python']}",
        "Packages",
        *packages,
        f"Attention backends  {', '.join(working)}",
        *(f"  not {', '.join(names)}: {reason}" for reason, names in others.items()),
        f"Embedded model  {report['embedded_model']}",
    ]


def _without_name(answer: str, name: str) -> str:
    """The reason without the backend's own name, so that equal reasons are shown once."""
    return answer.replace(f" '{name}'", "").replace(f"'{name}' ", "")


def _gib(size: int) -> float:
    return round(size / GIB, 2)
