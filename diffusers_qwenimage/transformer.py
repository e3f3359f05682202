"""The Qwen-Image transformer: two streams of tokens, image and text, that meet in joint attention.

Class name, config fields, state-dict keys and `forward` arguments are those of diffusers 0.42.1, so published
checkpoints load unchanged and what is saved here loads there. The architecture is the MMDiT of Stable
Diffusion 3 (arXiv 2403.03206) as Qwen-Image uses it (arXiv 2508.02324). Beyond stock, `forward` takes

* a list of text embeddings of different lengths: tokens are packed for the linear layers and attention runs
  per sample, so a batch costs no padding and no mask;
* `modulation`, computed once for a schedule: the modulation weights, a third of the model, are a function of
  the timestep alone and need not be on the device while denoising.

Shapes: B samples, L image tokens, T text tokens, D width, N blocks, S timesteps, R regions of the image
stream (1, or 2 with `zero_cond_t`: the picture, then the clean references).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import (
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous, RMSNorm
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from .block import EPSILON, QwenImageAttnProcessor, QwenImageTransformerBlock
from .block_boundary import Handover
from .kernels import backend
from .module_hooks import is_hooked
from .offload import passing, streamed
from .rotary import LayeredRotaryEmbedding, RotaryEmbedding, shapes_of_batch
from .timestep import TimestepTextEmbedding
from .transformer_files import TransformerFilesMixin

if TYPE_CHECKING:
    from .fused import ModulationAhead


# Tensor parallelism: linears of a block of which each rank has some outputs, and those that take them in.
SPLIT_BY_OUTPUTS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
    *("img_mlp.net.0.proj", "txt_mlp.net.0.proj"),
)
SPLIT_BY_INPUTS = ("attn.to_out.0", "attn.to_add_out", "img_mlp.net.2", "txt_mlp.net.2")


@dataclass(frozen=True, kw_only=True)
class Modulation:
    """Shift, scale and gate of both halves of every block, for one timestep.

    Attributes:
        image: [N, R, 6 D]
        text: [N, 6 D]
    """

    image: Tensor
    text: Tensor


@dataclass(frozen=True, kw_only=True)
class ModulationTable:
    """`Modulation` for every timestep of a schedule.

    Attributes:
        image: [S, N, R, 6 D]
        text: [S, N, 6 D]
    """

    image: Tensor
    text: Tensor

    def at(self, step: int) -> Modulation:
        """The modulation of one step of the schedule (a view)."""
        return Modulation(image=self.image[step], text=self.text[step])


class QwenImageTransformer2DModel(
    TransformerFilesMixin,
    ModelMixin,
    ConfigMixin,
    PeftAdapterMixin,
    FromOriginalModelMixin,
    CacheMixin,
    AttentionMixin,
):
    """Predicts the velocity of noisy latents, conditioned on text embeddings and a timestep.

    Args:
        patch_size: side of the square of latent pixels that one token holds.
        in_channels: channels of a packed latent token, z_dim * patch_size^2.
        out_channels: z_dim; `None` means `in_channels`.
        num_layers: number of blocks (60 in the published model).
        attention_head_dim: dimensions of a head.
        num_attention_heads: heads; width D = heads * head dimension.
        joint_attention_dim: width of the text embeddings.
        guidance_embeds: kept for the config; no published Qwen-Image model is guidance-distilled.
        axes_dims_rope: head dimensions that turn with frame, row and column; their sum is the head dimension.
        zero_cond_t: modulate reference tokens with timestep 0 (Qwen-Image-Edit-2511).
        use_additional_t_cond: add an embedding that tells RGB from RGBA (Qwen-Image-Layered).
        use_layer3d_rope: place the last image at frame -1 (Qwen-Image-Layered).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["QwenImageTransformerBlock"]
    _repeated_blocks = ["QwenImageTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]
    _stream_on_call = ("img_mod", "txt_mod")  # see offload: they are tabulated
    _cp_plan = {
        "transformer_blocks.0": {
            "hidden_states": ContextParallelInput(split_dim=1, expected_dims=3, split_output=False),
            "encoder_hidden_states": ContextParallelInput(split_dim=1, expected_dims=3, split_output=False),
        },
        "transformer_blocks.*": {
            "encoder_hidden_states_mask": ContextParallelInput(
                split_dim=1, expected_dims=2, split_output=False
            ),
        },
        "pos_embed": {
            index: ContextParallelInput(split_dim=0, expected_dims=3, split_output=True) for index in (0, 1)
        },
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    _tp_plan = {
        **{f"transformer_blocks.*.{name}": "colwise" for name in SPLIT_BY_OUTPUTS},
        **{f"transformer_blocks.*.{name}": "rowwise" for name in SPLIT_BY_INPUTS},
    }

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        zero_cond_t: bool = False,
        use_additional_t_cond: bool = False,
        use_layer3d_rope: bool = False,
    ) -> None:
        super().__init__()
        if sum(axes_dims_rope) != attention_head_dim:
            raise ValueError(
                f"axes_dims_rope {tuple(axes_dims_rope)} must add up to the {attention_head_dim} of a head."
            )
        _register_with_cache_hooks()
        width = num_attention_heads * attention_head_dim
        self.out_channels = out_channels or in_channels
        self.inner_dim = width
        self.zero_cond_t = zero_cond_t
        self.gradient_checkpointing = False

        rotary = LayeredRotaryEmbedding if use_layer3d_rope else RotaryEmbedding
        self.pos_embed = rotary(axes_dims_rope)
        self.time_text_embed = TimestepTextEmbedding(width, use_additional_t_cond)
        self.txt_norm = RMSNorm(joint_attention_dim, eps=EPSILON)
        self.img_in = nn.Linear(in_channels, width)
        self.txt_in = nn.Linear(joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            QwenImageTransformerBlock(width, num_attention_heads, attention_head_dim)
            for _ in range(num_layers)
        )
        self.norm_out = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=EPSILON)
        self.proj_out = nn.Linear(width, patch_size * patch_size * self.out_channels)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | Sequence[Tensor] | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        img_shapes: Sequence[Any] | None = None,
        guidance: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        additional_t_cond: Tensor | None = None,
        return_dict: bool = True,
        modulation: Modulation | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity.

        Args:
            hidden_states: packed latents [B, L, in_channels], reference tokens last.
            encoder_hidden_states: text embeddings [B, T, joint_attention_dim], or a list of B tensors
                [T_i, joint_attention_dim] of any lengths, without padding.
            encoder_hidden_states_mask: [B, T], non-zero where the text is no padding; only with a tensor.
            timestep: sigma in [0, 1], [B] (or [1], for all samples).
            img_shapes: per sample (1, rows, columns) of tokens, or a list of these with references.
            guidance: must be None; no published Qwen-Image model is guidance-distilled.
            attention_kwargs: {"scale": s} scales the LoRA layers for this call.
            controlnet_block_samples: residuals [B, L, D], spread evenly over the blocks.
            additional_t_cond: 0 for RGB or 1 for RGBA, [B], where the config has use_additional_t_cond.
            return_dict: return a `Transformer2DModelOutput` instead of a tuple.
            modulation: this timestep's modulation from `tabulate_modulation`; then the blocks' modulation
                weights are not used.

        Returns:
            The velocity [B, L, patch_size^2 * out_channels], of the picture and of the references.

        Raises:
            ValueError: if the arguments do not fit each other.
        """
        text, text_lengths = self._check(
            hidden_states, encoder_hidden_states, encoder_hidden_states_mask, timestep, img_shapes, guidance
        )
        assert timestep is not None and img_shapes is not None
        shapes = shapes_of_batch(img_shapes, hidden_states.shape[1])
        image_BLD = self.img_in(hidden_states)
        text_BTD = self.txt_in(self.txt_norm(text))
        temb, region_temb = self._embed_timestep(timestep, image_BLD, additional_t_cond)
        if modulation is None:
            self._check_modulation_is_here()
        longest = max(text_lengths) if text_lengths else text_BTD.shape[1]
        image_table, text_table = self.pos_embed(shapes, longest, image_BLD.device)
        if text_lengths:
            text_table = torch.cat([text_table[:length] for length in text_lengths])
        text_mask = None if encoder_hidden_states_mask is None else encoder_hidden_states_mask.to(torch.bool)

        ahead = self._modulation_ahead(region_temb) if modulation is None else None
        handover = None if controlnet_block_samples is not None else self._handover(modulation)
        of_block: tuple[Tensor, Tensor] | None = None
        blocks = self._blocks()
        for index, block in enumerate(blocks):
            if modulation is not None:
                of_block = modulation.image[None, index], modulation.text[None, index]
                if handover is not None:
                    handover.begin(blocks, index, modulation)
            of_next = None if ahead is None else ahead.start(index + 1)
            arguments = (
                image_BLD,
                text_BTD,
                text_mask,
                region_temb if self.zero_cond_t else temb,
                (image_table, text_table),
                attention_kwargs,
                of_block,
                text_lengths,
                prod(shapes[0]) if self.zero_cond_t else None,
                *(() if handover is None else (handover,)),
            )
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                text_BTD, image_BLD = self._gradient_checkpointing_func(block, *arguments)
            else:
                text_BTD, image_BLD = block(*arguments)
            if ahead is not None:
                ahead.join()
                of_block = of_next
            if controlnet_block_samples is not None:
                interval = -(-len(blocks) // len(controlnet_block_samples))  # blocks for each, rounded up
                image_BLD = image_BLD + controlnet_block_samples[index // interval]

        velocity = self.proj_out(self._last_norm(image_BLD, temb))
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _last_norm(self, image_BLD: Tensor, temb_BD: Tensor) -> Tensor:
        """`norm_out`; in place and one sample at a time where memory is saved."""
        norm = self.norm_out
        may_overwrite = not torch.is_grad_enabled() and self._blocks()[-1].may_overwrite
        if not may_overwrite or is_hooked(norm) or is_hooked(norm.norm):
            normalised: Tensor = norm(image_BLD, temb_BD)
            return normalised
        scales, shifts = norm.linear(norm.silu(temb_BD).to(image_BLD.dtype)).chunk(2, dim=1)
        for image_LD, scale, shift in zip(image_BLD, scales, shifts, strict=True):
            image_LD.copy_(norm.norm(image_LD) * (1 + scale) + shift)
        return image_BLD

    @torch.no_grad()
    def tabulate_modulation(
        self, sigmas: Tensor, *, dtype: torch.dtype, additional_t_cond: Tensor | None = None
    ) -> ModulationTable:
        """Compute the modulation of all blocks for the timesteps of a schedule.

        On the plain path row by row, so that each entry equals what the blocks compute themselves, bit for
        bit. On the fused path all timesteps at once, which reads the weights once; products of another shape
        may round differently. Weights that are elsewhere (`offload_modulation`) visit the device one block
        at a time.

        Args:
            sigmas: [S], in [0, 1].
            dtype: type of the latents that will be denoised; the timestep is rounded to it as in `forward`.
            additional_t_cond: [1], as in `forward`.
        """
        device = self.img_in.weight.device
        like = torch.empty(0, device=device, dtype=dtype)
        embedded = [
            self._embed_timestep(sigma[None].to(device), like, additional_t_cond) for sigma in sigmas.unbind()
        ]
        image, text = [], []
        of_blocks = [nn.ModuleList([block.img_mod, block.txt_mod]) for block in self._blocks()]
        all_regions_SRD = torch.cat([regions for _, regions in embedded])
        all_temb_SD = torch.cat([temb for temb, _ in embedded])
        at_once = backend(device).name != "off"
        for image_part, text_part in map(iter, passing(of_blocks, device)):
            if at_once:
                image.append(image_part(all_regions_SRD))
                text.append(text_part(all_temb_SD))
            else:
                image.append(torch.stack([image_part(regions[0]) for _, regions in embedded]))
                text.append(torch.cat([text_part(temb) for temb, _ in embedded]))
        return ModulationTable(image=torch.stack(image, dim=1), text=torch.stack(text, dim=1))

    def save_memory(self, enabled: bool = True) -> None:
        """Take less device memory for activations, a third, for a little more time; results stay the same.

        On the fused path blocks then compute one sample at a time, in place (fused_parts.py).
        """
        for block in self._blocks():
            block.saves_memory = enabled

    def offload_modulation(self, device: str | torch.device = "cpu") -> None:
        """Move the blocks' modulation weights away: 13.6 of the published model's 40.9 GB in bf16.

        The pipelines then tabulate the modulation before they denoise. Undone by `load_modulation` or `.to`.
        """
        for module in self._modulation_modules():
            module.to(device)

    def load_modulation(self) -> None:
        """Bring the blocks' modulation weights back to the device of the model."""
        self.offload_modulation(self.img_in.weight.device)

    @property
    def modulation_is_offloaded(self) -> bool:
        """Whether modulation weights are on another device than the rest of the model."""
        if torch.compiler.is_compiling() or not self.transformer_blocks:
            return False
        plan = streamed(self)
        if plan is not None:
            return "transformer_blocks.0.img_mod" in plan.on_call
        device = self.img_in.weight.device
        first = self._blocks()[0]
        # A hook that moves weights just in time (accelerate, group offload) moves the whole block.
        if first.attn.to_add_out.weight.device != device:
            return False
        weight = next(first.img_mod.parameters(), None)
        return weight is not None and weight.device != device

    def _check(
        self,
        image: Tensor,
        text: Tensor | Sequence[Tensor] | None,
        mask: Tensor | None,
        timestep: Tensor | None,
        img_shapes: Sequence[Any] | None,
        guidance: Tensor | None,
    ) -> tuple[Tensor, tuple[int, ...] | None]:
        """The text as one tensor, and the lengths of its samples if they are packed."""
        if text is None or timestep is None or img_shapes is None:
            raise ValueError("encoder_hidden_states, timestep and img_shapes are needed.")
        if guidance is not None:
            raise ValueError(
                "`guidance` is for guidance-distilled models; there is no such Qwen-Image model."
            )
        if isinstance(text, Tensor):
            if mask is not None and mask.shape != text.shape[:2]:
                raise ValueError(
                    f"encoder_hidden_states_mask {tuple(mask.shape)} must have the shape "
                    f"{tuple(text.shape[:2])} of the text tokens."
                )
            return text, None
        if mask is not None:
            raise ValueError(
                "A list of text embeddings has no padding: leave encoder_hidden_states_mask out."
            )
        if len(text) != image.shape[0]:
            raise ValueError(f"Got {len(text)} text embeddings for {image.shape[0]} samples.")
        lengths = tuple(sample.shape[0] for sample in text)
        if len(set(lengths)) == 1:
            return torch.stack(list(text)), None
        return torch.cat(list(text))[None], lengths

    def _check_modulation_is_here(self) -> None:
        if self.modulation_is_offloaded and streamed(self) is None:
            raise ValueError(
                "The modulation weights are on another device. Pass `modulation=` of tabulate_modulation, "
                "or bring them back with load_modulation()."
            )

    def _embed_timestep(
        self, timestep: Tensor, like: Tensor, additional_t_cond: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Timestep embedding [B, D], and per region of the image stream [B, R, D]; in the type of `like`."""
        timestep = timestep.to(like.dtype)
        if not self.zero_cond_t:
            temb = self.time_text_embed(timestep, like, additional_t_cond)
            return temb, temb[:, None]
        if additional_t_cond is not None:
            additional_t_cond = torch.cat([additional_t_cond, additional_t_cond])
        both = self.time_text_embed(torch.cat([timestep, timestep * 0]), like, additional_t_cond)
        temb, clean = both.chunk(2)
        return temb, torch.stack([temb, clean], dim=1)

    def _modulation_ahead(self, regions_BRD: Tensor) -> "ModulationAhead | None":
        """Where blocks take the fused path: what computes their modulation beside the block before."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        if backend(regions_BRD.device).name == "off":
            return None
        from .fused import ModulationAhead  # here, since it imports Triton

        return ModulationAhead(self._blocks(), regions_BRD)

    def _handover(self, modulation: Modulation | None) -> Handover | None:
        """Where blocks take the fused path and know their modulation: what they hand from one to the next."""
        if modulation is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        if backend(modulation.image.device).name == "off":
            return None
        return Handover()

    def _modulation_modules(self) -> Iterator[nn.Module]:
        for block in self._blocks():
            yield block.img_mod
            yield block.txt_mod

    def _blocks(self) -> list[QwenImageTransformerBlock]:
        return cast(list[QwenImageTransformerBlock], list(self.transformer_blocks))


def _register_with_cache_hooks() -> None:
    """Make diffusers' caches (first block, TaylorSeer, pyramid attention...) know our classes."""
    TransformerBlockRegistry.register(
        QwenImageTransformerBlock,
        TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0),
    )
    AttentionProcessorRegistry.register(
        QwenImageAttnProcessor, AttentionProcessorRegistry.get(QwenDoubleStreamAttnProcessor2_0)
    )
