"""What the transformer makes of the timestep."""

from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn


class TimestepTextEmbedding(nn.Module):
    """Embedding [B, D] of the timestep and, for Layered, of the kind of picture.

    Sinusoids of 1000 sigma, then a two-layer MLP. Name and keys as in diffusers; the text has no part in it.
    """

    def __init__(self, width: int, use_additional_t_cond: bool) -> None:
        super().__init__()
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
        self.timestep_embedder = TimestepEmbedding(in_channels=256, time_embed_dim=width)
        self.use_additional_t_cond = use_additional_t_cond
        if use_additional_t_cond:
            self.addition_t_embedding = nn.Embedding(2, width)

    def forward(self, sigma: Tensor, like: Tensor, additional_t_cond: Tensor | None = None) -> Tensor:
        """Embed `sigma` [B] as [B, D], in the type of `like`.

        Args:
            additional_t_cond: [B], 0 for RGB and 1 for RGBA, where the model was trained with it.

        Raises:
            ValueError: if the model needs it and it is missing.
        """
        embedded: Tensor = self.timestep_embedder(self.time_proj(sigma).to(like.dtype))
        if not self.use_additional_t_cond:
            return embedded
        if additional_t_cond is None:
            raise ValueError("This model was trained with use_additional_t_cond: pass additional_t_cond [B].")
        kind: Tensor = self.addition_t_embedding(additional_t_cond)
        return embedded + kind.to(like.dtype)
