"""One frozen, validated description of a model; it travels inside the checkpoint."""

from dataclasses import asdict, dataclass, fields
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

    functions_per_axis: int = 16
    box_half_width: float = 2.5
    """Half width [model units] of the box whose Laplacian eigenfunctions are the basis."""
    smoothnesses: tuple[float, ...] = (1.5, 2.5, inf)
    """Matern smoothnesses; inf is the RBF kernel."""
    lengths: tuple[float, ...] = (0.2, 0.34, 0.58, 1.0, 1.7)
    noise_ratios: tuple[float, ...] = (0.015, 0.05, 0.14, 0.4)
    amplitude_shape: float = 2.0
    amplitude_scale: float = 0.9
    """Shape and scale of the inverse-gamma prior of the squared amplitude [model units^2]."""
    offset_variance: float = 0.5
    """Prior variance of the constant, relative to the squared amplitude."""
    slope_variance: float = 0.02
    """The same for the linear functions: narrow, or half-seen maps extrapolate wildly."""
    voxels_per_axis: int = 24
    """Resolution of the map of where points lay, over [-2, 2]: about that of the basis."""
    points_per_voxel: float = 2.5
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
        per_axis = {1: 64, 2: 16}.get(dim_x, 7)
        voxels = round(1.5 * per_axis)  # fields finer than the basis are correlated within one
        defaults = {
            'num_latents': 49,
            'num_latents_per_block': 49,
            'num_blocks': 4,
            'inducing_points': True,
            'least_squares': LeastSquaresConfig(per_axis, voxels_per_axis=voxels),
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
