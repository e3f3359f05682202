"""A block of the transformer with a LoRA in it, forward and backward by hand.

What it computes is `QwenImageTransformerBlock.forward` and its gradients. Autograd sees one operation per
block, `_Block`; inside of it nothing is recorded, so that

* frozen weights get no gradients, and what is kept for the backward pass is chosen (`Keep`): everything, or
  only the results of attention and of the last product, or nothing but the block's inputs. What is not kept
  is computed again;
* norms, gates and rotary positions are one pass over the tokens each way (kernels/), with the gradients of
  the modulation as their by-product;
* queries, keys and values of text and image are written into one buffer, as in `fused`.

The LoRA's weights may be fp32 while the block computes in bf16. Other adapters than a plain LoRA, trained
base weights, dropout, masks, several regions and hooks take the block's plain path (`why_not_trained`).

| file | subject |
|---|---|
| block.py | the operation, and when it can be used |
| values.py | layers, places of tokens, intermediate values |
| forward.py, backward.py | the arithmetic |
| linear.py | frozen linear layers with a LoRA |
"""

from .block import trained_block, why_not_trained
from .values import Keep

__all__ = ["Keep", "trained_block", "why_not_trained"]
