"""Tiny random components, ours and diffusers' with the same weights."""

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import diffusers_qwenimage

WIDTH = 16  # of the text embeddings
TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (8, 4, 4),
}
VAE = {
    "base_dim": 24,
    "z_dim": 4,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "latents_mean": [0.1] * 4,
    "latents_std": [1.3] * 4,
}
# Every transformer config of the family, and the image shapes that go with it.
FAMILY = {
    "text-to-image": ({}, [(1, 4, 6)]),
    "edit": ({}, [(1, 4, 6), (1, 3, 5), (1, 2, 2)]),
    "edit-2511": ({"zero_cond_t": True}, [(1, 4, 6), (1, 3, 5), (1, 2, 2)]),
    "layered": ({"use_layer3d_rope": True, "use_additional_t_cond": True}, [(1, 4, 6)] * 4),
    "all": (
        {"zero_cond_t": True, "use_layer3d_rope": True, "use_additional_t_cond": True},
        [(1, 4, 6)] * 3,
    ),
}


def transformers(**config):
    """Our transformer and diffusers', with the same random weights."""
    torch.manual_seed(0)
    stock = diffusers.QwenImageTransformer2DModel(**TRANSFORMER, **config).eval()
    ours = diffusers_qwenimage.QwenImageTransformer2DModel(**TRANSFORMER, **config).eval()
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def vaes(**config):
    """Our VAE and diffusers', with the same random weights."""
    torch.manual_seed(0)
    stock = diffusers.AutoencoderKLQwenImage(**{**VAE, **config}).eval()
    ours = diffusers_qwenimage.AutoencoderKLQwenImage(**{**VAE, **config}).eval()
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def scheduler():
    return FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        max_image_seq_len=8192,
        base_shift=0.5,
        max_shift=0.9,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
    )


def pipelines(name):
    """Our pipeline and diffusers' of this name, over the same random weights, without text encoders."""
    our_transformer, stock_transformer = transformers()
    our_vae, stock_vae = vaes()
    shared = {"text_encoder": None, "tokenizer": None}
    ours = getattr(diffusers_qwenimage, name)(
        scheduler=scheduler(), vae=our_vae, transformer=our_transformer, **shared
    )
    stock = getattr(diffusers, name)(
        scheduler=scheduler(), vae=stock_vae, transformer=stock_transformer, **shared
    )
    for pipeline in (ours, stock):
        pipeline.set_progress_bar_config(disable=True)
    return ours, stock


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def transformer_inputs(image_shapes, batch=1, tokens=7, *, kind=False, seed=0):
    """Arguments of a transformer's forward."""
    length = sum(frames * rows * columns for frames, rows, columns in image_shapes)
    inputs = {
        "hidden_states": random(batch, length, 16, seed=seed),
        "encoder_hidden_states": random(batch, tokens, WIDTH, seed=seed + 1),
        "timestep": torch.linspace(0.9, 0.3, batch),
        "img_shapes": [list(image_shapes)] * batch,
    }
    if kind:
        inputs["additional_t_cond"] = torch.arange(batch) % 2
    return inputs
