"""From one block to the next: the norm before attention, computed where the block before ends.

A block ends with gate and residual and the next one begins with norm and modulation of the result. Where both
are computed by the fused path that is one pass over the tokens instead of two, with the same result, bit for
bit. Nothing is handed over where something may stand between the two (hooks, ControlNet), or memory is saved.

Shapes: M modulations, D width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .module_hooks import is_hooked

if TYPE_CHECKING:
    from .fused import Tokens
    from .kernels.rows import Target
    from .plan import Plan
    from .transformer import Modulation


class Handover:
    """What is handed over in one forward of the transformer.

    Attributes:
        image, text: for each stream the next block's modulation [M, 6 D] and how its projections want their
            inputs quantised; None if the block that is computed hands nothing over.
    """

    def __init__(self) -> None:
        self.image: tuple[Tensor, Target | None] | None = None
        self.text: tuple[Tensor, Target | None] | None = None
        self._streams: tuple[Tensor, Tensor] | None = None
        self._targets: tuple[Target | None, Target | None] | None = None
        self._normed: tuple[Tokens, Tokens] | None = None

    def begin(self, blocks: Sequence[Any], index: int, modulation: "Modulation") -> None:
        """Say which block is computed next."""
        self.image = self.text = None
        block, following = blocks[index], blocks[index + 1] if index + 1 < len(blocks) else None
        if following is None or is_hooked(block) or is_hooked(following) or following.saves_memory:
            return
        plan: Plan | None = following.plan
        image, text = modulation.image[index + 1], modulation.text[None, index + 1]
        if plan is None or plan.reason is not None or image.dtype == torch.float16:
            return  # not planned yet; or its tokens will be clipped
        self.image = image, plan.image_qkv.target
        self.text = text, plan.text_qkv.target

    def give(self, streams: tuple[Tensor, Tensor], normed: "tuple[Tokens, Tokens]") -> None:
        """Hand over both streams as they are, and normalised."""
        assert self.image is not None and self.text is not None
        self._streams, self._normed = streams, normed
        self._targets = self.image[1], self.text[1]

    def take(self, image: Tensor, text: Tensor, plan: "Plan") -> "tuple[Tokens, Tokens] | None":
        """What was given for these streams and such a plan, once; None if these are others."""
        streams, normed = self._streams, self._normed
        self._streams = self._normed = None
        if streams is None or streams[0] is not image or streams[1] is not text:
            return None
        return normed if self._targets == (plan.image_qkv.target, plan.text_qkv.target) else None
