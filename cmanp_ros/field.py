"""
NeuralField: a model and its state behind a numpy API, in metres and field units.

The only object that the node holds; usable without ROS.
"""

import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from numbers import Integral
from uuid import uuid4

import numpy as np
import torch

from cmanp_ros import checkpoint as files
from cmanp_ros.core import CMANP, Lattice, Normalization, OneTile, World
from cmanp_ros.core.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    StateMismatchError,
)
from cmanp_ros.core.lattice import ANSWERS, check_bounds, geometry
from cmanp_ros.core.solver import Request, Solution
from cmanp_ros.core.tiles import keys_of
from cmanp_ros.store import TileStore

OK, OUTSIDE, NOT_FINITE = 0, 1, 2  # status of a target, as in Prediction.msg
REFRESHED_AT_ONCE = 8  # tiles: some 20 ms
REFRESHED_ELSEWHERE = 32  # tiles: nobody waits for them
TILES_PER_SIDE = 10  # of the finest, along the longest side of the bounds
LARGEST_COUNT = 2**53  # of observations: beyond it a float64 does not count
LARGEST_VALUE = 1e5  # [value_scale] from value_offset: beyond it float64 rounds relief away


@dataclass(frozen=True)
class Observed:
    """What became of the points of one call."""

    folded: int
    rejected: dict[str, int]
    """reason -> count: 'not_finite', 'outside_workspace', 'value_out_of_range'."""


