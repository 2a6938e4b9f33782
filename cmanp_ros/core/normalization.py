"""The frozen affine map between metres and field units, and the units of the model."""

from dataclasses import asdict, dataclass

import numpy as np

from cmanp_ros.core.errors import ConfigError

HALF_WIDTH = 2.0


@dataclass(frozen=True)
class Normalization:
    """
    The workspace [m] becomes [-2, 2] along its longest axis; values become deviations.

    Two states can only be merged when this is equal; it belongs to the state file.
    """

    lower: tuple[float, ...]
    """[m] lower corner of the workspace."""
    upper: tuple[float, ...]
    """[m] upper corner."""
    value_offset: float = 0.0
    """[field units] a typical value."""
    value_scale: float = 1.0
    """[field units] a typical deviation from it."""

    def __post_init__(self):
        object.__setattr__(self, 'lower', tuple(float(v) for v in self.lower))
        object.__setattr__(self, 'upper', tuple(float(v) for v in self.upper))
        if len(self.lower) != len(self.upper) or not self.lower:
            raise ConfigError(
                f'bounds {self.lower} and {self.upper} have {len(self.lower)} and '
                f'{len(self.upper)} numbers, expected as many as a location has'
            )
        if not all(np.isfinite(self.lower + self.upper)) or any(
            low >= high for low, high in zip(self.lower, self.upper, strict=True)
        ):
            raise ConfigError(
                f'bounds {self.lower} and {self.upper}: expected finite corners, every lower '
                'below its upper [m]'
            )
        if not (np.isfinite(self.value_offset) and 0 < self.value_scale < np.inf):
            raise ConfigError(
                f'value_offset {self.value_offset} and value_scale {self.value_scale}: expected '
                'a finite number and a positive one [field units]'
            )

    @property
    def dim_x(self) -> int:
        """
        Return the numbers per location.
        """
        return len(self.lower)

    @property
    def meters_per_unit(self) -> float:
        """
        Return the length [m] of one model unit.
        """
        return max(np.subtract(self.upper, self.lower)) / (2 * HALF_WIDTH)

    def location_to_model(self, x: np.ndarray) -> np.ndarray:
        """
        Map locations (n, dim_x) [m] to model units, in float64: the origin may be far away.
        """
        center = np.add(self.lower, self.upper) / 2
        return (np.asarray(x, np.float64) - center) / self.meters_per_unit

    def value_to_model(self, y: np.ndarray) -> np.ndarray:
        """
        Map values (n, dim_y) [field units] to model units.
        """
        return (np.asarray(y, np.float64) - self.value_offset) / self.value_scale

    def value_from_model(self, y: np.ndarray) -> np.ndarray:
        """
        Map values from model units; standard deviations only take `value_scale`.
        """
        return np.asarray(y, np.float64) * self.value_scale + self.value_offset

    def contains(self, x: np.ndarray) -> np.ndarray:
        """
        Return which locations (n, dim_x) [m] lie in the workspace, (n,) bool; NaN does not.
        """
        x = np.asarray(x, np.float64)
        return ((x >= self.lower) & (x <= self.upper)).all(-1)

    def to_dict(self) -> dict:
        """
        Return plain values, ready for JSON.
        """
        return asdict(self)
