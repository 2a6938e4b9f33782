"""One frozen, validated description of a model; it travels inside the checkpoint."""

from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from math import inf, isfinite

from cmanp_ros.core.errors import ConfigError


@dataclass(frozen=True)
class LeastSquaresConfig:
    """
    The least-squares memory: a Hilbert-space reduced-rank GP (Solin and Saerkkae 2020).

    Lengths are in model units, in which the workspace is [-2, 2] along its longest axis; noise
    ratios are noise over amplitude. The grid of hyperparameters only enters when a state is
    encoded, never into the state. Amplitude is integrated out under an inverse-gamma prior.
    """

    functions_per_axis: int = 10
    box_half_width: float = 2.15
    """Half width [model units] of the box whose Laplacian eigenfunctions are the basis."""
    smoothnesses: tuple[float, ...] = (1.5,)
    """Matern smoothnesses; inf is the RBF kernel."""
    coarse_smoothnesses: tuple[float, ...] = ()
    """The same in tiles of all levels but the finest, which see less detail; none: the same."""
    lengths: tuple[float, ...] = (0.3, 0.62, 1.3, 2.7)
    noise_ratios: tuple[float, ...] = (0.002, 0.01, 0.04, 0.14, 0.45)
    refinement: int = 1
    """Steps from one length or noise ratio to the next, see `settings`; 1: nothing in between."""
    amplitude_shape: float = 3.0
    amplitude_scale: float = 0.6
    """
    Shape and scale of the inverse-gamma prior of the squared amplitude [model units^2]; in a
    world the scale of a tile follows from the coarsest tiles above it.
    """
    offset_variance: float = 4.0
    """Prior variance of the constant about the mean of a tile's values, relative to the squared
    amplitude; 0 for fields that are known to have mean 0."""
    slope_variance: float = 0.05
    """The same for the linear functions: narrow, or half-seen maps extrapolate wildly."""
    voxels_per_axis: int = 15
    """Resolution of the map of where points lay, over [-2, 2]: about that of the basis."""
    points_per_voxel: float = 2.0
    """Points of a voxel that count in full; see `least_squares.honesty`."""
    num_averaged: int = 8
    """Settings of the grid, those of most evidence, that a prediction averages at most."""
    averaged_weight: float = 0.97
    """Where so much of the weight of all settings is averaged, the others are left out."""
    outlier_share: float = 0.0
    """Share of readings that are taken to be far off, see `outliers`; 0: none are looked for."""
    noise_stddev: float | None = None
    """Where the noise of observations is known [model units]: the amplitude then follows from each
    noise ratio and is not integrated out."""

    def __post_init__(self):
        _require_types(self)
        _require(self.box_half_width > 2, 'box_half_width', self.box_half_width, 'more than 2')
        for name in ('smoothnesses', 'coarse_smoothnesses', 'lengths', 'noise_ratios'):
            values = _numbers(self, name)
            is_grid = name in ('lengths', 'noise_ratios')
            positive = all(v > 0 and (isfinite(v) or not is_grid) for v in values)
            there = bool(values) or name == 'coarse_smoothnesses'
            _require(there and positive, name, values, 'one or more positive numbers')
            increasing = all(one < next_one for one, next_one in pairwise(values))
            fine = self.refinement == 1 or not is_grid or increasing
            _require(fine, name, values, 'increasing numbers, as refinement is not 1')
        num, coarse = len(self.smoothnesses), self.coarse_smoothnesses
        expected = f'none, or {num} as smoothnesses'
        _require(len(coarse) in (0, num), 'coarse_smoothnesses', coarse, expected)
        for name in (
            'points_per_voxel',
            'amplitude_shape',
            'amplitude_scale',
            'noise_stddev',
        ):
            value = getattr(self, name)
            known = value is not None or name != 'noise_stddev'
            valid = not known or (isfinite(value) and value > 0)
            _require(valid, name, value, 'a positive number')
        share = self.averaged_weight
        _require(0 < share <= 1, 'averaged_weight', share, 'a number in (0, 1]')
        share = self.outlier_share
        _require(0 <= share < 0.5, 'outlier_share', share, 'a number in [0, 0.5)')
        for name in ('offset_variance', 'slope_variance'):
            value = getattr(self, name)
            _require(isfinite(value) and value >= 0, name, value, 'a number of at least 0')
        _require(self.amplitude_shape > 1, 'amplitude_shape', self.amplitude_shape, 'above 1')

    def of_level(self, level: int) -> 'LeastSquaresConfig':
        """
        Return the options of the tiles of a level; 0 is the finest.
        """
        if level == 0 or not self.coarse_smoothnesses:
            return self
        return replace(self, smoothnesses=self.coarse_smoothnesses)


@dataclass(frozen=True)
class AutoregressiveConfig:
    """
    CMANP-AND: a full covariance over blocks of targets, each folded in before the next.
    """

    block_size: int = 10
    """Targets that share a covariance (b_Q of the paper)."""
    num_layers: int = 2
    """Of the transformer through which the targets of a block see each other."""
    rank: int = 20
    """Columns of the factor of the covariance, per block."""
    depth: int = 4
    """Linear layers of the map to that factor."""

    def __post_init__(self):
        _require_types(self)
        _require(self.depth >= 2, 'depth', self.depth, 'at least 2')