class NeuralField:
    """A map with error bars; its memory is bounded whatever was observed."""

    def __init__(
        self,
        model: CMANP,
        geometry: Lattice | OneTile,
        normalization: Normalization,
        half_life_sec=None,
        max_tiles: int = 2048,
        store=None,
        undo_window_sec=None,
    ):
        """
        Start with an empty map, or with what the store holds; `load` is the usual way.

        :param half_life_sec: [s] after which an observation counts half; None: never.
        :param max_tiles: kept in memory; the least recently used go to the store.
        :param store: path of the file that takes the others; None: they are dropped and counted.
        :param undo_window_sec: [s] how far `undo` reaches; None: nothing is kept for it.
        """
        if geometry.dim_x != model.config.dim_x:
            raise ConfigError(
                f'bounds have {geometry.dim_x} numbers per corner, the model takes locations of '
                f'{model.config.dim_x}: give bounds of that many, or another model'
            )
        if model.config.autoregressive or model.config.num_global:
            raise ConfigError(
                'this model is a CMANP-AND, or has a global latent variable: it is made for '
                "`cmanp evaluate gp1d`; a map takes another one, such as 'field'"
            )
        if half_life_sec is not None and not half_life_sec > 0:
            raise ConfigError(
                f'half_life_sec is {half_life_sec}, expected a positive time, or None'
            )
        self.model, self.geometry, self.normalization = model, geometry, normalization
        self.half_life_sec = half_life_sec
        self.weights_hash = files.weights_hash(model)
        self._store = store and TileStore(store, self._identity())
        self.world = World(model, geometry, max_tiles, self._store, undo_window_sec)
        self.world.tiles.totals.setdefault('robots', [uuid4().hex])
        self._version = 0

    @classmethod
    def load(
        cls,
        checkpoint=None,
        bounds=((0.0, 0.0), (50.0, 50.0)),
        device='cpu',
        value_offset=0.0,
        value_scale=1.0,
        half_life_sec=None,
        tile_size: float | None = None,
        one_tile: bool = False,
        max_tiles: int = 2048,
        store=None,
        undo_window_sec=None,
    ):
        """
        Make an empty map.

        :param checkpoint: file or name of a shipped model; None: the default, 'field'.
        :param bounds: lower and upper corner of the workspace [m]. With tiles it only sets their
            size, unless `tile_size` does: the map has no border.
        :param value_offset: [field units] a typical value; the prediction where nothing is known.
        :param value_scale: [field units] a typical deviation from it.
        :param tile_size: [m] spacing of the finest tiles; None: a tenth of the longest side.
        :param one_tile: a single tile over the bounds, as in the paper.
        :raises CheckpointError: for a file that cannot be used.
        :raises ConfigError: for bounds, units or a device that cannot be used.
        """
        model = files.load_model(checkpoint or 'field', device)
        try:
            lower, upper = bounds
        except (TypeError, ValueError):
            raise ConfigError(
                f'bounds are {bounds!r}, expected a lower and an upper corner [m], such as '
                '((0, 0), (50, 50))'
            ) from None
        check_bounds(lower, upper)
        geometry = OneTile(lower, upper)
        if not one_tile:
            size = _tile_size(lower, upper) if tile_size is None else tile_size
            lattice = Lattice.of(model.config, size)
            geometry = replace(lattice, dim_x=geometry.dim_x)
        normalization = Normalization(value_offset, value_scale)
        return cls(
            model, geometry, normalization, half_life_sec, max_tiles, store, undo_window_sec
        )

    def empty_like(self, max_tiles: int) -> 'NeuralField':
        """Return an empty map in memory, with the same model, tiles and units."""
        return NeuralField(
            self.model, self.geometry, self.normalization, self.half_life_sec, max_tiles
        )

    def warm_up(self, x):
        """
        Fold and predict once in a map that is thrown away: the first call is as fast as others.

        :param x: (n, dim_x) [m], some locations in the workspace.
        """
        scratch = self.empty_like(self.world.tiles.max_tiles)
        typical = self.normalization.value_from_model(np.zeros((len(x), self.model.config.dim_y)))
        scratch.observe(x, typical)
        scratch.predict(x)

    # State -----------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """A number that changes whenever the map does."""
        return self._version

    @property
    def num_observations(self) -> int:
        """Points folded so far."""
        return self.world.num_observations

    @property
    def robots(self) -> list[str]:
        """
        Ids of the maps whose observations this one holds: first its own, then those merged.

        The own id is drawn when a map begins; it stays through reset and undo, is saved with the
        map, and comes with it when it is loaded.
        """
        return self.world.tiles.totals['robots']

    @property
    def num_tiles(self) -> int:
        """Tiles with data, in memory or in the store."""
        return len(self.world.tiles)

    @property
    def tile_size(self) -> float:
        """Spacing of the finest tiles [m], or what it would be instead of one tile."""
        if isinstance(self.geometry, OneTile):
            return _tile_size(self.geometry.lower, self.geometry.upper)
        return self.geometry.tile_size

    @property
    def num_tiles_in_memory(self) -> int:
        """Tiles in memory, at most `max_tiles`."""
        return self.world.tiles.num_in_memory

    @property
    def num_tiles_dropped(self) -> int:
        """Tiles that were lost for want of a store."""
        return self.world.tiles.num_dropped

    @property
    def num_far_off(self) -> int:
        """Observations that the last predictions left out, less what was forgotten: blunders."""
        return self.world.num_far_off

    @property
    def state_nbytes(self) -> int:
        """Memory of the map [bytes], with what predictions keep beside it."""
        return self.world.nbytes

    @property
    def tile_nbytes(self) -> int:
        """Size of the state of one tile [bytes]: the same whatever was folded into it."""
        return self.model.init_state(1).nbytes

    def in_chunks(self, x, size: int) -> list[np.ndarray]:
        """
        Split points so that those of a chunk share tiles: scattered ones fold many times faster.

        :param x: (n, dim_x) [m].
        :return: indices of at most `size` points each.
        """
        if len(x) <= size:
            return [np.arange(len(x))] if len(x) else []
        x = self._tensor(_as_matrix(x, self.geometry.dim_x, 'x'))
        order = self.geometry.order(x).cpu().numpy()
        return np.split(order, range(size, len(order), size))

    def observe(self, x, y) -> Observed:
        """
        Fold observations in; those that cannot be used are left out and counted.

        :param x: (n, dim_x) [m].
        :param y: (n, dim_y) or, if dim_y is 1, (n,) [field units].
        :raises InputError: for wrong shapes, or when a sum would not be finite; the map is
            unchanged, to the bit.
        """
        x, y = self._observations(x, y)
        good, rejected = self.usable(x, y)
        folded = int(good.sum())
        if folded:
            target = self.normalization.value_to_model(y[good])
            with torch.inference_mode():
                self.world.fold(self._tensor(x[good]), self._tensor(target))
            self._version += 1
        return Observed(folded, rejected)

    def usable(self, x, y) -> tuple[np.ndarray, dict[str, int]]:
        """
        Tell which observations can be folded, and why others cannot.

        :return: (n,) bool, and reason -> number of those left out for it.
        :raises InputError: for wrong shapes.
        """
        x, y = self._observations(x, y)
        with np.errstate(invalid='ignore', over='ignore'):
            target = self.normalization.value_to_model(y)
            masks = {
                'not_finite': np.isfinite(x).all(-1) & np.isfinite(y).all(-1),
                'outside_workspace': self._contains(x),
                'value_out_of_range': (np.abs(target) <= LARGEST_VALUE).all(-1),
            }
        good, rejected = np.ones(len(x), bool), {}
        for reason, mask in masks.items():
            if (count := int((good & ~mask).sum())) > 0:
                rejected[reason] = count
            good &= mask
        return good, rejected

    def _observations(self, x, y):
        """Return x (n, dim_x) and y (n, dim_y) as float64."""
        config = self.model.config
        x, y = _as_matrix(x, config.dim_x, 'x'), _as_floats(y, 'y')
        y = _as_matrix(y[:, None] if y.ndim == 1 else y, config.dim_y, 'y')
        if len(x) != len(y):
            raise InputError(f'x has {len(x)} rows and y has {len(y)}: expected as many')
        return x, y

    def reset(self):
        """
        Forget everything, in the store too; the prediction is the prior again.

        No `undo` goes back beyond it.
        """
        own = self.robots[:1]
        if self._store is not None:
            self._store.clear({'robots': own})  # it stays this robot's, whenever the process ends
        self.world.clear()
        self.world.tiles.totals['robots'] = own
        self._version += 1

    def mark(self, now: float) -> bool:
        """
        Let `undo` go back to this moment: call it before each `observe` or `merge`.

        Marks closer than an eighth of the window are left out; without a window it does nothing.

        :param now: [s] on a clock that never goes back.
        :return: whether a mark was set.
        """
        tiles = self.world.tiles
        return tiles.history is not None and tiles.history.mark(now, tiles.totals)

    def undo(self, seconds: float, now: float) -> tuple[int, float | None]:
        """
        Take back the observations and merges of the last seconds: the map is, to the bit, as then.

        It goes to the newest mark that is so old, or to the oldest that is kept. Fading by
        `forget` is not taken back: the map fades as if what is taken back had never come. Asking
        again takes back nothing more, unless it is for more seconds. Reset and load begin a new
        history.

        :param now: [s] on the clock of `mark`.
        :return: number of observations and [s] really taken back; 0 and None without a mark.
        :raises InputError: for a time that is not positive, or without a window.
        :raises CheckpointError: when the store cannot be written; nothing is changed then.
        """
        before = self.num_observations
        went_back = self.world.undo(seconds, now)
        self._version += went_back is not None
        return before - self.num_observations, went_back

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
        factor = 0.5 ** (dt_sec / self.half_life_sec)
        self.world.tiles.forget(max(factor, 1e-300))  # a clock may jump by years
        self._version += 1

    def merge(self, other: 'NeuralField'):
        """
        Take over all that another map has observed, exactly; each observation once.

        :raises StateMismatchError: for other weights, tiles or units, or observations that are
            in both; nothing is changed.
        """
        self._check_fits(other._identity())
        if shared := set(self.robots) & set(other.robots):
            raise StateMismatchError(
                f'both maps hold observations of {sorted(shared)}, which would count twice: merge '
                'maps that began apart, or load the other one in place of this'
            )
        with torch.inference_mode():
            self.world.merge(other.world, robots=[*self.robots, *other.robots])
        self._version += 1

    def replace_with(self, other: 'NeuralField'):
        """
        Hold what another map holds and nothing else; in the store all at once, or not at all.

        No `undo` goes back beyond it.

        :raises StateMismatchError: for other weights, tiles or units; nothing is changed.
        :raises CheckpointError: when the store cannot be written; nothing is changed.
        """
        self._check_fits(other._identity())
        with torch.inference_mode():
            exported = other.world.export()
            self.world.load(*exported, other.num_observations, robots=list(other.robots))
        self._version += 1

    def flush(self):
        """
        Write what changed to the store, in one transaction; nothing without a store.

        :raises CheckpointError: when it cannot be written, or was moved or replaced.
        """
        self.world.tiles.flush()
        if self._store is not None:
            self._store.check()

    def close(self):
        """
        Flush and close the store.

        :raises CheckpointError: when it cannot be written; it is closed all the same.
        """
        if self._store is not None:
            try:
                self.flush()
            finally:
                self._store.close()

    def save(self, path, **extra):
        """
        Write the map to a .safetensors file; it appears whole or not at all.

        :param extra: provenance, such as the frame and the stamp: plain values.
        """
        files.save_map(path, *self.exported(**extra))

    def to_bytes(self, **extra) -> bytes:
        """Return what `save` writes."""
        return files.map_bytes(*self.exported(**extra))

    def exported(self, **extra) -> tuple:
        """Return a copy of the map as `checkpoint.save_map` takes it."""
        with torch.inference_mode():
            keys, state = self.world.export()
        more = {name: getattr(self, name) for name in ('num_observations', 'robots')}
        more |= {'extra': _plain(extra)}
        return keys, state, self._identity() | more

    def read(self, data: bytes, source='the map') -> tuple['NeuralField', dict]:
        """
        Read another map that fits this one, which is unchanged; all of it is verified.

        :param data: what `save` wrote.
        :param source: what errors call it.
        :return: the map, in memory, and the provenance saved with it.
        :raises OtherWeightsError: for a map that another model folded.
        :raises StateMismatchError: for other tiles or units.
        :raises CheckpointError: for damaged or foreign content.
        """
        keys, state, header = files.map_from_bytes(data, self.model, source)
        self._check_fits(header, source)
        field = self.empty_like(max(1, len(keys)))
        field._load(keys, state, header, source)
        return field, header.get('extra')

    @classmethod
    def restore(
        cls, path, checkpoint=None, device='cpu', half_life_sec=None, max_tiles=2048, store=None
    ):
        """
        Read a map: tile by tile that which was saved, bit for bit.

        :param checkpoint: the model that folded it; None: the default.
        :raises CheckpointError: for a file that cannot be used.
        """
        model = files.load_model(checkpoint or 'field', device)
        keys, state, header = files.load_map(path, model)
        field = cls(
            model,
            geometry(header['geometry']),
            Normalization(**header['normalization']),
            half_life_sec,
            max_tiles,
            store,
        )
        if field.num_tiles:
            raise ConfigError(f'the store {store} holds a map already: restore into a new one')
        field._load(keys, state, header, path)
        return field

    def _load(self, keys, state, header, source):
        count, robots = header.get('num_observations'), header.get('robots', self.robots)
        are_names = isinstance(robots, list) and all(isinstance(name, str) for name in robots)
        if type(count) is not int or not (0 <= count < LARGEST_COUNT and are_names and robots):
            raise CheckpointError(
                f'{source} has num_observations {count!r} and robots {robots!r}: expected a count '
                'and names; it cannot be used'
            )
        with torch.inference_mode():
            self.world.load(keys, state, count, robots=robots)

    def _check_fits(self, identity, source='the other map'):
        """
        Compare with the `_identity` of another map.

        :raises StateMismatchError: naming what differs.
        """
        for name, way_out in (
            ('weights_hash', 'use one checkpoint for both'),
            ('normalization', 'use the same value_offset and value_scale for both'),
            ('geometry', 'use the same tile_size, or the same bounds, for both'),
        ):
            there, here = identity.get(name), self._identity()[name]
            if there != here:
                raise StateMismatchError(
                    f'{source} has {name} {there!r}, this map has {here!r}: {way_out}'
                )

    def _identity(self):
        """Return what a file or a store must agree in, as plain values."""
        return {
            'weights_hash': self.weights_hash,
            'geometry': json.loads(json.dumps(self.geometry.to_dict())),
            'normalization': self.normalization.to_dict(),
        }

    # Prediction ------------------------------------------------------------------------------

    def status(self, x) -> np.ndarray:
        """
        Return OK, OUTSIDE or NOT_FINITE for each target, (n,) uint8.

        With tiles nothing that a robot can reach is outside.
        """
        x = _as_matrix(x, self.model.config.dim_x, 'x')
        status = np.where(self._contains(x), OK, OUTSIDE)
        return np.where(np.isfinite(x).all(-1), status, NOT_FINITE).astype(np.uint8)

    def is_known(self, x) -> np.ndarray:
        """
        Tell where something was observed: where one of the finest tiles holds data, (n,) bool.

        :param x: (n, dim_x) [m]; not where it is outside the workspace.
        """
        x = _as_matrix(x, self.model.config.dim_x, 'x')
        inside = np.flatnonzero(self.status(x) == OK)
        cover = self.geometry.answering(self._tensor(x[inside]), 0)
        keys, tile = cover.key.cpu().unique(dim=0, return_inverse=True)
        holds_data = np.array([key in self.world.tiles for key in keys_of(keys)], bool)
        known = np.zeros(len(x), bool)
        known[inside[cover.index.cpu().numpy()[holds_data[tile.numpy()]]]] = True
        return known

    def tiles_in_memory(self, level=0) -> np.ndarray:
        """
        Return lower and upper corner [m] of where tiles in memory answer, (tiles, 2, dim_x).

        :param level: 0 is the finest.
        """
        keys = [key[1:] for key in self.world.tiles.keys_in_memory if key[0] == level]
        if isinstance(self.geometry, OneTile):
            corners = np.array([self.geometry.lower, self.geometry.upper])
            return np.repeat(corners[None], len(keys), 0)
        index = np.array(keys).reshape(len(keys), self.geometry.dim_x)
        corners = np.stack([index - ANSWERS, index + ANSWERS], axis=1)
        return corners * self.geometry.spacing(level)

    def predict(self, x, renew: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """
        Predict observations (noise included).

        :param x: (n, dim_x) [m]. Outside the workspace the answer is the prior, for a location
            that is not finite NaN.
        :param renew: False: at once, without what was observed since it was solved last (see
            `refreshing`), wherever somebody asked before.
        :return: mean and stddev, (n, dim_y) each [field units].
        """
        x = _as_matrix(x, self.model.config.dim_x, 'x')
        inside = self.status(x) == OK
        mean, stddev = self._prior(x)
        if inside.any():
            with torch.inference_mode():
                found = self.world.predict(self._tensor(x[inside]), renew)
            mean[inside] = self.normalization.value_from_model(_numpy(found[0]))
            stddev[inside] = _numpy(found[1]) * self.normalization.value_scale
        return mean, stddev

    @property
    def is_settled(self) -> bool:
        """Whether nothing is solved in a hurry: see `refreshing`, `settling`."""
        return self.world.is_settled

    def refreshing(self, x) -> Iterator[None]:
        """
        Solve what observations changed and somebody asked for before, a little with each step.

        It is solved in a hurry, with hyperparameters that tiles had a few observations ago.

        :param x: (n, dim_x) [m] where something was observed.
        """
        for tiles in self._tiles_over(x, REFRESHED_AT_ONCE):
            with torch.inference_mode():
                self.world.refresh(self.world.asked(tiles), in_a_hurry=True)
            yield

    def settling(self) -> Iterator[None]:
        """Solve exactly what was solved in a hurry, a little with each step."""
        while tiles := self.world.unsettled(REFRESHED_AT_ONCE):
            with torch.inference_mode():
                self.world.refresh(tiles)
            yield

    def refreshing_elsewhere(self, x) -> Generator[Request, Solution, None]:
        """
        Do as `refreshing`, and leave the work to another `Solver`: send each request's solution.

        Tiles beside those that somebody asked for are solved, too. Observations may be folded, and
        predictions made, meanwhile.
        """
        for some in self._tiles_over(x, self._limit_elsewhere):
            with torch.inference_mode():
                tiles = self.world.expect(some)
            if tiles:
                yield from self._refreshing_elsewhere(tiles, in_a_hurry=True)

    def settling_elsewhere(self) -> Generator[Request, Solution, None]:
        """Do as `settling`, and leave the work to another `Solver`."""
        while tiles := self.world.unsettled(self._limit_elsewhere):
            yield from self._refreshing_elsewhere(tiles, in_a_hurry=False)

    def _refreshing_elsewhere(self, tiles, in_a_hurry):
        with torch.inference_mode():
            job = self.world.begin_refresh(tiles, in_a_hurry)
        solution = yield job.request
        with torch.inference_mode():
            self.world.end_refresh(job, solution)

    @property
    def _limit_elsewhere(self):
        room = self.world.tiles.max_tiles // 8  # neighbours are needed, too
        return max(1, min(REFRESHED_ELSEWHERE, room))

    def _tiles_over(self, x, limit):
        x = _as_matrix(x, self.model.config.dim_x, 'x')
        return self.world.tiles_over(self._tensor(x[self.status(x) == OK]), limit)

    def forget_solved(self):
        """Have all that is asked for from now on solved as the map is now."""
        self.world.forget_solved()

    def predict_joint(self, x) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Predict, with the covariance over all targets: that of the fields of `sample`, and noise.

        :return: mean, stddev (n, dim_y), covariance (dim_y, n, n) [field units squared].
        :raises ConfigError: when the tiles of all targets do not fit in memory together.
        """
        x = _as_matrix(x, self.model.config.dim_x, 'x')
        inside = np.flatnonzero(self.status(x) == OK)
        mean, stddev = self._prior(x)
        covariance = np.stack([np.diag(column**2) for column in stddev.T])
        if len(inside):
            scale = self.normalization.value_scale
            with torch.inference_mode():
                found = self.world.predict_joint(self._tensor(x[inside]))
            mean[inside] = self.normalization.value_from_model(_numpy(found[0]))
            stddev[inside] = _numpy(found[1]) * scale
            covariance[:, inside[:, None], inside] = _numpy(found[2]) * scale**2
        unknown = ~np.isfinite(mean[:, 0])
        covariance[:, unknown, :] = covariance[:, :, unknown] = np.nan
        return mean, stddev, covariance

    def sample(self, x, num_samples: int, seed: int | None = None) -> np.ndarray:
        """
        Draw whole fields, without observation noise, and evaluate them at targets.

        :param seed: one seed is one set of fields, wherever they are evaluated inside the
            workspace. Outside, targets are drawn independently from the prior. At least 0.
        :return: (num_samples, n, dim_y) [field units].
        :raises InputError: for a model without the least-squares memory, or a number that is not
            whole or below 0.
        """
        for name, value in (('num_samples', num_samples), ('seed', 0 if seed is None else seed)):
            if not isinstance(value, Integral) or value < 0:
                raise InputError(f'{name} is {value!r}, expected a whole number of at least 0')
        if self.model.config.least_squares is None:
            raise InputError('this model has no least-squares memory, so no fields to sample')
        x = _as_matrix(x, self.model.config.dim_x, 'x')
        inside = self.status(x) == OK
        generator = np.random.default_rng(seed)
        seed = int(generator.integers(2**62))
        mean, stddev = self._prior(x)
        samples = mean + stddev * generator.standard_normal((num_samples, *mean.shape))
        if inside.any():
            with torch.inference_mode():
                fields = self.world.sample(self._tensor(x[inside]), num_samples, seed)
            samples[:, inside] = self.normalization.value_from_model(_numpy(fields))
        return samples

    def _prior(self, x):
        """Return mean and stddev (n, dim_y) where nothing is known; NaN where x is not finite."""
        known = np.isfinite(x).all(-1, keepdims=True) & np.ones(self.model.config.dim_y, bool)
        n = self.normalization
        return np.where(known, n.value_offset, np.nan), np.where(known, n.value_scale, np.nan)

    def _contains(self, x):
        return self.geometry.contains(torch.from_numpy(x)).numpy()

    def _tensor(self, array):
        return torch.as_tensor(array, device=self.model.encoder.latents.device)


def _tile_size(lower, upper):
    """Return the spacing of the finest tiles [m] for bounds."""
    return float(max(np.subtract(upper, lower))) / TILES_PER_SIDE


def _as_floats(value, name):
    """Return numbers as torch takes them; what is masked out is NaN."""
    try:
        if isinstance(value, np.ma.MaskedArray):
            value = value.astype(np.float64).filled(np.nan)
        value = np.asarray(value)
        if np.iscomplexobj(value):
            raise TypeError('they are complex')
        return np.array(value, np.float64, order='C')  # a copy: views may have any strides
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f'{name} cannot be read as numbers ({error})') from error


def _as_matrix(value, columns, name):
    value = _as_floats(value, name)
    if value.ndim != 2 or value.shape[1] != columns:
        raise InputError(f'{name} has shape {value.shape}, expected (n, {columns})')
    return value


def _plain(values):
    """Return plain values of which some may be of numpy, as JSON takes them."""
    try:
        return json.loads(json.dumps(values, default=np.generic.item))
    except (TypeError, ValueError) as error:
        raise InputError(
            f'{values} cannot be saved ({error}): expected text, numbers, or lists of them'
        ) from error


def _numpy(tensor):
    return tensor.double().cpu().numpy()
