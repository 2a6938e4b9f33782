"""One frozen, validated description of a model; it travels inside the checkpoint."""

from dataclasses import asdict, dataclass, fields
from math import isfinite

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
    box_half_width: float = 2.8
    """Half width [model units] of the box whose Laplacian eigenfunctions are the basis."""
    smoothnesses: tuple[float, ...] = (1.5, 2.5)
    """Matern smoothnesses; inf is the RBF kernel."""
    lengths: tuple[float, ...] = (0.25, 0.45, 0.8, 1.4, 2.6)
    noise_ratios: tuple[float, ...] = (0.001, 0.01, 0.04, 0.2, 1.0)
    amplitude_shape: float = 3.0
    amplitude_scale: float = 0.6
    """
    Shape and scale of the inverse-gamma prior of the squared amplitude [model units^2]; in a
    world the scale of a tile follows from the coarsest tiles above it.
    """
    offset_variance: float = 4.0
    """Prior variance of the constant about the mean of a tile's values, relative to the squared
    amplitude."""
    slope_variance: float = 0.05
    """The same for the linear functions: narrow, or half-seen maps extrapolate wildly."""
    voxels_per_axis: int = 15
    """Resolution of the map of where points lay, over [-2, 2]: about that of the basis."""
    points_per_voxel: float = 1.0
    """Points of a voxel that count in full; see `least_squares.solve`."""

    def __post_init__(self):
        _require_counts(self)
        _require(self.box_half_width > 2, 'box_half_width', self.box_half_width, 'more than 2')
        for name in ('smoothnesses', 'lengths', 'noise_ratios'):
            values = tuple(float(value) for value in getattr(self, name))
            object.__setattr__(self, name, values)
            finite = values if name != 'smoothnesses' else ()
            positive = bool(values) and all(v > 0 for v in values) and all(map(isfinite, finite))
            _require(positive, name, values, 'one or more positive numbers')
        for name in (
            'points_per_voxel',
            'amplitude_shape',
            'amplitude_scale',
            'offset_variance',
            'slope_variance',
        ):
            value = getattr(self, name)
            _require(isfinite(value) and value > 0, name, value, 'a positive number')
        _require(self.amplitude_shape > 1, 'amplitude_shape', self.amplitude_shape, 'above 1')


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
    chunk_size: int = 1024
    """Points folded at once (b_C of the paper): bounds memory, never the result."""
    least_squares: LeastSquaresConfig | None = None
    num_levels: int = 1
    """Levels of tiles that predict together; 1 in the `paper` preset."""
    level_factor: int = 3
    """How many times larger the tiles of each level are than those of the one before."""

    def __post_init__(self):
        _require_counts(self)
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
        _require(self.embedder_depth >= 2, 'embedder_depth', self.embedder_depth, 'at least 2')
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
            'least_squares': LeastSquaresConfig(per_axis, voxels_per_axis=voxels),
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
        if values.get('least_squares') is not None:
            values['least_squares'] = _checked(LeastSquaresConfig, values['least_squares'])
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


def _require_counts(config):
    for field in fields(config):
        if field.type in (int, 'int'):
            value = getattr(config, field.name)
            is_count = isinstance(value, int) and not isinstance(value, bool)
            _require(is_count and value >= 1, field.name, value, 'an integer of at least 1')


def _require(condition, name, value, expected):
    if not condition:
        raise ConfigError(f'{name} is {value!r}, expected {expected}')
