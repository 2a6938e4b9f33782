"""
The first memory: softmax cross-attention of fixed queries, kept as running sums.

Queries are learned and never change, so softmax over all points so far needs only its log
normalizer and its average value (Feng et al. 2023, section 4.1; design of the online softmax).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

FEW_KEYS = 64  # of latents: up to here plain products take half the time of a fused kernel
FEW_POINTS = 32  # folded at once: below it the kernel that returns the log of its sums is slower


class AttentionSums(NamedTuple):
    """
    Softmax attention over any set of points; float64.
    """

    logsumexp: Float[Tensor, 'batch block head query']
    """log of the sum over points of exp(score); -inf for no points."""
    mean_value: Float[Tensor, 'batch block head query dim_head']
    """Average of the values under the softmax; 0 for no points."""


def sums(
    query: Float[Tensor, 'block head query dim_head'],
    key: Float[Tensor, 'batch block head n dim_head'],
    value: Float[Tensor, 'batch block head n dim_head'],
    mask: Bool[Tensor, 'batch n'] | None = None,
) -> AttentionSums:
    """
    Return the sums of one chunk of points: scores in the precision given, sums in float64.

    :param query: already divided by the square root of dim_head.
    :param mask: which points are there; None: all.
    """
    learns = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    is_there = HAS_FUSED and query.device.type == 'cpu' and not learns
    fused = is_there and key.shape[3] >= FEW_POINTS
    logsumexp, mean = (fused_softmax if fused else plain_softmax)(query, key, value, mask)
    return AttentionSums(logsumexp.double(), mean.double())


def plain_softmax(query, key, value, mask=None):
    """
    Attend in plain operations: what `fused_softmax` does, anywhere and with gradients.

    :return: log of the sums, and the averages; see `AttentionSums`.
    """
    scores = query @ key.mT  # (batch, block, head, query, n)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, None], -torch.inf)
    logsumexp = scores.logsumexp(-1)
    finite = torch.where(logsumexp == -torch.inf, 0.0, logsumexp)  # no point at all
    return logsumexp, (scores - finite.unsqueeze(-1)).exp() @ value


HAS_FUSED = hasattr(torch.ops.aten, '_scaled_dot_product_flash_attention_for_cpu')
"""Whether this torch has a CPU kernel that returns the log of the sums, too; no gradient."""


def fused_softmax(query, key, value, mask=None):
    """
    Attend in one kernel of torch: the scores never leave the processor's cache.
    """
    shape = query.shape[:2]
    rows = query.flatten(0, 1).expand(len(key), -1, -1, -1)
    bias = None
    if mask is not None:
        nothing = ~mask.any(1)  # where the kernel has no answer
        bias = torch.zeros_like(mask, dtype=query.dtype)
        bias.masked_fill_(~(mask | nothing.unsqueeze(1)), -torch.inf)
        bias = bias[:, None, None].expand(-1, 1, query.shape[2], -1)
    mean, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, key.flatten(1, 2), value.flatten(1, 2), attn_mask=bias, scale=1.0
    )
    logsumexp = logsumexp.unflatten(1, shape)
    mean = mean.unflatten(1, shape)
    if mask is not None:
        logsumexp[nothing], mean[nothing] = -torch.inf, 0.0
    return logsumexp, mean


def attend(
    query: Float[Tensor, 'batch head n dim_head'],
    key: Float[Tensor, 'batch head m dim_head'],
    value: Float[Tensor, 'batch head m dim_head'],
) -> Float[Tensor, 'batch head n dim_head']:
    """
    Attend to latents: a softmax over m keys for each of n queries.
    """
    if key.shape[2] > FEW_KEYS:
        return F.scaled_dot_product_attention(query, key, value)
    scores = query @ (key * key.shape[-1] ** -0.5).mT
    return scores.softmax(-1) @ value


def padded(rows: Shaped[Tensor, 'points dim'], mask: Bool[Tensor, 'batch n']) -> Tensor:
    """
    Lay out points, those that are there one after another, as (batch, n, dim); 0 elsewhere.
    """
    whole = rows.new_zeros(*mask.shape, rows.shape[-1])
    whole[mask] = rows
    return whole


def empty(batch, num_blocks, num_heads, num_queries, dim_head, device=None) -> AttentionSums:
    """
    Return the sums of no points.
    """
    shape = (batch, num_blocks, num_heads, num_queries)
    return AttentionSums(
        torch.full(shape, -torch.inf, dtype=torch.float64, device=device),
        torch.zeros(*shape, dim_head, dtype=torch.float64, device=device),
    )


def merge(a: AttentionSums, b: AttentionSums) -> AttentionSums:
    """
    Return the sums of both sets of points. Commutative, associative, exact.
    """
    largest = torch.maximum(a.logsumexp, b.logsumexp)
    largest = torch.where(largest == -torch.inf, 0.0, largest)  # both empty
    weight_a, weight_b = (a.logsumexp - largest).exp(), (b.logsumexp - largest).exp()
    total = weight_a + weight_b
    share = torch.where(total > 0, total, 1.0).reciprocal()
    mean = (weight_a * share).unsqueeze(-1) * a.mean_value
    mean = mean + (weight_b * share).unsqueeze(-1) * b.mean_value
    return AttentionSums(largest + total.log(), mean)


LARGEST_SUM = 1e6  # far beyond what layers after a LayerNorm make of any points


def is_possible(a: AttentionSums) -> Bool[Tensor, ' batch']:
    """
    Return whether observations can have given these sums, as far as their size tells.
    """
    mean_value = a.mean_value.flatten(1).abs().amax(1)
    return (a.logsumexp.flatten(1).amax(1) < LARGEST_SUM) & (mean_value < LARGEST_SUM)


def forget(a: AttentionSums, factor: float) -> AttentionSums:
    """
    Weight every point folded so far by `factor` in (0, 1], against points to come.
    """
    log_factor = torch.tensor(factor, dtype=torch.float64).log().to(a.logsumexp.device)
    return AttentionSums(a.logsumexp + log_factor, a.mean_value)
