"""The Constant Memory Attentive Neural Process: fold points into a state, predict from it."""

from math import log
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.distributions import Normal

from cmanp_ros.core import basis, inducing, least_squares, outliers
from cmanp_ros.core.attention import AttentionSums
from cmanp_ros.core.autoregressive import CovarianceHead
from cmanp_ros.core.blocks import DecoderLayer, mlp
from cmanp_ros.core.config import CMANPConfig
from cmanp_ros.core.encoder import Encoder
from cmanp_ros.core.errors import InputError
from cmanp_ros.core.least_squares import Regression
from cmanp_ros.core.predictive import PredictiveDistribution
from cmanp_ros.core.state import State, merge
from cmanp_ros.core.stochastic import GlobalVariable

TARGETS_AT_ONCE = 2048  # bounds the memory of a prediction, and fits in caches


class Encoding(NamedTuple):
    """
    What a prediction needs of a state; made by the first prediction after an update.
    """

    projected: list[Tensor]
    """For each decoder layer, keys and values of the latents (batch, num_latents, 2 * dim)."""
    regression: Regression | None
    global_variable: Normal | None
    """Of the stochastic variant, over (batch, num_global)."""


class Prior(NamedTuple):
    """
    What the regressions say at the targets of a tile, which the decoder corrects; float64.
    """

    mean: Tensor
    """(batch, n, dim_y)."""
    variance: Tensor
    """(batch, n, dim_y) of the field, without noise."""
    noise_variance: Tensor
    """(batch, 1, dim_y)."""
    summary: Tensor
    """(batch, 1, dim_y, NUM_SUMMARIES)."""
    context: Tensor
    """(batch, n, dim_y, num_context): what every level says, see `blending.compare`."""


class Decoded(NamedTuple):
    """
    What one tile answers at its targets, (batch, n, dim_y) each.
    """

    mean: Tensor
    stddev: Tensor
    """Of an observation."""
    correction: Tensor
    """Factor by which the network changed the regression's stddev; 1 without a regression."""
    log_weight: Tensor
    """Log weight of the answer against those of other tiles; 0 without a regression."""
    head_start: Tensor
    """Log of what it is multiplied by to mix means; 0 without a regression."""


