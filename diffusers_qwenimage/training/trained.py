"""The weights that are trained: a LoRA in the dit, or whole models; their types, and how they are saved.

Trained weights are fp32 (`trainable_dtype`) while the models compute in `dtype`: the layers of a LoRA cast
their weights to the type of their input, whole models run under autocast.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoKrConfig, LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from diffusers_qwenimage.files import write_safetensors, write_text
from diffusers_qwenimage.lora.convert import write_rendered
from diffusers_qwenimage.lora.read import read_state_dict
from diffusers_qwenimage.lora.render import Options, render
from diffusers_qwenimage.lora.targets import Target, find_target
from diffusers_qwenimage.offload import pack_streamed, stream
from diffusers_qwenimage.quantize import quantize_

from .config import ZERO_STAGES, TrainConfig, comma_list
from .continued import begin_with_, read_beginning
from .memory import RESERVE, plan_keep, unit_bytes, weights_budget
from .models import COMPONENTS, ModelFiles
from .modulation import ModulationRows, can_tabulate
from .randomness import Stream, seed_for
from .sharding import shard_

ADAPTER_NAME = "default"
DEFAULT_FORMATS = {"lora": "diffsynth", "dora": "diffusers", "lokr": "comfyui"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TrainedModels:
    """The models that a run changes.

    Attributes:
        modules: by name: dit (always, also if only another model is trained), text_encoder, vae.
        parameters: what is trained, by model and name.
        modulation: the table of the dit's modulation, if it is used.
    """

    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    modulation: ModulationRows | None


def load_trained(
    config: TrainConfig, files: ModelFiles, device: torch.device, sizes: Sequence[tuple[int, int]]
) -> TrainedModels:
    """Load the dit and all models that are trained, and make the trained weights trainable.

    Args:
        config: what is trained.
        files: the models.
        device: where they go.
        sizes: of the pictures (width, height): decides how much memory activations take.

    Raises:
        ValueError: if they do not fit within `vram_limit`.
    """
    trained_dtype, dtype = DTYPES[config.trainable_dtype], compute_dtype(config)
    beginning = read_beginning(config)  # before any weight is loaded
    modules: dict[str, nn.Module] = {}
    modulation = None
    sharded = config.sharding != "none"
    for name in dict.fromkeys(("dit", *config.trained_models)):
        full = not config.is_lora and name in config.trained_models
        if full:
            there = torch.device("cpu") if sharded else device
            own_dtype = dtype if config.sharding in ZERO_STAGES else trained_dtype
            modules[name] = files.load(COMPONENTS[name], own_dtype, there)
            copy_mapped_(modules[name])
            modules[name].requires_grad_(True).train()
        elif name == "dit" and config.is_lora:
            modules[name] = files.load(COMPONENTS[name], dtype, torch.device("cpu"))
            add_adapter_(modules[name], config, trained_dtype)
            if beginning is not None:
                begin_with_(modules[name], beginning, ADAPTER_NAME)
            modulation = place_base_(modules[name], config, device, sizes)
        else:
            modules[name] = files.load(COMPONENTS[name], dtype, device)
    if sharded and config.sharding not in ZERO_STAGES:
        shard_(modules["dit"], device, reshard_after_forward=config.sharding == "full")
    parameters = {
        f"{name}.{key}": parameter
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    enable_checkpointing_(modules["dit"], config, sizes, device)
    return TrainedModels(modules=modules, parameters=parameters, modulation=modulation)


def place_base_(
    transformer: Any, config: TrainConfig, device: torch.device, sizes: Sequence[tuple[int, int]]
) -> ModulationRows | None:
    """Bring a transformer with its adapter from host memory to the device: table, 8 bits, streaming.

    Returns:
        The table of the modulation, if it is used.
    """
    modulation = None
    if config.modulation_table and can_tabulate(transformer):
        sharded = config.sharding != "none"
        embed = deepcopy(transformer.time_text_embed).to(device) if sharded else None
        modulation = ModulationRows(transformer, dtype=compute_dtype(config), device=device, embed=embed)
    if config.base_weights != "plain":
        for block in transformer.transformer_blocks:
            quantize_(block.to(device), config.base_weights)
            if config.vram_limit is not None:
                block.to("cpu")
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    limit = None if config.vram_limit is None else int(config.vram_limit * 2**30)
    if limit is not None:
        budget = weights_budget(
            limit,
            mode=config.checkpointing,
            num_blocks=len(transformer.transformer_blocks),
            unit=unit_bytes(transformer, sizes, config.batch_size, compute_dtype(config)),
            trained_bytes=_num_bytes(trained),
        )
        if _num_bytes(transformer.parameters()) - _num_bytes(trained) > budget:
            plan = stream(transformer, device=device, vram_limit=budget, on_call=(), split=False)
            if plan.num_slots > 1:  # a step takes as long as its copies
                pack_streamed(transformer)
            return modulation
    if config.sharding == "none":
        transformer.to(device)
    return modulation


def add_adapter_(transformer: Any, config: TrainConfig, dtype: torch.dtype) -> None:
    """Put a LoRA, DoRA or LoKr into the transformer; initialised by the seed, and at first without effect."""
    targets = list(comma_list(config.lora_target_modules))
    alpha = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    peft_config: Any
    if config.adapter == "lokr":
        peft_config = LoKrConfig(
            r=config.lora_rank, alpha=config.lora_rank, target_modules=targets, module_dropout=0.0
        )
    else:
        peft_config = LoraConfig(
            r=config.lora_rank,
            lora_alpha=alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            use_dora=config.adapter == "dora",
        )
    torch.manual_seed(seed_for(config.seed, Stream.INITIAL, 0))
    transformer.add_adapter(peft_config, ADAPTER_NAME)
    transformer.train()
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            _compute_in_input_dtype_(module)


def enable_checkpointing_(
    transformer: Any, config: TrainConfig, sizes: Sequence[tuple[int, int]], device: torch.device
) -> None:
    """Choose what each block keeps for its backward pass, and compute the rest again.

    Blocks on the fused path look after that themselves (`fused_training.Keep`); others are wrapped in torch's
    checkpoint unless they keep everything.
    """
    mode = config.checkpointing
    blocks = transformer.transformer_blocks
    unit = unit_bytes(transformer, sizes, config.batch_size, compute_dtype(config))
    free = _free_bytes(transformer, config, device) if mode == "auto" else None
    trained = _num_bytes(parameter for parameter in transformer.parameters() if parameter.requires_grad)
    keep = plan_keep(mode, num_blocks=len(blocks), unit_bytes=unit, free_bytes=free, trained_bytes=trained)
    for block, kept in zip(blocks, keep, strict=True):
        block.keep = kept
    if mode == "none":
        return

    def checkpointed(block: Any, *arguments: Any) -> Any:
        if block.keep == "all" or block.is_trained_fused(*arguments):
            return block(*arguments)
        on_host = save_on_cpu(pin_memory=torch.cuda.is_available()) if mode == "offload" else nullcontext()
        with on_host:
            return checkpoint(block, *arguments, use_reentrant=False)

    transformer.enable_gradient_checkpointing(checkpointed)


def _free_bytes(transformer: Any, config: TrainConfig, device: torch.device) -> int | None:
    """Device memory that activations may fill."""
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0]
    if config.vram_limit is not None:
        free = min(free, int(config.vram_limit * 2**30) - torch.cuda.memory_allocated(device))
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    return free - 2 * _num_bytes(trained) - RESERVE  # of the optimizer


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """What the models compute in; `TrainConfig.on_device` comes first."""
    assert config.dtype is not None
    return DTYPES[config.dtype]


def compute_context(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast where whole models are trained in another type than they compute in."""
    if config.is_lora or config.dtype == config.trainable_dtype or config.sharding in ZERO_STAGES:
        return nullcontext()
    return torch.autocast(device.type, compute_dtype(config))


