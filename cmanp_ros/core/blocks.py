"""
Layers of the network (Feng et al. 2023, section 4), in the reference's pre-norm form.

A sublayer returns f(n) + n with n = LayerNorm(u): the *normalized* input is added. With `stack`,
a layer holds one set of weights for each block and takes (block, batch, points, channels).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmanp_ros.core.attention import attend, padded


class StackedLinear(nn.Module):
    """
    `stack` linear maps side by side: (stack, ..., dim_in) to (stack, ..., dim_out).
    """

    def __init__(self, dim_in, dim_out, bias, stack):
        super().__init__()
        bound = dim_in**-0.5
        self.weight = nn.Parameter(torch.empty(stack, dim_out, dim_in).uniform_(-bound, bound))
        self.bias = (
            nn.Parameter(torch.empty(stack, dim_out).uniform_(-bound, bound)) if bias else None
        )

    def forward(self, u: Tensor) -> Tensor:
        flat = u.flatten(1, -2)  # (stack, n, dim_in)
        out = torch.bmm(flat, self.weight.mT)
        if self.bias is not None:
            out = out.add_(self.bias.unsqueeze(1))
        return out.unflatten(1, u.shape[1:-1])


class StackedLayerNorm(nn.Module):
    """
    `stack` layer norms side by side, (stack, ..., dim).
    """

    def __init__(self, dim, stack):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(stack, dim))
        self.bias = nn.Parameter(torch.zeros(stack, dim))

    def forward(self, u: Tensor) -> Tensor:
        shape = (len(self.weight),) + (1,) * (u.dim() - 2) + (u.shape[-1],)
        normalized = F.layer_norm(u, u.shape[-1:])
        return normalized * self.weight.view(shape) + self.bias.view(shape)


def linear(dim_in, dim_out, bias=True, stack=None):
    """
    Return one linear map, or `stack` of them.
    """
    return (
        nn.Linear(dim_in, dim_out, bias)
        if stack is None
        else StackedLinear(dim_in, dim_out, bias, stack)
    )


def layer_norm(dim, stack=None):
    """
    Return one layer norm, or `stack` of them.
    """
    return nn.LayerNorm(dim) if stack is None else StackedLayerNorm(dim, stack)


def mlp(dim_in, dim_hidden, dim_out, depth):
    """
    Return `depth` linear layers with ReLU between them.
    """
    layers = [nn.Linear(dim_in, dim_hidden), nn.ReLU(inplace=True)]
    for _ in range(depth - 2):
        layers += [nn.Linear(dim_hidden, dim_hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(dim_hidden, dim_out))


def split_heads(u: Tensor, num_heads) -> Tensor:
    """
    Return (..., n, channels) as (..., head, n, dim_head); heads are contiguous channels.
    """
    return u.unflatten(-1, (num_heads, -1)).transpose(-2, -3)


def join_heads(u: Tensor) -> Tensor:
    """
    Return (..., head, n, dim_head) as (..., n, channels).
    """
    return u.transpose(-2, -3).flatten(-2)


class FeedForward(nn.Module):
    """
    Pre-norm gated feed-forward layer (GEGLU) with the residual of this module's head.
    """

    def __init__(self, dim, dim_feedforward, stack=None):
        super().__init__()
        self.norm = layer_norm(dim, stack)
        self.wide = linear(dim, 2 * dim_feedforward, stack=stack)
        self.narrow = linear(dim_feedforward, dim, stack=stack)

    def forward(self, u: Tensor) -> Tensor:
        n = self.norm(u)
        value, gate = self.wide(n).chunk(2, -1)
        return self.narrow(F.gelu(gate).mul_(value)).add_(n)


class Attention(nn.Module):
    """
    Pre-norm multi-head attention: over itself, or over a context with its own norm.
    """

    def __init__(self, dim, num_heads, cross, stack=None):
        super().__init__()
        self.num_heads = num_heads
        self.norm = layer_norm(dim, stack)
        self.norm_context = layer_norm(dim, stack) if cross else None
        self.to_q = linear(dim, dim, bias=False, stack=stack)
        self.to_kv = linear(dim, 2 * dim, bias=False, stack=stack)
        self.to_out = linear(dim, dim, stack=stack)

    def keys_and_values(self, context: Tensor) -> Tensor:
        """
        Project a context (..., n, dim) once, for any number of calls: (..., n, 2 * dim).
        """
        return self.to_kv(self.norm_context(context))

    def forward(
        self, u: Tensor, projected: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """
        Attend from u (..., n, dim); `projected` comes from `keys_and_values`.

        :param mask: (batch, n) where contexts have different numbers of rows: u is (rows, dim).
        """
        n = self.norm(u)
        query = self.to_q(n) if mask is None else padded(self.to_q(n), mask)
        key, value = (self.to_kv(n) if projected is None else projected).chunk(2, -1)
        # Blocks and tiles in one axis: only with four axes torch has a fused kernel.
        q, key, value = (
            split_heads(part.flatten(0, -3), self.num_heads) for part in (query, key, value)
        )
        read = join_heads(attend(q, key, value))
        read = read.view_as(n) if mask is None else read[mask]
        return self.to_out(read).add_(n)


class Integration(nn.Module):
    """
    Last step of a CMAB: the latents read what the block gathered.
    """

    def __init__(self, dim, dim_feedforward, num_heads):
        super().__init__()
        self.cross_attention = Attention(dim, num_heads, cross=True)
        self.cross_feedforward = FeedForward(dim, dim_feedforward)
        self.self_attention = Attention(dim, num_heads, cross=False)
        self.feedforward = FeedForward(dim, dim_feedforward)

    def forward(self, latents: Tensor, gathered: Tensor) -> Tensor:
        projected = self.cross_attention.keys_and_values(gathered)
        latents = self.cross_feedforward(self.cross_attention(latents, projected))
        return self.feedforward(self.self_attention(latents))


class DecoderLayer(nn.Module):
    """
    Targets attend to the latents of one block.
    """

    def __init__(self, dim, dim_feedforward, num_heads):
        super().__init__()
        self.cross_attention = Attention(dim, num_heads, cross=True)
        self.feedforward = FeedForward(dim, dim_feedforward)

    def forward(self, h: Tensor, projected: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.feedforward(self.cross_attention(h, projected, mask))
