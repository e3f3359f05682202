"""One block of the transformer: joint attention and an MLP per stream, modulated by the timestep.

Submodule names are diffusers' names, since they are the keys of every checkpoint and LoRA. Shapes: B samples,
L image tokens, T text tokens, D width, H heads, R regions of the image stream (see transformer.py).
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from .block_boundary import Handover
from .kernels import backend
from .module_hooks import comes_in_parts, is_hooked, is_only_streamed
from .rotary import rotate

if TYPE_CHECKING:
    from .plan import Plan

EPSILON = 1e-6


class QwenImageTransformerBlock(nn.Module):
    """Joint attention and an MLP per stream, each modulated by the timestep (adaLN-Zero, arXiv 2212.09748).

    The names of `forward`'s first two arguments are what diffusers' cache hooks look for.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.img_norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=EPSILON)
        self.attn = QwenImageAttention(width, num_heads, head_dim)
        self.img_norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=EPSILON)
        self.img_mlp = FeedForward(dim=width, dim_out=width, activation_fn="gelu-approximate")
        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.txt_norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=EPSILON)
        self.txt_norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=EPSILON)
        self.txt_mlp = FeedForward(dim=width, dim_out=width, activation_fn="gelu-approximate")
        self.keep = "all"  # what a fused training step keeps for its backward pass: fused_training.Keep
        self.saves_memory = False  # whether the fused path takes less memory, and more time
        self.plan: Plan | None = None  # of the fused path, as it was made last

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulation: tuple[Tensor, Tensor] | None = None,
        text_lengths: tuple[int, ...] | None = None,
        num_target_tokens: int | None = None,
        handover: Handover | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            hidden_states: image stream [B, L, D].
            encoder_hidden_states: text stream [B, T, D], or [1, sum of text_lengths, D] when packed.
            encoder_hidden_states_mask: [B, T], True where the text is no padding.
            temb: timestep embedding [B, D], or [B, R, D] with regions.
            image_rotary_emb: rotary tables of the image and the text tokens.
            joint_attention_kwargs: passed to the attention processor.
            modulation: image [B or 1, R, 6 D] and text [B or 1, 6 D], instead of computing them from temb.
            text_lengths: tokens of each sample in a packed text stream.
            num_target_tokens: where the second region of the image stream starts.
            handover: what the fused path has from the block before, and leaves for the next one.

        Returns:
            The text stream and the image stream, in this order, as in diffusers.
        """
        if callable(hidden_states):  # a backward pass that needs what the hooks on this block bring
            result: tuple[Tensor, Tensor] = hidden_states()
            return result
        image, text = hidden_states, encoder_hidden_states
        if torch.is_grad_enabled() and self.is_trained_fused(
            image,
            text,
            encoder_hidden_states_mask,
            temb,
            image_rotary_emb,
            joint_attention_kwargs,
            modulation,
        ):
            from .fused_training import Keep, trained_block  # here, since it imports Triton

            image, text = trained_block(
                self,
                image,
                text,
                temb=temb,
                tables=image_rotary_emb,
                text_lengths=text_lengths,
                keep=Keep(self.keep),
            )
            return text, image
        if modulation is None:
            modulation = self.modulation_of(temb if temb.ndim == 3 else temb[:, None])
        plan = None
        if not (torch.compiler.is_compiling() or joint_attention_kwargs or image_rotary_emb is None):
            plan = self._plan_now(image, text, modulation)
        compute: Callable[..., tuple[Tensor, Tensor]]
        if plan is None:
            compute = partial(self._plain, attention_kwargs=joint_attention_kwargs or {})
        else:
            from .fused import fused_block  # here, since it imports Triton
            from .fused_parts import fused_in_parts

            if self.saves_memory or comes_in_parts(self):
                compute = partial(fused_in_parts, self, plan)
            else:
                compute = partial(fused_block, self, plan, handover=handover)
        image, text = compute(
            image,
            text,
            text_mask=encoder_hidden_states_mask,
            modulation=modulation,
            tables=image_rotary_emb,
            text_lengths=text_lengths,
            num_target_tokens=num_target_tokens,
        )
        return text, image

    def _plain(
        self,
        image: Tensor,
        text: Tensor,
        *,
        text_mask: Tensor | None,
        modulation: tuple[Tensor, Tensor],
        tables: tuple[Tensor, Tensor],
        text_lengths: tuple[int, ...] | None,
        num_target_tokens: int | None,
        attention_kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """The block in plain torch, in the order of diffusers' operations; image and text stream."""
        image_shift1, image_scale1, image_gate1, image_shift2, image_scale2, image_gate2 = [
            _spread(part, image, num_target_tokens) for part in modulation[0].chunk(6, dim=-1)
        ]
        text_shift1, text_scale1, text_gate1, text_shift2, text_scale2, text_gate2 = [
            _per_token(part[:, None], text_lengths) for part in modulation[1].chunk(6, dim=-1)
        ]

        image_attention, text_attention = self.attn(
            hidden_states=self.img_norm1(image) * (1 + image_scale1) + image_shift1,
            encoder_hidden_states=self.txt_norm1(text) * (1 + text_scale1) + text_shift1,
            encoder_hidden_states_mask=text_mask,
            image_rotary_emb=tables,
            text_lengths=text_lengths,
            **attention_kwargs,
        )
        image = image + image_gate1 * image_attention
        text = text + text_gate1 * text_attention

        image = image + image_gate2 * self.img_mlp(self.img_norm2(image) * (1 + image_scale2) + image_shift2)
        text = text + text_gate2 * self.txt_mlp(self.txt_norm2(text) * (1 + text_scale2) + text_shift2)

        if image.dtype == torch.float16:  # outliers of this model exceed fp16
            image, text = image.clip(-65504, 65504), text.clip(-65504, 65504)
        return image, text

    @property
    def may_overwrite(self) -> bool:
        """Whether memory is saved by writing over the image stream: no hook can have kept what it saw."""
        return self.saves_memory and (not is_hooked(self) or is_only_streamed(self))

    def modulation_of(self, regions_BRD: Tensor) -> tuple[Tensor, Tensor]:
        """Modulation of the image stream [B, R, 6 D] and of the text stream [B, 6 D]."""
        return self.img_mod(regions_BRD), self.txt_mod(regions_BRD[:, 0])

    def _plan_now(self, image: Tensor, text: Tensor, modulation: tuple[Tensor, Tensor]) -> "Plan | None":
        """How this call takes the fused path; None if it takes the plain one."""
        if backend(image.device).name == "off" or type(self.attn.processor) is not QwenImageAttnProcessor:
            return None
        from .fused import plan_of

        return plan_of(self, image, text, modulation)

    def is_trained_fused(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulation: tuple[Tensor, Tensor] | None = None,
        *rest: Any,
    ) -> bool:
        """Whether `forward` with these arguments and with gradients takes the fused training path."""
        if torch.compiler.is_compiling() or backend(hidden_states.device).name == "off":
            return False
        if comes_in_parts(self):
            return False
        if modulation is not None or joint_attention_kwargs or image_rotary_emb is None:
            return False
        if type(self.attn.processor) is not QwenImageAttnProcessor:
            return False
        from .fused_training import why_not_trained
        from .projections import fuse_

        if why_not_trained(self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb):
            return False
        if not self.attn.is_laid_out:
            fuse_(self.attn)
            self.attn.is_laid_out = True
        return True