def find_format(config: TrainConfig) -> Target:
    """The format that a LoRA is saved in.

    Raises:
        ValueError: if it is unknown, or cannot hold this kind of LoRA.
    """
    name = config.lora_format or DEFAULT_FORMATS[config.adapter]
    target = find_target("opensource" if config.align_to_opensource_format else name)
    if config.adapter not in target.kinds:
        fitting = DEFAULT_FORMATS[config.adapter]
        raise ValueError(
            f"The format {target.name} cannot hold a {config.adapter}; leave lora_format and "
            f"align_to_opensource_format out, which takes {fitting}."
        )
    return target


def save_weights(
    path: Path, values: Mapping[str, Tensor], config: TrainConfig, metadata: Mapping[str, str], *, dit: Any
) -> None:
    """Write trained weights as other programs read them, in `dtype`.

    Args:
        path: a .safetensors file, or a folder (without suffix) for the format peft.
        values: by the names of `TrainedModels.parameters`.
        config: what was trained, and the format.
        metadata: of the file.
        dit: the transformer; its config is written beside its weights.
    """
    dtype = compute_dtype(config)
    stored = {name: value.detach().to("cpu", dtype) for name, value in values.items()}
    if not config.is_lora:
        named = {
            f"pipe.{name}".removeprefix(config.remove_prefix_in_ckpt): value for name, value in stored.items()
        }
        write_safetensors(path, named, {"format": "pt", **metadata})
        if config.trained_models == ("dit",):  # tells loaders the sizes of heads, which shapes do not
            write_text(path.with_name("config.json"), dit.to_json_string())
        return
    target = find_format(config)
    tensors = {_plain_key(name): value for name, value in stored.items()}
    alpha = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    settings = {"r": config.lora_rank, "lora_alpha": alpha} if config.adapter != "lokr" else None
    file = read_state_dict(tensors, metadata=metadata, adapter_config=settings, name=str(path))
    options = Options(allow_approximate=True)  # a scale that the format does not hold is rounded into B
    rendered = render(file, target, options)
    prefix = "" if config.remove_prefix_in_ckpt == "pipe.dit." else "pipe.dit."
    if prefix and target.name == "diffsynth":
        renamed = tuple(tensor.renamed(f"{prefix}{tensor.key}") for tensor in rendered.tensors)
        rendered = replace(rendered, tensors=renamed)
    rendered = replace(rendered, metadata={**rendered.metadata, **metadata})
    write_rendered(rendered, path.with_suffix("") if target.directory else path, options)


