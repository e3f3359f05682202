"""The shape of the package: imports point down, importing does no work, the public names are listed."""

import ast
import subprocess
import sys
from pathlib import Path

import diffusers_qwenimage

PACKAGE = Path(diffusers_qwenimage.__file__).parent
LAYERS = [
    {"kernels", "images", "schedule", "files", "rotary", "checkpoint", "version"},
    {
        "precompile",
        "block",
        "fused",
        "fused_parts",
        "block_boundary",
        "module_hooks",
        "fused_training",
        "plan",
        "streams",
        "projections",
        "loading",
        "timestep",
        "transformer",
        "transformer_files",
        "graphs",
        "step_cache",
        "vae",
        "vae_fused",
        "offload",
        "quantize",
        "prompt",
        "latents",
        "lora",
    },
    {"denoise"},
    {"pipelines", "training"},
    {"cli", "diffsynth", "registry", "__init__", "__main__"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def test_imports_point_down():
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for imported in imported_modules(path):
            assert LEVEL[imported] <= LEVEL[module], f"{path.relative_to(PACKAGE)} imports {imported}"


def imported_modules(path):
    """First-level modules of the package that a file imports, wherever in the file."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            folder = path.relative_to(PACKAGE).parts[: depth - node.level]
            start = ".".join(("diffusers_qwenimage", *folder, *(node.module or "").split("."))).rstrip(".")
            names = [f"{start}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            module = rest.split(".")[0]
            if package == "diffusers_qwenimage" and module in LEVEL and module != "version":
                yield module


def test_every_module_has_a_layer():
    modules = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py"}
    modules |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert modules <= set(LEVEL)


def test_import_does_no_work():
    code = (
        "import sys, time; start = time.perf_counter(); import diffusers_qwenimage; "
        "print(time.perf_counter() - start, *({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert out[1:] == [], f"imported {out[1:]}"
    assert float(out[0]) < 0.5


def test_public_names_exist_and_are_sorted():
    assert diffusers_qwenimage.__all__ == sorted(diffusers_qwenimage.__all__)
    for name in diffusers_qwenimage.__all__:
        assert getattr(diffusers_qwenimage, name) is not None
    assert set(diffusers_qwenimage.__all__) <= set(dir(diffusers_qwenimage))
