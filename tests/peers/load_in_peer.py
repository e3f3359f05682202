"""Runs inside the environment of another program: load LoRA files with its own code, save what changed.

    python load_in_peer.py < tasks.json > results.json

Needs torch and diffusers; uses DiffSynth-Studio and PEFT where they are installed. It imports nothing of this
package. Each task names a loader, a file and where to put the changes of the weights; each result says
"ok" or gives the error.
"""

import importlib.metadata
import importlib.util
import io
import json
import os
import sys
from contextlib import redirect_stdout

import torch
from safetensors.torch import load_file, save_file

MODEL = {
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 48,
    "in_channels": 64,
    "out_channels": 16,
    "axes_dims_rope": (4, 6, 6),
}


def main():
    request = json.load(sys.stdin)
    if request == "versions":
        names = ("diffusers", "peft", "diffsynth", "torch", "transformers")
        json.dump({name: version(name) for name in names}, sys.stdout)
        return
    printed = io.StringIO()
    with redirect_stdout(printed):  # the loaders print
        results = [run(task) for task in request]
    json.dump(results, sys.stdout)


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(task):
    torch.manual_seed(0)
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(**MODEL)
    try:
        changes = LOADERS[task["loader"]](model, task["path"])
    except Exception as error:  # whatever the other program raises is the answer
        return {"status": "error", "message": f"{type(error).__name__}: {error}"[:500]}
    save_file({name: change.contiguous() for name, change in changes.items()}, task["output"])
    return {"status": "ok", "num_changed": sum(bool(change.any()) for change in changes.values())}


def with_diffusers(model, path):
    from diffusers.loaders import QwenImageLoraLoaderMixin

    state_dict, metadata = QwenImageLoraLoaderMixin.lora_state_dict(path, return_lora_metadata=True)
    if not all("lora" in key for key in state_dict):
        raise ValueError("Invalid LoRA checkpoint.")  # what load_lora_weights does between the two calls
    QwenImageLoraLoaderMixin.load_lora_into_transformer(
        state_dict, transformer=model, adapter_name="peer", metadata=metadata
    )
    return adapter_changes(model)


def with_peft(model, folder):
    from peft import PeftModel

    return adapter_changes(PeftModel.from_pretrained(model, folder).base_model.model)


def adapter_changes(model):
    from peft.tuners.tuners_utils import BaseTunerLayer

    changes = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            for adapter in module.active_adapters:
                changes[name] = module.get_delta_weight(adapter).detach()
    return changes


def with_diffsynth(model, path):
    loader = diffsynth_loader()
    # With weights of zero the sum is the change, without the rounding of a sum with large weights.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    loader.fuse_lora_to_base_model(model, load_file(path), alpha=1.0)
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name.removesuffix(".weight"): value for name, value in named.items() if bool(value.any())}


def diffsynth_loader():
    """DiffSynth-Studio's loader from its file: the package imports video and data libraries on the way."""
    (folder,) = importlib.util.find_spec("diffsynth").submodule_search_locations
    path = os.path.join(folder, "utils", "lora", "general.py")
    spec = importlib.util.spec_from_file_location("diffsynth_general", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GeneralLoRALoader(device="cpu", torch_dtype=torch.float32)


LOADERS = {"diffusers": with_diffusers, "peft": with_peft, "diffsynth": with_diffsynth}

if __name__ == "__main__":
    main()