@dataclass(frozen=True)
class CMANPConfig:
    """
    Sizes and parts of a CMANP; use `paper()` or `field()` and override what differs.
    """

    dim_x: int
    dim_y: int
    num_latents: int = 128
    num_latents_per_block: int = 128
    dim_model: int = 64
    dim_feedforward: int = 128
    num_heads: int = 4
    num_blocks: int = 6
    embedder_depth: int = 4
    bounded_stddev: bool = False
    inducing_points: bool = False
    """Fourier features of x, latents that start on a grid, and a learned null point."""
    location_lengths: tuple[float, float] = (0.3, 2.0)
    """Shortest and longest scale of those features [model units]."""
    chunk_size: int = 1024
    """Points folded at once (b_C of the paper): bounds memory, never the result."""
    least_squares: LeastSquaresConfig | None = None
    autoregressive: AutoregressiveConfig | None = None
    """CMANP-AND, of the `paper` preset only: with least squares the joint is in closed form."""
    own_answer: bool = False
    """Beside least squares: the decoder also answers from the latents alone, and a learned weight
    decides between both; what a regression cannot extrapolate, attention often can."""
    num_global: int = 0
    """Dimensions of the global latent variable of the stochastic variant; 0: there is none."""
    num_levels: int = 1
    """Levels of tiles that predict together; 1 in the `paper` preset."""
    level_factor: int = 3
    """How many times larger the tiles of each level are than those of the one before."""

    def __post_init__(self):
        _require_types(self)
        _require(
            self.dim_model % self.num_heads == 0,
            'dim_model',
            self.dim_model,
            f'a multiple of num_heads = {self.num_heads}',
        )
        if self.inducing_points:
            _require(
                self.dim_model % (2 * self.num_heads) == 0,
                'dim_model',
                self.dim_model,
                f'a multiple of 2 * num_heads = {2 * self.num_heads}: cosines and sines',
            )
        lengths = _numbers(self, 'location_lengths')
        ordered = len(lengths) == 2 and 0 < lengths[0] < lengths[1] < inf
        _require(ordered, 'location_lengths', lengths, 'two positive numbers, the shorter first')
        _require(self.embedder_depth >= 2, 'embedder_depth', self.embedder_depth, 'at least 2')
        exclusive = [self.least_squares, self.autoregressive, self.num_global or None]
        if sum(part is not None for part in exclusive) > 1:
            raise ConfigError(
                'least_squares, autoregressive and num_global exclude each other: expected at '
                'most one of them; least squares has a joint distribution of its own'
            )
        few_axes = self.dim_x <= 3 or self.least_squares is None  # see `neighbourhood.NEAR_FINEST`
        _require(few_axes, 'dim_x', self.dim_x, 'at most 3, or a model without least_squares')
        if self.own_answer and self.least_squares is None:
            raise ConfigError(
                'own_answer is true without least_squares: expected both, or neither'
            )
        _require(self.level_factor >= 2, 'level_factor', self.level_factor, 'at least 2')

    @classmethod
    def paper(cls, dim_x, dim_y, **overrides):
        """
        Return the model of Feng et al., ICML 2024 (arXiv 2305.14567): attention sums only.
        """
        return cls(dim_x=dim_x, dim_y=dim_y, **overrides)

    @classmethod
    def field(cls, dim_x, dim_y, **overrides):
        """
        Return the default of robots: attention sums beside least squares on basis functions.
        """
        per_axis = {1: 12, 2: 10}.get(dim_x, 5)
        voxels = round(1.5 * per_axis)  # fields finer than the basis are correlated within one
        defaults = {
            'num_latents': 25,
            'num_latents_per_block': 25,
            'dim_model': 48,
            'dim_feedforward': 96,
            'num_blocks': 2,
            'inducing_points': True,
            'least_squares': LeastSquaresConfig(
                per_axis,
                coarse_smoothnesses=(2.5,),
                voxels_per_axis=voxels,
                refinement=2,
                outlier_share=0.05,
            ),
            'num_levels': 3,
        }
        return cls(dim_x=dim_x, dim_y=dim_y, **{**defaults, **overrides})

    def to_dict(self):
        """
        Return the plain values that `from_dict` reads, ready for JSON.
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, values):
        """
        Build a configuration from plain values.

        :raises ConfigError: for an unknown or missing key, or a value out of range.
        """
        values = dict(values)
        parts = {'least_squares': LeastSquaresConfig, 'autoregressive': AutoregressiveConfig}
        for name, part in parts.items():
            if (given := values.get(name)) is not None:
                _require(isinstance(given, dict), name, given, 'a mapping of options, or null')
                values[name] = _checked(part, given)
        return _checked(cls, values)


def _checked(cls, values):
    known = [field.name for field in fields(cls)]
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f'{cls.__name__} has no {unknown}; expected keys among {known}')
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f'{cls.__name__}: {error}') from error


def _require_types(config):
    """
    Refuse what is of another type than its field; text may be a number: YAML reads 1e9 as such.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is int:
            is_count = isinstance(value, int) and not isinstance(value, bool)
            least = 0 if field.default == 0 else 1
            expected = f'an integer of at least {least}'
            _require(is_count and value >= least, field.name, value, expected)
        elif field.type is bool:
            _require(isinstance(value, bool), field.name, value, 'true or false')
        elif field.type in (float, float | None):
            if isinstance(value, str):
                with suppress(ValueError, OverflowError):
                    value = float(value)
                    object.__setattr__(config, field.name, value)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            is_none = value is None and field.default is None
            _require(is_number or is_none, field.name, value, 'a number')


def _numbers(config, name):
    """
    Return several numbers, which may be text, and keep them.
    """
    values = getattr(config, name)
    try:
        if isinstance(values, str) or any(isinstance(value, bool) for value in values):
            raise TypeError
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f'{name} is {values!r}, expected numbers') from None
    object.__setattr__(config, name, numbers)
    return numbers


def _require(condition, name, value, expected):
    if not condition:
        raise ConfigError(f'{name} is {value!r}, expected {expected}')
