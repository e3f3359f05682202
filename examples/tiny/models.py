"""The four models of the small checkpoint, and the views of them that training uses.

Shapes: N pictures, S=256 image tokens of 16x16 pixels, L text tokens, C=64 channels of a packed latent.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from flat_vae import LATENT_CHANNELS
from tokenizer import save_tokenizer
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

GRID = 16  # image tokens a side
NUM_HEADS, HEAD_DIM = 6, 32
TEXT_WIDTH = 128


# --- text encoder ---


def make_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    vocabulary = -(-len(tokenizer) // 64) * 64
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 2 * TEXT_WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
            "fullatt_block_indexes": [0],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.pad_token_id = token("<|endoftext|>")
    share_word_vectors(model, tokenizer)
    return model


@torch.no_grad()
def share_word_vectors(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer) -> None:
    """Starts "red", "Red", "RED" and the same after a space from nearly one vector."""
    weight = model.model.language_model.embed_tokens.weight
    rows: dict[str, int] = {}
    for index in range(len(tokenizer)):
        word = tokenizer.decode([index]).strip().lower()
        if word.isalpha():
            first = rows.setdefault(word, index)
            weight[index] = 0.9 * weight[first] + 0.1 * weight[index] if first != index else weight[index]
    weight.mul_(0.5 / weight.std())


def encode_text(model: Qwen2_5_VLForConditionalGeneration, tokens: Tensor) -> Tensor:
    """Last hidden states (N, L, D) of right-padded tokens (N, L), after the final norm.

    Equal to the stock forward at the valid positions: attention is causal, so these never see the padding.
    """
    text = model.model.language_model
    hidden = text.embed_tokens(tokens)
    position = torch.arange(tokens.shape[1], device=tokens.device).expand(3, 1, -1)
    rope = text.rotary_emb(hidden, position)
    for layer in text.layers:
        output = layer(hidden, attention_mask=None, position_embeddings=rope)
        hidden = output[0] if isinstance(output, tuple) else output
    normed: Tensor = text.norm(hidden)
    return normed


# --- transformer ---


def make_transformer() -> QwenImageTransformer2DModel:
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if "_mod." in name or name in ("norm_out.linear", "proj_out"):
                nn.init.zeros_(module.weight)
    return model


class RealRope:
    """The stock attention processor, rotating with cosines and sines, which compile."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        """`image_rotary_emb`: cosines and sines (L + S, 16) of the joint tokens, text first.

        The mask is additive, (N, 1, 1, L + S).
        """
        length = encoder_hidden_states.shape[1]

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (NUM_HEADS, HEAD_DIM))

        image, text = hidden_states, encoder_hidden_states
        query = torch.cat(
            [attn.norm_added_q(heads(attn.add_q_proj(text))), attn.norm_q(heads(attn.to_q(image)))], dim=1
        )
        key = torch.cat(
            [attn.norm_added_k(heads(attn.add_k_proj(text))), attn.norm_k(heads(attn.to_k(image)))], dim=1
        )
        value = torch.cat([heads(attn.add_v_proj(text)), heads(attn.to_v(image))], dim=1)
        query, key = (
            rotate(query, *image_rotary_emb).to(value.dtype),
            rotate(key, *image_rotary_emb).to(value.dtype),
        )
        joint = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=encoder_hidden_states_mask,
        )
        joint = joint.transpose(1, 2).flatten(2)
        return attn.to_out[0](joint[:, length:]), attn.to_add_out(joint[:, :length])


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates neighbouring pairs of the last dimension of (N, L, heads, 32)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosine[None, :, None], sine[None, :, None]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)


def joint_rope(
    model: QwenImageTransformer2DModel, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    image, text = model.pos_embed([(1, GRID, GRID)], max_txt_seq_len=length, device=device)
    angles = torch.cat([text, image])
    return angles.real.contiguous(), angles.imag.contiguous()


def predict_velocity(
    model: QwenImageTransformer2DModel,
    latents: Tensor,
    text: Tensor,
    mask: Tensor,
    sigma: Tensor,
    rope: tuple[Tensor, Tensor],
    blocks: list[Callable[..., tuple[Tensor, Tensor]]],
) -> Tensor:
    """The stock forward with the residual streams and the timestep kept in float32.

    latents (N, S, C), text (N, L, D), additive mask (N, 1, 1, L + S), sigma (N,); `blocks` are the model's
    blocks, possibly compiled.
    """
    image = model.img_in(latents).float()
    text = model.txt_in(model.txt_norm(text)).float()
    with torch.autocast(latents.device.type, enabled=False):
        condition = model.time_text_embed(sigma.float(), image)
    for block in blocks:
        text, image = block(
            hidden_states=image,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            temb=condition,
            image_rotary_emb=rope,
        )
    velocity: Tensor = model.proj_out(model.norm_out(image, condition))
    return velocity


# --- files ---


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Configured as Qwen-Image publishes it."""
    return FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        num_train_timesteps=1000,
        shift=1.0,
        shift_terminal=0.02,
        stochastic_sampling=False,
        time_shift_type="exponential",
        use_dynamic_shifting=True,
    )


def save_frame(folder: Path, *, vae: AutoencoderKLQwenImage, tokenizer: Qwen2Tokenizer) -> None:
    """Writes all of the diffusers layout but the text encoder and the transformer, in bf16."""
    index = {
        "_class_name": "QwenImagePipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    make_scheduler().save_pretrained(folder / "scheduler")
    save_tokenizer(tokenizer, folder / "tokenizer")
    vae.bfloat16().save_pretrained(folder / "vae")
    make_readable(folder)


def save_models(
    folder: Path,
    *,
    text_encoder: Qwen2_5_VLForConditionalGeneration,
    transformer: QwenImageTransformer2DModel,
) -> None:
    """Writes copies of both in bf16; with `save_frame` the checkpoint is whole."""
    for name, model in (("text_encoder", text_encoder), ("transformer", transformer)):
        copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(folder / name)
        settle_config(folder / name / "config.json")
    make_readable(folder)


def settle_config(path: Path) -> None:
    """Takes out how training loaded the model; notes the latent size it draws, for the default size."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        for field in ("_name_or_path", "dtype"):
            part.pop(field, None)
    if path.parent.name == "text_encoder":
        config["dtype"] = "bfloat16"
    if path.parent.name == "transformer":
        config["_sample_size"] = 2 * GRID
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_readable(folder: Path) -> None:
    """Everyone may read: safetensors writes files for their owner alone."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