class CMANP(nn.Module):
    """
    Constant Memory Attentive Neural Process (Feng et al., ICML 2024, arXiv 2305.14567).

    With `CMANPConfig.field` the regression on basis functions predicts, and the network corrects
    its mean (in units of its stddev) and its stddev; untrained, the corrections are zero. With
    `own_answer` it may also leave the regression aside.
    """

    def __init__(self, config: CMANPConfig):
        super().__init__()
        self.config = config
        dim, depth = config.dim_model, config.embedder_depth
        dim_context, dim_target = config.dim_x + config.dim_y, config.dim_x
        self.location = None
        if config.inducing_points:
            self.location = inducing.FourierFeatures(
                config.dim_x, dim, config.num_heads, *config.location_lengths
            )
            dim_context, dim_target = dim + 25 * config.dim_y, dim
        num_outputs = 2
        if config.least_squares is not None:
            num_features = 3 + least_squares.NUM_SUMMARIES + num_context(config)
            dim_target += config.dim_y * num_features
            num_outputs = 6 if config.own_answer else 3
        if config.autoregressive is not None:
            num_outputs = 1
        self.embedder = mlp(dim_context, dim, dim, depth)
        self.query_embedder = mlp(dim_target, dim, dim, depth)
        self.encoder = Encoder(config)
        self.decoder = nn.ModuleList(
            DecoderLayer(dim, config.dim_feedforward, config.num_heads)
            for _ in range(config.num_blocks)
        )
        self.norm = nn.LayerNorm(dim)
        self.predictor = mlp(dim, config.dim_feedforward, num_outputs * config.dim_y, 2)
        self.covariance_head = config.autoregressive and CovarianceHead(config)
        self.global_variable = GlobalVariable(config) if config.num_global else None
        if config.inducing_points:
            inducing.initialize(self)
        if config.least_squares is not None:
            nn.init.zeros_(self.predictor[-1].weight)
            nn.init.zeros_(self.predictor[-1].bias)
        self._encodings: WeakKeyDictionary[State, Encoding] = WeakKeyDictionary()

    # State ---------------------------------------------------------------------------------

    def init_state(self, batch: int = 1) -> State:
        """
        Return the state of no observations.
        """
        config, device = self.config, self.encoder.latents.device
        regression = config.least_squares and least_squares.empty(
            config.least_squares, config.dim_x, config.dim_y, batch, device
        )
        count = torch.zeros(batch, dtype=torch.int64, device=device)
        return State(self.encoder.empty(batch), regression, count)

    def update(
        self,
        state: State,
        x: Shaped[Tensor, 'batch n dim_x'],
        y: Shaped[Tensor, 'batch n dim_y'],
        mask: Bool[Tensor, 'batch n'] | None = None,
    ) -> State:
        """
        Fold observations in, exactly and without the old ones; neither latents nor factors run.

        :param x: (batch, n, dim_x) in model units, any n >= 0.
        :param y: (batch, n, dim_y) in model units.
        :param mask: which points are there, where tiles have different numbers; None: all.
        :return: a new state; the one given is unchanged.
        :raises InputError: for wrong shapes or values that are not finite.
        """
        self._check(state, x, self.config.dim_x, 'x')
        self._check(state, y, self.config.dim_y, 'y')
        if x.shape[1] != y.shape[1]:
            raise InputError(f'x has {x.shape[1]} points and y {y.shape[1]}: expected as many')
        for name, value in (('x', x), ('y', y)):
            if not torch.isfinite(value).all():
                raise InputError(f'{name} has NaN or infinite numbers; drop those points first')
        step = self.config.chunk_size
        for start in range(0, x.shape[1], step):
            chunk = slice(start, start + step)
            present = None if mask is None else mask[:, chunk]
            state = merge(state, self._chunk(x[:, chunk], y[:, chunk], present))
        return state

    def _chunk(self, x, y, mask):
        options, (batch, n, _) = self.config.least_squares, x.shape
        regression = options and least_squares.sums(options, x, y, mask)
        if mask is None:
            number, tokens = torch.full((batch,), n, device=x.device), self.embed(x, y)
        else:
            number, tokens = mask.sum(1), self.embed(x[mask], y[mask])
        return State(self.encoder.fold(tokens, mask), regression, number)

    def embed(self, x, y) -> Float[Tensor, '*points dim_model']:
        """
        Return the tokens of observations, (..., dim_x) and (..., dim_y).
        """
        x, y = x.to(self.encoder.latents.dtype), y.to(self.encoder.latents.dtype)
        if self.location is None:
            return self.embedder(torch.cat([x, y], -1))
        place = self.location(x)
        return place + self.embedder(torch.cat([place, inducing.value_features(y)], -1))

    # Prediction ----------------------------------------------------------------------------

    def predict(
        self, state: State, x_target: Shaped[Tensor, 'batch n dim_x'], joint: bool = False
    ) -> PredictiveDistribution:
        """
        Predict observations at targets.

        :param x_target: (batch, n, dim_x) in model units.
        :param joint: also return the covariance over the targets: n^2 numbers. In CMANP-AND that
            of one block; without a covariance head and least squares targets are independent.
        :raises InputError: for wrong shapes or values that are not finite.
        """
        self.check_targets(state, x_target)
        encoding = self.encoding(state)
        parts = [self._marginals(encoding, part) for part in x_target.split(TARGETS_AT_ONCE, 1)]
        mean, stddev = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        covariance = self._covariance(encoding, x_target, stddev) if joint else None
        return PredictiveDistribution(mean, stddev, covariance)

    def sample_fields(
        self, state: State, x_target: Tensor, num_samples: int, generator=None
    ) -> Tensor:
        """
        Draw whole fields (without observation noise) and evaluate them at targets.

        Weights are sampled, not targets: memory does not grow with their number squared, and
        one generator seed gives one field wherever it is evaluated.

        :return: (num_samples, batch, n, dim_y).
        :raises InputError: for a model without the least-squares memory.
        """
        if self.config.least_squares is None:
            raise InputError('this model has no least-squares memory, so no fields to sample')
        encoding = self.encoding(state)
        weights = least_squares.sample_weights(encoding.regression, num_samples, generator)
        parts = []
        for chunk in x_target.split(TARGETS_AT_ONCE, 1):
            prior = self.regress(encoding, chunk)
            mean, _, ratio, *_ = self.decode(encoding.projected, chunk, prior)
            phi = basis.functions(self.config.least_squares, chunk).unsqueeze(1)
            deviation = phi @ weights - prior.mean.unsqueeze(1)  # (batch, samples, n, dim_y)
            parts.append((mean.unsqueeze(1) + deviation * ratio.unsqueeze(1)).transpose(0, 1))
        return torch.cat(parts, 2)

    def _marginals(self, encoding, x):
        """
        Return mean and stddev at targets.
        """
        if self.covariance_head is not None:
            alone = x.flatten(0, 1).unsqueeze(1)  # blocks of one target
            projected = [part.repeat_interleave(x.shape[1], 0) for part in encoding.projected]
            mean, factor = self.decode_block(projected, alone)
            stddev = factor.square().sum(-1).sqrt()
            return (part.unflatten(0, x.shape[:2]) for part in (mean, stddev))
        if self.global_variable is None:
            return self.decode(encoding.projected, x, self.regress(encoding, x))[:2]
        answers = [
            self.decode(encoding.projected, x, None, sample)
            for sample in self.global_variable.quantile_samples(encoding.global_variable)
        ]
        mean = sum(answer.mean for answer in answers) / len(answers)
        spread = [a.stddev.square() + (a.mean - mean).square() for a in answers]
        return mean, (sum(spread) / len(answers)).sqrt()

    def encoding(self, state: State) -> Encoding:
        """
        Return what predictions need of a state; cached for as long as the state lives.
        """
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if learns or self.training:
            return self._encode(state)
        if state not in self._encodings:
            self._encodings[state] = self._encode(state)
        return self._encodings[state]

    def train(self, mode: bool = True):
        """
        Switch between training and evaluation; cached encodings are dropped.
        """
        self._encodings.clear()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        """Convert or move the weights; cached encodings are dropped."""
        self._encodings.clear()
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        """
        Load weights; cached encodings are dropped.
        """
        self._encodings.clear()
        return super().load_state_dict(*args, **kwargs)

    def _encode(self, state):
        config = self.config.least_squares
        regression = config and outliers.solve(
            config, least_squares.prior_variances(config, self.config.dim_x), state.least_squares
        )
        latents = self.encoder(state.attention)
        variable = self.global_variable and self.global_variable(latents[-1])
        return Encoding(self._project(latents), regression, variable)

    def latents(self, sums: AttentionSums) -> list[Tensor]:
        """
        Encode attention sums to latents, projected to keys and values of each decoder layer.

        :return: for each layer (batch, num_latents, 2 * dim_model).
        """
        return self._project(self.encoder(sums))

    def _project(self, latents):
        layers = zip(self.decoder, latents, strict=True)
        return [layer.cross_attention.keys_and_values(z) for layer, z in layers]

    def regress(self, encoding: Encoding, x: Tensor) -> Prior | None:
        """
        Return what the least-squares memory of a tile that is alone says; None without one.
        """
        regression = encoding.regression
        if regression is None:
            return None
        mean, variance = least_squares.predict(self.config.least_squares, regression, x)
        noise = regression.noise_variance.unsqueeze(1)
        context = mean.new_zeros(*mean.shape, num_context(self.config))
        context[..., 0] = -1.0  # the finest level
        context[..., 1] = 1.0  # the level of this tile covers the target, no other does
        return Prior(mean, variance, noise, regression.summary.unsqueeze(1), context)

    def decode(
        self,
        projected: list[Tensor],
        x: Tensor,
        prior: Prior | None,
        global_sample: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Decoded:
        """
        Predict observations at targets of each tile.

        :param projected: what `latents` gave.
        :param x: (batch, n, dim_x) in model units.
        :param global_sample: (batch, num_global), of the stochastic variant.
        :param mask: (batch, n) where tiles have different numbers of targets: `x`, `prior` and
            the answer then are (targets, ...), tile after tile.
        """
        output = self.predictor(self._decode_tokens(projected, x, prior, global_sample, mask))
        if prior is not None:
            first, second, third, *own = output.double().split(self.config.dim_y, -1)
            stddev = (prior.variance + prior.noise_variance).sqrt()
            mean = prior.mean + stddev * _bounded(first, 2.0)
            limit = torch.where(second < 0, -log(LEAST_STDDEV), 2.5)
            correction = _bounded(second, limit).exp()
            head_start, known = _head_start(prior, self.config).expand(2, *mean.shape)
            log_weight = _bounded(third, 6.0) - 2 * stddev.log() + known  # untrained: by precision
            answer = Decoded(mean, stddev * correction, correction, log_weight, head_start)
            return _mixed_with(answer, stddev, *own) if own else answer
        first, second = output.chunk(2, -1)
        bounded = self.config.bounded_stddev
        stddev = 0.05 + 0.95 * nn.functional.softplus(second) if bounded else second.exp()
        none = torch.zeros_like(first)
        return Decoded(first, stddev, none.exp(), none, none)

    def decode_block(self, projected: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """
        Predict the targets of one block together, by the covariance head of CMANP-AND.

        :param x: (batch, n, dim_x) in model units.
        :return: mean (batch, n * dim_y) and Cholesky factor (batch, n * dim_y, n * dim_y).
        """
        h = self._decode_tokens(projected, x)
        return self.predictor(h).flatten(1), self.covariance_head(h)

    def _decode_tokens(self, projected, x, prior=None, global_sample=None, mask=None):
        x = x.to(self.encoder.latents.dtype)
        place = x if self.location is None else self.location(x)
        inputs = [place]
        if prior is not None:
            inputs.append(self._prior_features(prior, place))
        h = self.query_embedder(torch.cat(inputs, -1))
        if self.location is not None:
            h = h + place
        if global_sample is not None:
            h = h + self.global_variable.to_token(global_sample).unsqueeze(1)
        for layer, keys_and_values in zip(self.decoder, projected, strict=True):
            h = layer(h, keys_and_values, mask)
        return self.norm(h)

    def _prior_features(self, prior, place):
        logs = (
            0.5
            * torch.stack([prior.variance, prior.noise_variance.expand_as(prior.mean)], -1).log()
        )
        summary = prior.summary.expand(*place.shape[:-1], -1, -1)
        features = torch.cat([prior.mean.unsqueeze(-1), logs, summary, prior.context], -1)
        return _bounded(features.flatten(-2) / 2, 4.0).to(place.dtype)

    def _covariance(self, encoding, x, stddev):
        regression = encoding.regression
        if self.covariance_head is not None:
            return self._block_covariance(encoding, x)
        if regression is None:
            return torch.diag_embed(stddev.square().mT)
        config = self.config.least_squares
        covariance = least_squares.joint_covariance(config, regression, x)
        noise = regression.noise_variance[..., None, None]
        eye = torch.eye(x.shape[1], dtype=covariance.dtype, device=x.device)
        covariance = covariance + noise * eye
        ratio = stddev.mT / covariance.diagonal(dim1=-2, dim2=-1).sqrt()  # (batch, dim_y, n)
        return covariance * ratio.unsqueeze(-1) * ratio.unsqueeze(-2)

    def _block_covariance(self, encoding, x):
        size = self.config.autoregressive.block_size
        if x.shape[1] > size or self.config.dim_y > 1:
            raise InputError(
                f'{x.shape[1]} targets with {self.config.dim_y} values each, expected one block '
                f'of at most {size} with one value: use autoregressive.sample or joint_log_prob'
            )
        factor = self.decode_block(encoding.projected, x)[1]
        return (factor @ factor.mT).unsqueeze(1)

    def check_targets(self, state: State, x_target: Tensor):
        """
        Refuse targets that cannot be predicted.

        :raises InputError: for wrong shapes or values that are not finite.
        """
        self._check(state, x_target, self.config.dim_x, 'x_target')
        if not torch.isfinite(x_target).all():
            raise InputError('x_target has NaN or infinite numbers; drop those targets first')

    def _check(self, state, value, dim, name):
        if value.dim() != 3 or len(value) != state.batch or value.shape[-1] != dim:
            raise InputError(
                f'{name} has shape {tuple(value.shape)}, expected (batch, n, dim) = '
                f'({state.batch}, n, {dim})'
            )


def num_context(config: CMANPConfig) -> int:
    """
    Return the numbers per target that compare the levels, see `blending.compare`.
    """
    return 1 + 3 * config.num_levels


LEAST_STDDEV = 0.65  # of the regression's: a reading far off must not be a catastrophe
OWN_LOG_ODDS = -2.0  # of an untrained decoder's own answer where both are as precise
OWN_FARTHEST = 30.0  # [model units] from 0, beyond which it has nothing to say
SEEN_WELL = 0.5  # share of a tile: more than one pass of a track, less than scattered readings
STEEP = 1.6  # amplitude over that of the coarsest tiles above
SEEN_ALL_OVER, SCATTERED = 0.75, 0.9  # shares of a tile, and of its readings that count
FULL = 0.55  # of what can count of a tile's readings at most
PART = 0.4  # of the head start, of the stddev of such tiles


def _head_start(prior, config):
    """
    Return by how much finer tiles that were seen well weigh more, in logarithms.

    A coarse tile takes its noise to be the same all over, so where the field is rough it claims
    less error than it has. Not so a tile that was seen along a track only, or in which passes
    disagree or a blunder looks like a cliff: it extrapolates wildly. For standard deviations it
    has to be seen all over, by readings that are scattered or fill it: those that crowd in passes
    tell less than their number.

    :return: (2, ...): what is added for means alone, and what for both.
    """
    seen = prior.summary[..., least_squares.SEEN]
    num_coarser = (1 - prior.context[..., 0]) / 2 * (config.num_levels - 1)
    is_calm = torch.sigmoid(10 * (log(STEEP) - prior.summary[..., least_squares.LOG_AMPLITUDE]))
    whole = num_coarser.square() * torch.sigmoid(20 * (seen - SEEN_WELL)) * is_calm
    log_honesty = prior.summary[..., least_squares.LOG_HONESTY]
    is_scattered = torch.sigmoid(30 * (log_honesty - log(SCATTERED)))
    full = FULL * least_squares.largest_count(config.least_squares, config.dim_x)
    is_full = torch.sigmoid(8 * (prior.summary[..., least_squares.LOG_COUNT] - log(full)))
    tells_all = torch.maximum(is_scattered, is_full)
    both = PART * torch.sigmoid(20 * (seen - SEEN_ALL_OVER)) * tells_all * whole
    return torch.stack([whole - both, both])


def _mixed_with(answer, stddev, mean, log_stddev, log_odds):
    """
    Return two moments of the mixture of an answer and the decoder's own, by precision.

    :param stddev: of the regression.
    """
    own_stddev = (_bounded(log_stddev, 5.0).exp().square() + (LEAST_STDDEV * stddev) ** 2).sqrt()
    precision = 2 * (answer.stddev / own_stddev).log()
    too_far = (answer.mean.abs() - OWN_FARTHEST).clamp(min=0)  # no training had such values
    own = torch.sigmoid(_bounded(log_odds, 8.0) + OWN_LOG_ODDS + precision - too_far)
    mixed = answer.mean + own * (mean - answer.mean)
    variance = (1 - own) * (answer.stddev.square() + (answer.mean - mixed).square())
    variance = variance + own * (own_stddev.square() + (mean - mixed).square())
    return answer._replace(mean=mixed, stddev=variance.sqrt())


def _bounded(value, limit):
    """
    Return about `value` where it is small, never beyond the limit: odd inputs stay harmless.
    """
    return limit * torch.tanh(value / limit)
