"""The config of a component: from a `config.json` beside its file, else from the shapes of its tensors.

Shapes do not say everything. What they leave open is taken from the published Qwen-Image models (head size
128 with RoPE axes 16+56+56, latent statistics of the 16-channel VAE, settings of Qwen2.5-VL-7B); where even
that does not fit, the error asks for a config.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .reader import Checkpoint

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
# component -> (key of config.json that names the class, accepted values)
CONFIG_CLASSES = {
    "transformer": ("_class_name", ("QwenImageTransformer2DModel",)),
    "vae": ("_class_name", ("AutoencoderKLQwenImage",)),
    "text_encoder": ("model_type", ("qwen2_5_vl",)),
}
# ComfyUI's remark in files of models whose reference tokens are modulated as clean (`zero_cond_t`).
ZERO_COND_MARKER = "__index_timestep_zero__"
PATCH_SIZE = 2


def sidecar_config(component: str, file: Path) -> dict[str, Any] | None:
    """The `config.json` beside `file`, if there is one and it is of this component.

    Raises:
        ValueError: if it is not readable JSON.
    """
    path = file.parent / CONFIG_NAME
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}). Fetch it again or remove it.") from error
    key, accepted = CONFIG_CLASSES[component]
    if not isinstance(config, dict) or config.get(key) not in accepted:
        logger.info("%s is not the config of a %s; the shapes of %s are used.", path, component, file.name)
        return None
    return config


def infer_config(component: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Constructor arguments of the component's class (text encoder: of `Qwen2_5_VLConfig`), from shapes.

    Raises:
        ValueError: if tensors are missing that are needed to tell, or the sizes are not those of a published
            model so that other settings cannot be known.
    """
    config = INFER[component](checkpoint)
    logger.info("No config.json beside %s; its shapes say %s.", checkpoint.files[0], config)
    return config


def _infer_transformer(checkpoint: Checkpoint) -> dict[str, Any]:
    head = _shape(checkpoint, "transformer_blocks.0.attn.norm_q.weight")[0]
    width, in_channels = _shape(checkpoint, "img_in.weight")
    if head != 128:
        raise _needs_config(checkpoint, f"heads of size {head} (published: 128) leave the RoPE axes open")
    layered = "time_text_embed.addition_t_embedding.weight" in checkpoint.tensors
    return {
        "patch_size": PATCH_SIZE,
        "in_channels": in_channels,
        "out_channels": _shape(checkpoint, "proj_out.weight")[0] // PATCH_SIZE**2,
        "num_layers": _count(checkpoint, r"transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": _shape(checkpoint, "txt_in.weight")[1],
        "axes_dims_rope": (16, 56, 56),
        "zero_cond_t": ZERO_COND_MARKER in checkpoint.tensors,
        # The layered model is the only published one with an additional condition, and has 3-D RoPE.
        "use_additional_t_cond": layered,
        "use_layer3d_rope": layered,
    }


def _infer_vae(checkpoint: Checkpoint) -> dict[str, Any]:
    base_dim, input_channels = _shape(checkpoint, "encoder.conv_in.weight")[:2]
    z_dim = _shape(checkpoint, "post_quant_conv.weight")[0]
    if z_dim != 16:
        raise _needs_config(
            checkpoint, f"the statistics of {z_dim} latent channels (published: 16) are unknown"
        )
    stages: list[list[int]] = [[]]  # output widths of the residual blocks between resamplings
    temporal: list[bool] = []
    for index in range(_count(checkpoint, r"encoder\.down_blocks\.(\d+)\.")):
        block = f"encoder.down_blocks.{index}"
        if f"{block}.resample.1.weight" in checkpoint.tensors:
            temporal.append(f"{block}.time_conv.weight" in checkpoint.tensors)
            stages.append([])
        else:
            stages[-1].append(_shape(checkpoint, f"{block}.conv2.weight")[0])
    if len({len(widths) for widths in stages}) != 1 or any(width % base_dim for width in sum(stages, [])):
        raise _needs_config(checkpoint, f"the encoder's stages have the widths {stages}")
    return {
        "base_dim": base_dim,
        "z_dim": z_dim,
        "dim_mult": [widths[-1] // base_dim for widths in stages],
        "num_res_blocks": len(stages[0]),
        "attn_scales": [],
        "temperal_downsample": temporal,
        "input_channels": input_channels,
    }


def _infer_text_encoder(checkpoint: Checkpoint) -> dict[str, Any]:
    layer = "model.language_model.layers.0"
    vocabulary, hidden = _shape(checkpoint, "model.language_model.embed_tokens.weight")
    vision = _shape(checkpoint, "model.visual.patch_embed.proj.weight")[0]
    if hidden != 3584 or vision != 1280:
        raise _needs_config(
            checkpoint,
            f"hidden sizes {hidden} and {vision} (published: 3584, 1280) leave the heads open",
        )
    return {
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": _shape(checkpoint, f"{layer}.mlp.gate_proj.weight")[0],
            "num_hidden_layers": _count(checkpoint, r"model\.language_model\.layers\.(\d+)\."),
            "num_attention_heads": _shape(checkpoint, f"{layer}.self_attn.q_proj.weight")[0] // 128,
            "num_key_value_heads": _shape(checkpoint, f"{layer}.self_attn.k_proj.weight")[0] // 128,
            "max_position_embeddings": 128000,
            "max_window_layers": 28,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": _count(checkpoint, r"model\.visual\.blocks\.(\d+)\."),
            "hidden_size": vision,
            "intermediate_size": _shape(checkpoint, "model.visual.blocks.0.mlp.gate_proj.weight")[0],
            "out_hidden_size": _shape(checkpoint, "model.visual.merger.mlp.2.weight")[0],
            "num_heads": 16,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "tie_word_embeddings": False,
    }


INFER: Mapping[str, Callable[[Checkpoint], dict[str, Any]]] = {
    "transformer": _infer_transformer,
    "vae": _infer_vae,
    "text_encoder": _infer_text_encoder,
}


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    if name not in checkpoint.tensors:
        raise ValueError(
            f"{checkpoint.files[0]} has no tensor {name!r}, which every such checkpoint has; the files are "
            "incomplete. Give all shards."
        )
    return checkpoint.shape(name)


def _count(checkpoint: Checkpoint, pattern: str) -> int:
    """How many numbered modules there are: the highest number + 1."""
    return 1 + max(_numbers(checkpoint, re.compile(pattern)), default=-1)


def _numbers(checkpoint: Checkpoint, pattern: re.Pattern[str]) -> Iterable[int]:
    return (int(match[1]) for name in checkpoint.tensors if (match := pattern.match(name)))


def _needs_config(checkpoint: Checkpoint, reason: str) -> ValueError:
    return ValueError(
        f"The config of {checkpoint.files[0]} cannot be told from its shapes: {reason}. Put the model's "
        f"{CONFIG_NAME} beside the file, or pass `config`."
    )
