"""
NeuralField: a model and its state behind a numpy API, in metres and field units.

The only object that the node holds; usable without ROS.
"""

from dataclasses import dataclass

import numpy as np
import torch

from cmanp_ros import checkpoint as files
from cmanp_ros.core import CMANP, Normalization, State, forget, merge
from cmanp_ros.core.errors import ConfigError, InputError, StateMismatchError

OK, OUTSIDE, NOT_FINITE = 0, 1, 2  # status of a target, as in Prediction.msg
LARGEST_VALUE = 1e6  # [value_scale] a value further from value_offset is a fault of its source


@dataclass(frozen=True)
class Observed:
    """What became of the points of one call."""

    folded: int
    rejected: dict[str, int]
    """reason -> count: 'not_finite', 'outside_workspace', 'value_out_of_range'."""


class NeuralField:
    """A map with error bars whose size does not depend on how much was observed."""

    def __init__(self, model: CMANP, normalization: Normalization, half_life_sec=None):
        """
        Start with an empty map; `load` is the usual way.

        :param half_life_sec: [s] after which an observation counts half; None: never.
        """
        if normalization.dim_x != model.config.dim_x:
            raise ConfigError(
                f'bounds have {normalization.dim_x} numbers per corner, the model takes '
                f'locations of {model.config.dim_x}: give bounds of that many, or another model'
            )
        self.model, self.normalization = model, normalization
        self.half_life_sec = half_life_sec
        self._weights_hash = files.weights_hash(model)
        self.reset()

    @classmethod
    def load(
        cls,
        checkpoint=None,
        bounds=((0.0, 0.0), (50.0, 50.0)),
        device='cpu',
        value_offset=0.0,
        value_scale=1.0,
        half_life_sec=None,
    ):
        """
        Make an empty map.

        :param checkpoint: file or name of a shipped model; None: the default, 'field'.
        :param bounds: lower and upper corner of the workspace [m].
        :param value_offset: [field units] a typical value; the prediction where nothing is known.
        :param value_scale: [field units] a typical deviation from it.
        :raises CheckpointError: for a file that cannot be used.
        :raises ConfigError: for bounds, units or a device that cannot be used.
        """
        normalization = Normalization(*bounds, value_offset, value_scale)
        return cls(_load_model(checkpoint, device), normalization, half_life_sec)

    # State -----------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The immutable state; keep a reference to it as a snapshot."""
        return self._state

    @property
    def state_nbytes(self) -> int:
        """Size of the state [bytes]."""
        return self._state.nbytes

    @property
    def num_observations(self) -> int:
        """Points folded so far."""
        return int(self._state.num_observations[0])

    def observe(self, x, y) -> Observed:
        """
        Fold observations in; those that cannot be used are left out and counted.

        :param x: (n, dim_x) [m].
        :param y: (n, dim_y) or, if dim_y is 1, (n,) [field units].
        :raises InputError: for wrong shapes; the map is unchanged.
        """
        config = self.model.config
        x = _as_matrix(x, config.dim_x, 'x')
        y = np.asarray(y, np.float64)
        y = _as_matrix(y[:, None] if y.ndim == 1 else y, config.dim_y, 'y')
        if len(x) != len(y):
            raise InputError(f'x has {len(x)} rows and y has {len(y)}: expected as many')
        target = self.normalization.value_to_model(y)
        with np.errstate(invalid='ignore'):
            usable = {
                'not_finite': np.isfinite(x).all(-1) & np.isfinite(y).all(-1),
                'outside_workspace': self.normalization.contains(x),
                'value_out_of_range': (np.abs(target) <= LARGEST_VALUE).all(-1),
            }
        good, rejected = np.ones(len(x), bool), {}
        for reason, mask in usable.items():
            if (count := int((good & ~mask).sum())) > 0:
                rejected[reason] = count
            good &= mask
        folded = int(good.sum())
        if folded:
            state = self._update(x[good], target[good])
            if not state.is_finite():  # nothing that is checked above should lead here
                raise InputError('folding these points gave sums that are not finite; left out')
            self._state = state
        return Observed(folded, rejected)

    @torch.inference_mode()
    def _update(self, x, y):
        x = self._tensor(self.normalization.location_to_model(x))
        return self.model.update(self._state, x, self._tensor(y))

    def reset(self):
        """Forget everything; the prediction is the prior again."""
        with torch.inference_mode():
            self._state = self.model.init_state(1)

    def forget(self, dt_sec: float):
        """
        Let time pass: every observation so far loses weight, a half each half-life.

        :raises InputError: without a half-life, or for a negative time.
        """
        if self.half_life_sec is None or not dt_sec >= 0:
            raise InputError(
                f'forget {dt_sec} s with half_life_sec {self.half_life_sec}: expected a time of '
                'at least 0 and a half-life [s]'
            )
        with torch.inference_mode():
            self._state = forget(self._state, 0.5 ** (dt_sec / self.half_life_sec))

    def merge(self, other: 'NeuralField'):
        """
        Take over all that another map has observed, exactly; each observation once.

        :raises StateMismatchError: for other weights, workspace or units; nothing is changed.
        """
        if self._weights_hash != other._weights_hash:
            raise StateMismatchError(
                f'the other map was folded by weights {other._weights_hash[:12]}, this one by '
                f'{self._weights_hash[:12]}: use one checkpoint for both'
            )
        if self.normalization != other.normalization:
            raise StateMismatchError(
                f'the other map has {other.normalization}, this one {self.normalization}: use '
                'the same bounds, value_offset and value_scale for both'
            )
        with torch.inference_mode():
            self._state = merge(self._state, other._state)

    def save(self, path, **extra):
        """
        Write the map to a .safetensors file; it appears whole or not at all.

        :param extra: provenance, such as the frame and the stamp.
        """
        files.save_state(self._state, path, self.model, self.normalization, extra)

    @classmethod
    def restore(cls, path, checkpoint=None, device='cpu', half_life_sec=None):
        """
        Read a map; predictions are those of the map saved, bit for bit.

        :param checkpoint: the model that folded it; None: the default.
        :raises CheckpointError: for a file that cannot be used.
        """
        model = _load_model(checkpoint, device)
        content = files.load_state(path, model)
        field = cls(model, content.normalization, half_life_sec)
        field._state = content.state
        return field

    # Prediction ------------------------------------------------------------------------------

    def status(self, x) -> np.ndarray:
        """Return OK, OUTSIDE or NOT_FINITE for each target, (n,) uint8."""
        x = _as_matrix(x, self.model.config.dim_x, 'x')
        status = np.where(self.normalization.contains(x), OK, OUTSIDE)
        return np.where(np.isfinite(x).all(-1), status, NOT_FINITE).astype(np.uint8)

    def predict(self, x) -> tuple[np.ndarray, np.ndarray]:
        """
        Predict observations (noise included).

        :param x: (n, dim_x) [m]. Outside the workspace the answer is the prior, for a location
            that is not finite NaN.
        :return: mean and stddev, (n, dim_y) each [field units].
        """
        mean, stddev, _ = self._predict(x, joint=False)
        return mean, stddev

    def predict_joint(self, x) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Predict, with the covariance over all targets.

        :return: mean, stddev (n, dim_y), covariance (dim_y, n, n) [field units squared].
        """
        return self._predict(x, joint=True)

    @torch.inference_mode()
    def _predict(self, x, joint):
        x = _as_matrix(x, self.model.config.dim_x, 'x')
        status, dim_y = self.status(x), self.model.config.dim_y
        mean, stddev = np.full((2, len(x), dim_y), np.nan)
        outside, inside = status == OUTSIDE, np.flatnonzero(status == OK)
        mean[outside], stddev[outside] = self._prior()
        # Only what is asked for is encoded: a request without targets inside costs nothing.
        if len(inside):
            target = self._tensor(self.normalization.location_to_model(x[inside]))
            p = self.model.predict(self._state, target, joint=joint)
            mean[inside] = self.normalization.value_from_model(_numpy(p.mean[0]))
            stddev[inside] = _numpy(p.stddev[0]) * self.normalization.value_scale
        if not joint:
            return mean, stddev, None
        covariance = np.stack([np.diag(column**2) for column in stddev.T])
        if len(inside):
            scaled = _numpy(p.covariance[0]) * self.normalization.value_scale**2
            covariance[:, inside[:, None], inside] = scaled
        unknown = status == NOT_FINITE
        covariance[:, unknown, :] = covariance[:, :, unknown] = np.nan
        return mean, stddev, covariance

    @torch.inference_mode()
    def sample(self, x, num_samples: int, seed: int | None = None) -> np.ndarray:
        """
        Draw whole fields, without observation noise, and evaluate them at targets.

        :param seed: one seed is one set of fields, wherever they are evaluated inside the
            workspace. Outside, targets are drawn independently from the prior.
        :return: (num_samples, n, dim_y) [field units].
        :raises InputError: for a model without the least-squares memory.
        """
        x = _as_matrix(x, self.model.config.dim_x, 'x')
        status, dim_y = self.status(x), self.model.config.dim_y
        generator = torch.Generator(self.model.encoder.latents.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        samples = np.full((num_samples, len(x), dim_y), np.nan)
        inside, outside = status == OK, status == OUTSIDE
        target = self._tensor(self.normalization.location_to_model(x[inside]))
        fields = self.model.sample_fields(self._state, target, num_samples, generator)
        samples[:, inside] = self.normalization.value_from_model(_numpy(fields[:, 0]))
        if outside.any():
            mean, stddev = self._prior()
            white = np.random.default_rng(seed).standard_normal(samples[:, outside].shape)
            samples[:, outside] = mean + stddev * white
        return samples

    def _prior(self):
        """Return mean and stddev (dim_y,) of the empty map, at its center [field units]."""
        if not hasattr(self, '_prior_cache'):
            center = torch.zeros(1, 1, self.model.config.dim_x, dtype=torch.float64)
            device = self.model.encoder.latents.device
            p = self.model.predict(self.model.init_state(1), center.to(device))
            mean = self.normalization.value_from_model(_numpy(p.mean[0, 0]))
            self._prior_cache = mean, _numpy(p.stddev[0, 0]) * self.normalization.value_scale
        return self._prior_cache

    def _tensor(self, array):
        return torch.as_tensor(array, device=self.model.encoder.latents.device).unsqueeze(0)


def _load_model(checkpoint, device):
    try:
        device = torch.device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device!r} cannot be used here ({error}); 'cpu' always can"
        ) from error
    return files.load_model('field' if checkpoint is None else checkpoint, device)


def _as_matrix(value, columns, name):
    value = np.asarray(value, np.float64)
    if value.ndim != 2 or value.shape[1] != columns:
        raise InputError(f'{name} has shape {value.shape}, expected (n, {columns})')
    return value


def _numpy(tensor):
    return tensor.double().cpu().numpy()