class QwenImageAttention(nn.Module, AttentionModuleMixin):
    """Projections and norms of the joint attention; the processor holds the arithmetic, as in diffusers."""

    _supports_qkv_fusion = False  # diffusers' fusion knows one stream only

    def __init__(self, width: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = num_heads
        self.inner_dim = width
        self.head_dim = head_dim
        self.norm_q = RMSNorm(head_dim, eps=EPSILON)
        self.norm_k = RMSNorm(head_dim, eps=EPSILON)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.add_k_proj = nn.Linear(width, width)
        self.add_v_proj = nn.Linear(width, width)
        self.add_q_proj = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])
        self.to_add_out = nn.Linear(width, width)
        self.norm_added_q = RMSNorm(head_dim, eps=EPSILON)
        self.norm_added_k = RMSNorm(head_dim, eps=EPSILON)
        self.processor = QwenImageAttnProcessor()
        self.is_laid_out = False  # `projections.fuse_` was tried where the weights are now

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Attend; arguments and results are the processor's."""
        return self.processor(self, hidden_states, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QwenImageAttention":
        self.is_laid_out = False  # `.to` and its like give every weight its own memory
        super()._apply(fn, recurse)
        return self


class QwenImageAttnProcessor:
    """Joint attention over [text, image], padded with a mask or packed sample by sample."""

    _attention_backend: AttentionBackendName | None = None  # set by set_attention_backend
    _parallel_config: Any = None  # set by enable_parallelism

    def __call__(
        self,
        attn: QwenImageAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        text_lengths: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs [B, L, D] of the image and [B, T, D] (or packed, as given) of the text tokens."""
        image = self._project(
            attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), attn.norm_q, attn.norm_k
        )
        text = self._project(
            attn,
            encoder_hidden_states,
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            attn.norm_added_q,
            attn.norm_added_k,
        )
        if image_rotary_emb is not None:
            image_table, text_table = image_rotary_emb
            image = rotate(image[0], image_table), rotate(image[1], image_table), image[2]
            text = rotate(text[0], text_table), rotate(text[1], text_table), text[2]

        if text_lengths is None:
            image_out, text_out = self._attend(image, text, encoder_hidden_states_mask)
        else:
            samples = [
                self._attend(
                    (image[0][i : i + 1], image[1][i : i + 1], image[2][i : i + 1]), (query, key, value), None
                )
                for i, (query, key, value) in enumerate(
                    zip(*(part.split(text_lengths, dim=1) for part in text), strict=True)
                )
            ]
            image_out = torch.cat([sample[0] for sample in samples])
            text_out = torch.cat([sample[1] for sample in samples], dim=1)
        image_out = attn.to_out[1](attn.to_out[0](image_out))
        return image_out, attn.to_add_out(text_out)

    @staticmethod
    def _project(
        attn: QwenImageAttention,
        tokens: Tensor,
        projections: tuple[nn.Module, nn.Module, nn.Module],
        norm_query: nn.Module,
        norm_key: nn.Module,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The number of heads is what is left: under tensor parallelism a rank holds some of them.
        query, key, value = (
            projection(tokens).unflatten(-1, (-1, attn.head_dim)) for projection in projections
        )
        return norm_query(query), norm_key(key), value

    def _attend(
        self,
        image: tuple[Tensor, Tensor, Tensor],
        text: tuple[Tensor, Tensor, Tensor],
        text_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention over text and image tokens together; q, k, v are [B, tokens, H, head_dim]."""
        mask = None
        if text_mask is not None:
            image_mask = text_mask.new_ones(image[0].shape[:2])
            mask = torch.cat([text_mask, image_mask], dim=1)[:, None, None]
        query, key, value = (torch.cat([a, b], dim=1) for a, b in zip(text, image, strict=True))
        joint = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        joint = joint.flatten(2).to(query.dtype)
        num_text = text[0].shape[1]
        return joint[:, num_text:].contiguous(), joint[:, :num_text].contiguous()


def _spread(parameter_BRD: Tensor, image_BLD: Tensor, num_target_tokens: int | None) -> Tensor:
    """Modulation per region as something that broadcasts over the image tokens [B, L, D].

    Two expanded rows, joined at the border between the regions; no index per token.
    """
    if num_target_tokens is None or parameter_BRD.shape[1] == 1:
        return parameter_BRD
    target, reference = parameter_BRD.split(1, dim=1)
    num_references = image_BLD.shape[1] - num_target_tokens
    return torch.cat(
        [target.expand(-1, num_target_tokens, -1), reference.expand(-1, num_references, -1)], dim=1
    )


def _per_token(parameter_B1D: Tensor, lengths: tuple[int, ...] | None) -> Tensor:
    """Modulation per sample as something that broadcasts over the text tokens.

    From expanded rows: nothing is copied from the host, which a CUDA graph could not record.
    """
    if lengths is None or parameter_B1D.shape[0] == 1:
        return parameter_B1D
    rows = zip(parameter_B1D.unbind(), lengths, strict=True)
    return torch.cat([row_1D.expand(length, -1) for row_1D, length in rows])[None]