def base_metadata(config: TrainConfig, files: ModelFiles, step: int, epoch: float) -> dict[str, str]:
    """What a saved file says of its training."""
    settings = {name: getattr(config, name) for name in ("learning_rate", "lora_rank", "adapter", "seed")}
    return {
        "training.base_model": files.name,
        "training.step": str(step),
        "training.epoch": f"{epoch:g}",
        "training.settings": json.dumps(settings),
    }


def copy_mapped_(module: nn.Module) -> None:
    """Give a module its own memory: loaded weights may be views of the file."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def _plain_key(name: str) -> str:
    """A PEFT parameter's name as PEFT saves it, without the model and the name of the adapter."""
    return name.removeprefix("dit.").replace(f".{ADAPTER_NAME}.", ".").removesuffix(f".{ADAPTER_NAME}")


class MasterLinear(nn.Linear):
    """A linear layer that casts its weight to the type of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the type of `input`."""
        return nn.functional.linear(input, self.weight.to(input.dtype))


def _compute_in_input_dtype_(layer: Any) -> None:
    """Let the factors compute in bf16 with fp32 weights, instead of casting their input to fp32."""
    layer.cast_input_dtype_enabled = False
    for factors in (layer.lora_A, layer.lora_B):
        for name, old in factors.items():
            new = MasterLinear(old.in_features, old.out_features, bias=False, device="meta")
            new.weight = old.weight
            factors[name] = new
