"""
A straightforward implementation of the paper, to be faster than: one block after the other.

Every update folds the new points and encodes all latents again, as the paper's text reads; the
equations are those of Feng et al. 2023, section 4. `checkpoint.load_reference` makes our model of
the same weights: the names are those of the authors' code.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmanp_ros.core import CMANPConfig


class EagerState(NamedTuple):
    """What is kept of the observations, and the latents that follow from it."""

    logsumexp: list[Tensor]
    """For each block (batch, head, query)."""
    mean_value: list[Tensor]
    """For each block (batch, head, query, dim_head)."""
    encoding: list[Tensor]
    """For each block (batch, num_latents, dim_model)."""

    @property
    def nbytes(self) -> int:
        """Size of the sums [bytes]."""
        return sum(part.nbytes for part in (*self.logsumexp, *self.mean_value))


class EagerCMANP(nn.Module):
    """
    The `paper` preset: attention sums only, float32.
    """

    def __init__(self, config: CMANPConfig):
        super().__init__()
        self.config, dim = config, config.dim_model
        self.latents = nn.Parameter(torch.randn(config.num_latents, dim))
        self.embedder = _mlp(config.dim_x + config.dim_y, dim, config.embedder_depth)
        self.query_embedder = _mlp(config.dim_x, dim, config.embedder_depth)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_Block(config) for _ in range(config.num_blocks))
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(dim)
        self.predictor = nn.Sequential(
            nn.Linear(dim, config.dim_feedforward),
            nn.ReLU(),
            nn.Linear(config.dim_feedforward, 2 * config.dim_y),
        )

    def condition(self, x: Tensor, y: Tensor) -> EagerState:
        """
        Encode all points (batch, n, dim) at once; memory grows with n.
        """
        tokens, latents = self.embedder(torch.cat([x, y], -1)), self.latents.expand(len(x), -1, -1)
        state = EagerState([], [], [])
        for block in self.encoder.layers:
            latents = self._append(state, block, block.attend(tokens), latents)
        return state

    def update(self, state: EagerState, x: Tensor, y: Tensor) -> EagerState:
        """
        Fold points into the sums of each block, and encode them again.
        """
        tokens, latents = self.embedder(torch.cat([x, y], -1)), self.latents.expand(len(x), -1, -1)
        updated = EagerState([], [], [])
        before = zip(state.logsumexp, state.mean_value, strict=True)
        for block, (logsumexp, mean) in zip(self.encoder.layers, before, strict=True):
            new_logsumexp, new_mean = block.attend(tokens)
            total = torch.logaddexp(logsumexp, new_logsumexp)
            old_share = (logsumexp - total).exp().unsqueeze(-1)
            new_share = (new_logsumexp - total).exp().unsqueeze(-1)
            sums = total, old_share * mean + new_share * new_mean
            latents = self._append(updated, block, sums, latents)
        return updated

    def predict(self, state: EagerState, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        Return mean and stddev at targets (batch, n, dim_x).
        """
        h = self.query_embedder(x)
        for layer, latents in zip(self.decoder.layers, state.encoding, strict=True):
            h = layer.cross_ff(layer.cross_attn(h, latents))
        mean, log_stddev = self.predictor(self.norm(h)).chunk(2, -1)
        return mean, log_stddev.exp()

    @staticmethod
    def _append(state, block, sums, latents):
        latents = block(*sums, latents)
        for values, value in zip(state, (*sums, latents), strict=True):
            values.append(value)
        return latents


class _Block(nn.Module):
    """A constant-memory attention block."""

    def __init__(self, config):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.num_latents_per_block, config.dim_model))
        self.layer_cross_attn = _Attention(config, cross=True)
        self.layer_cross_ff = _FeedForward(config)
        self.layer_latent_self_attn = _Attention(config)
        self.layer_latent_ff = _FeedForward(config)
        self.cross_attn = _Attention(config, cross=True)
        self.cross_ff = _FeedForward(config)
        self.latent_self_attn = _Attention(config)
        self.latent_ff = _FeedForward(config)

    def attend(self, tokens):
        """Return log-sum-exp and mean value of all points under the attention of the latents."""
        layer = self.layer_cross_attn
        query, key, value = layer.project(
            layer.norm(self.latents.expand(len(tokens), -1, -1)), layer.norm_context(tokens)
        )
        scores = query @ key.mT / query.shape[-1] ** 0.5
        return scores.logsumexp(-1), scores.softmax(-1) @ value

    def forward(self, logsumexp, mean_value, latents):
        layer = self.layer_cross_attn
        gathered = layer.fn.to_out(mean_value.transpose(1, 2).flatten(2)) + layer.norm(
            self.latents
        )
        gathered = self.layer_cross_ff(gathered)
        gathered = self.layer_latent_ff(self.layer_latent_self_attn(gathered))
        latents = self.cross_ff(self.cross_attn(latents, gathered))
        return self.latent_ff(self.latent_self_attn(latents))


class _Layer(nn.Module):
    """A layer of the decoder."""

    def __init__(self, config):
        super().__init__()
        self.cross_attn, self.cross_ff = _Attention(config, cross=True), _FeedForward(config)


class _Attention(nn.Module):
    """Pre-norm attention; the residual is the normalized input."""

    def __init__(self, config, cross=False):
        super().__init__()
        dim, self.num_heads = config.dim_model, config.num_heads
        self.norm, self.fn = nn.LayerNorm(dim), nn.Module()
        if cross:
            self.norm_context = nn.LayerNorm(dim)
        self.fn.to_q = nn.Linear(dim, dim, bias=False)
        self.fn.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.fn.to_out = nn.Linear(dim, dim)

    def project(self, u, context):
        """Return queries, keys and values, (batch, head, n, dim_head)."""
        parts = (self.fn.to_q(u), *self.fn.to_kv(context).chunk(2, -1))
        return [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts]

    def forward(self, u, context=None):
        n = self.norm(u)
        query, key, value = self.project(n, n if context is None else self.norm_context(context))
        scores = query @ key.mT / query.shape[-1] ** 0.5
        read = scores.softmax(-1) @ value
        return self.fn.to_out(read.transpose(1, 2).flatten(2)) + n


class _FeedForward(nn.Module):
    """Pre-norm gated feed-forward layer; the residual is the normalized input."""

    def __init__(self, config):
        super().__init__()
        dim, wide = config.dim_model, config.dim_feedforward
        self.norm, self.fn = nn.LayerNorm(dim), nn.Module()
        self.fn.net = nn.ModuleList([nn.Linear(dim, 2 * wide), nn.GELU(), nn.Linear(wide, dim)])

    def forward(self, u):
        n = self.norm(u)
        value, gate = self.fn.net[0](n).chunk(2, -1)
        return self.fn.net[2](value * F.gelu(gate)) + n


def _mlp(dim_in, dim, depth):
    layers = [nn.Linear(dim_in, dim), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Linear(dim, dim), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(dim, dim))
