"""The frozen affine map between field units and the units of the model."""

from dataclasses import asdict, dataclass

import numpy as np

from cmanp_ros.core.errors import ConfigError


@dataclass(frozen=True)
class Normalization:
    """
    Values become deviations from a typical value, in units of a typical deviation.

    Two maps can only be merged when this is equal; it belongs to the state file.
    """

    value_offset: float = 0.0
    """[field units] a typical value."""
    value_scale: float = 1.0
    """[field units] a typical deviation from it."""

    def __post_init__(self):
        given = self.value_offset, self.value_scale
        try:
            offset, scale = map(float, given)
        except (TypeError, ValueError, OverflowError):
            offset = scale = np.nan
        if not (np.isfinite(offset) and 0 < scale < np.inf):
            raise ConfigError(
                f'value_offset {given[0]} and value_scale {given[1]}: expected a finite number '
                'and a positive one [field units]'
            )
        object.__setattr__(self, 'value_offset', offset)
        object.__setattr__(self, 'value_scale', scale)

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

    def to_dict(self) -> dict:
        """
        Return plain values, ready for JSON.
        """
        return asdict(self)
