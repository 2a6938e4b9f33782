"""
The constant-memory attentive blocks (CMAB) and their stack.

Only the first cross-attention of a block sees data, and its queries are parameters: all blocks
fold the same tokens at once, and everything after it runs when somebody asks for a prediction.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cmanp_ros.core import attention
from cmanp_ros.core.attention import AttentionSums
from cmanp_ros.core.blocks import Attention, FeedForward, Integration, join_heads, split_heads
from cmanp_ros.core.config import CMANPConfig


class Encoder(nn.Module):
    """
    K blocks: `fold` turns tokens into sums, `forward` turns sums into the latents of each block.
    """

    def __init__(self, config: CMANPConfig):
        super().__init__()
        blocks, dim, heads = config.num_blocks, config.dim_model, config.num_heads
        self.num_heads = heads
        self.latents = nn.Parameter(torch.randn(config.num_latents, dim))
        self.block_latents = nn.Parameter(torch.randn(blocks, config.num_latents_per_block, dim))
        self.gather = Attention(dim, heads, cross=True, stack=blocks)
        self.gather_feedforward = FeedForward(dim, config.dim_feedforward, stack=blocks)
        self.block_attention = Attention(dim, heads, cross=False, stack=blocks)
        self.block_feedforward = FeedForward(dim, config.dim_feedforward, stack=blocks)
        self.integrations = nn.ModuleList(
            Integration(dim, config.dim_feedforward, heads) for _ in range(blocks)
        )
        shape = (blocks, heads, config.num_latents_per_block)
        has_null = config.inducing_points
        self.null_score = nn.Parameter(torch.zeros(shape)) if has_null else None
        self.null_value = nn.Parameter(torch.zeros(*shape, dim // heads)) if has_null else None
        self._projected = None

    def empty(self, batch) -> AttentionSums:
        """
        Return the sums of no points.
        """
        blocks, queries, dim = self.block_latents.shape
        heads, device = self.num_heads, self.latents.device
        return attention.empty(batch, blocks, heads, queries, dim // heads, device)

    def fold(
        self,
        tokens: Float[Tensor, '*points dim_model'],
        mask: Bool[Tensor, 'batch n'] | None = None,
    ) -> AttentionSums:
        """
        Return the sums of these tokens in every block: step 1 of all CMABs at once.

        :param tokens: (batch, n, dim_model); with a mask only those that are there, (points, ...).
        :param mask: which tokens are there; None: all.
        """
        query, weight, shift = self._projections()
        projected = F.linear(F.layer_norm(tokens, tokens.shape[-1:]), weight, shift)
        if mask is not None:
            projected = attention.padded(projected, mask)
        projected = projected.unflatten(-1, (2, len(query), self.num_heads, -1))
        key, value = projected.permute(2, 0, 3, 4, 1, 5)  # (batch, block, head, n, dim_head)
        return attention.sums(query, key, value, mask)

    def _projections(self):
        """
        Return queries, and the weight and shift of all keys and values; kept while weights stay.

        LayerNorm's scale and shift are folded into the projection: one product for all blocks.
        """
        gather, latents = self.gather, self.block_latents
        used = (*gather.parameters(), latents)
        learns = torch.is_grad_enabled() and any(part.requires_grad for part in used)
        if learns or any(part.is_inference() for part in used):  # or nobody tells of changes
            return self._project()
        version = [(part.data_ptr(), part._version) for part in used]
        if self._projected is None or self._projected[0] != version:
            self._projected = version, self._project()
        return self._projected[1]

    def _project(self):
        gather = self.gather
        query = split_heads(gather.to_q(gather.norm(self.block_latents)), self.num_heads)
        query = query * query.shape[-1] ** -0.5  # (block, head, query, dim_head)
        weight = gather.to_kv.weight  # (block, 2 * dim, dim)
        scaled = weight * gather.norm_context.weight.unsqueeze(1)
        shift = (weight @ gather.norm_context.bias.unsqueeze(-1)).squeeze(-1)
        # Keys of all blocks first, then values: blocks and heads are one axis without a copy.
        scaled, shift = (
            part.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2) for part in (scaled, shift)
        )
        return query, scaled, shift

    def forward(self, sums: AttentionSums) -> list[Tensor]:
        """
        Encode the sums.

        :return: the latents of each block, (batch, num_latents, dim_model).
        """
        batch = len(sums.logsumexp)
        if self.null_score is not None:  # a pseudo-observation: zero points are a proper input
            null = AttentionSums(self.null_score.double(), self.null_value.double())
            null = AttentionSums(*(part.expand(batch, *part.shape) for part in null))
            sums = attention.merge(sums, null)
        mean = sums.mean_value.to(self.latents.dtype)
        read = join_heads(mean).transpose(0, 1)  # (block, batch, query, dim_model)
        gathered = self.gather.to_out(read) + self.gather.norm(self.block_latents).unsqueeze(1)
        gathered = self.block_attention(self.gather_feedforward(gathered))
        gathered = self.block_feedforward(gathered)  # (block, batch, query, dim_model)

        latents, encoding = self.latents.expand(batch, -1, -1), []
        for integration, block in zip(self.integrations, gathered, strict=True):
            latents = integration(latents, block)
            encoding.append(latents)
        return encoding
