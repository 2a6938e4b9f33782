"""
A world of tiles: fold points into every tile that covers them, predict from the tiles that do.

Levels of tiles fold the same points. What predictions need of the tiles is solved by `Solver`.
Every prediction is a function of the states alone: order, batches and paging do not matter. Who
cannot wait for tiles to be solved is answered from those that were solved last (`renew=False`).
Tiles may be solved in a hurry for them, with the hyperparameters of a little earlier, and exactly
once there is time.
"""

import math
from hashlib import sha256
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from cmanp_ros.core import basis, blending, least_squares
from cmanp_ros.core.blending import Mixture
from cmanp_ros.core.errors import InputError, StateMismatchError
from cmanp_ros.core.lattice import Cover, Lattice, OneTile
from cmanp_ros.core.least_squares import Evidence, Regression
from cmanp_ros.core.model import CMANP, Decoded, Prior
from cmanp_ros.core.solver import Request, Solution, Solver
from cmanp_ros.core.state import State, concatenate, merge
from cmanp_ros.core.tiles import Key, Tiles, keys_of

AT_ONCE = 1 << 13  # points or targets times tiles: bounds the memory of one step, fits in caches
FEW = 1 << 12  # pairs, padded ones included, that go together whatever their tiles
SPARE = 1 << 10  # pairs of padding that cost less than more calls
TARGETS_AT_ONCE = 4096
ORDERED_AT_ONCE = 1 << 16  # targets of which those of a tile are brought together
GROWTH = 1.1  # of a tile's points, after which its hyperparameters are found again even in a hurry
REMEMBERED = 20  # refreshes: so often a tile that changes is solved before somebody asks again


class NotFiniteError(InputError):
    """
    Points that would make a tile's sums infinite or NaN; the map is as it was.
    """

    reason = 'not_finite_state'


class Pairs(NamedTuple):
    """Targets beside the tiles that answer, and what the tiles' regressions say."""

    cover: Cover
    row: Tensor
    """(pairs,): row of the tile."""
    prior: Prior | None
    """(pairs, ...): without the batch axis."""


class Job(NamedTuple):
    """Tiles that are being solved, and where the solution goes: rows, and their versions then."""

    keys: list[Key]
    request: Request
    in_a_hurry: bool
    epoch: int
    num_changes: int
    """Of the map then."""
    rows: Tensor
    """Of the keys."""
    wanted_rows: Tensor
    """Of `Request.wanted`."""
    stale_rows: Tensor
    """Of the tiles that are encoded."""
    unknown_rows: Tensor
    """Of the tiles whose evidence is found."""
    unknown_keys: list[Key]
    stale_version: Tensor
    unknown_version: Tensor


class World:
    """
    All tiles of a map. Locations in metres, float64; values in model units.
    """

    def __init__(
        self,
        model: CMANP,
        geometry: Lattice | OneTile,
        max_tiles=2048,
        store=None,
        undo_window_sec=None,
    ):
        """
        Start empty, or with what the store holds.

        :param max_tiles: in memory.
        :param store: `core.tiles.Store`; None: what does not fit is dropped.
        :param undo_window_sec: [s] how far `Tiles.undo` reaches; None: nothing is kept for it.
        """
        self.model, self.geometry = model, geometry
        self.tiles = Tiles(model, max_tiles, store, undo_window_sec)
        self._options, self._solver = model.config.least_squares, Solver(model, geometry)
        self._epoch = 0
        self.clear()

    def clear(self):
        """Start again with what the store holds."""
        self.tiles.clear()
        self._clear_caches()

    def _clear_caches(self):
        self._evidence = _Cache()
        self._regression = _Cache()
        self._latents = _Cache()
        self._ready = {}  # row -> the tile that was solved and encoded there last
        self._known = {}  # row -> the tile whose evidence was found there last
        self._unsettled = {}  # tiles that were solved in a hurry, in order
        self.forget_solved()
        self._asked = {}  # row -> how often the tile is still solved before somebody asks again

    def forget_solved(self):
        """Have nobody answered from what was solved, or is being solved, until now."""
        self._ready.clear()
        self._known.clear()
        self._unsettled.clear()
        self._solved, self._solved_at = set(), -1  # tiles, and `num_changes` then
        self._epoch += 1

    @property
    def nbytes(self) -> int:
        """Memory of the tiles [bytes], and of what predictions keep beside them."""
        caches = (self._evidence, self._regression, self._latents)
        return self.tiles.nbytes + sum(cache.nbytes for cache in caches)

    @property
    def num_observations(self) -> int:
        """Points folded so far, forgotten ones included."""
        return self.tiles.totals['num_observations']

    @property
    def num_far_off(self) -> int:
        """
        Observations that are left out of predictions, see `outliers`, less what was forgotten.

        Of the level of tiles that finds most, and of the tiles that were solved.
        """
        solved = [(row, key) for row, key in self._ready.items() if self.tiles.is_in(row, key)]
        if self._options is None or not solved:
            return 0
        rows, keys = zip(*solved, strict=True)
        place = Regression._fields.index('num_far_off')
        (number,) = self._regression.get(torch.tensor(rows), slice(place, place + 1))
        level = torch.tensor([key[0] for key in keys])
        of_level = number.new_zeros(self.geometry.num_levels).index_add_(0, level, number)
        return round(of_level.max().item())

    # Observations --------------------------------------------------------------------------------

    def fold(self, x: Tensor, y: Tensor):
        """
        Fold points into every tile that covers them, or into none.

        Holds the new states of these tiles beside the map until all are known to be finite.

        :param x: (n, dim_x) [m]; `y` (n, dim_y) in model units. Finite.
        :raises NotFiniteError: when a sum would not be finite.
        """
        cover = self.geometry.cover(x)
        keys, tile = _unique(cover.key)
        changes = []
        for tiles, pairs, mask in groups(tile, self.tiles.max_tiles):
            some = [keys[i] for i in tiles.tolist()]
            points = cover.x[pairs], y[cover.index[pairs]]
            state = self.model.update(self.tiles.state_of(some), *points, mask)
            _check_finite(some, state)
            changes.append((some, state))
        rows = self.tiles.change(changes, num_observations=self.num_observations + len(x))
        if not len(rows):  # more than fit in memory
            self._ready.clear()
        for row in set(rows.tolist()) - self._asked.keys():
            self._ready.pop(row, None)  # or an answer might be very old

    def merge(self, other: 'World', **totals):
        """
        Take over every tile of another world on the same lattice, or none; exact.

        Holds the new states of these tiles beside both maps until all are known.

        :param totals: plain values that change with them.
        :raises StateMismatchError: for another lattice.
        """
        if self.geometry != other.geometry:
            raise StateMismatchError(
                f'the other map lies on {other.geometry}, this one on {self.geometry}: use the '
                'same tile_size, or the same bounds, for both'
            )
        changes = []
        for some in self._batches(other.tiles.keys(), other.tiles.max_tiles):
            theirs = other.tiles.state(other.tiles.rows(some))
            changes.append((some, merge(self.tiles.state_of(some), theirs)))
        count = self.num_observations + other.num_observations
        self.tiles.change(changes, num_observations=count, **totals)
        self.forget_solved()

    def changed_since(self, earlier: 'World | None') -> list[Key] | None:
        """
        Return the tiles that are not what they were in another world of the same lattice.

        :param earlier: None: one without tiles.
        :return: keys of this world; None when tiles of the earlier one are gone.
        """
        keys = self.tiles.keys()
        if earlier is None:
            return keys
        if not set(earlier.tiles.keys()) <= set(keys):
            return None
        changed = []
        for some in self._batches(keys):
            now, then = (world.tiles.state_of(some).tensors() for world in (self, earlier))
            same = [(now[name] == then[name]).view(len(some), -1).all(1) for name in now]
            is_same = torch.stack(same).all(0)
            changed += [key for key, kept in zip(some, is_same.tolist(), strict=True) if not kept]
        return changed

    def renew(self, keys: list[Key], parts: list['World']):
        """Make tiles anew from those of other worlds, which this one is the merger of."""
        count = sum(part.num_observations for part in parts)
        paged = [part.tiles for part in parts if len(part.tiles) > part.tiles.max_tiles]
        for some in self._batches(keys, min((tiles.max_tiles for tiles in paged), default=64)):
            state = parts[0].tiles.state_of(some)
            for part in parts[1:]:
                state = merge(state, part.tiles.state_of(some))
            self.tiles.change([(some, state)])
        self.tiles.totals['num_observations'] = count
        self.forget_solved()

    def undo(self, seconds: float, now: float) -> float | None:
        """Take back the last seconds: see `Tiles.undo`."""
        self.forget_solved()
        return self.tiles.undo(seconds, now)

    def export(self) -> tuple[list[Key], State | None]:
        """Return every tile, those in the store too, in order; None without any."""
        keys = self.tiles.keys()
        parts = [self.tiles.state(self.tiles.rows(some)) for some in self._batches(keys)]
        return keys, concatenate(parts) if parts else None

    def is_possible(self, largest: float) -> bool:
        """Return whether observations can have given this map: see `State.is_possible`."""
        return all(
            self.tiles.state(self.tiles.rows(some)).is_possible(self._options, largest)
            for some in self._batches(self.tiles.keys())
        )

    def load(self, keys: list[Key], state: State | None, num_observations: int, **totals):
        """
        Hold what was exported and nothing else; in a store all at once.

        :param totals: plain values to keep beside the tiles.
        """
        self.tiles.replace(keys, state, {'num_observations': num_observations} | totals)
        self._clear_caches()

    def _batches(self, keys, limit=64):
        step = min(self.tiles.max_tiles, limit, 64)
        return [keys[start : start + step] for start in range(0, len(keys), step)]

    # Predictions ---------------------------------------------------------------------------------

    def predict(self, x: Tensor, renew: bool = True) -> tuple[Tensor, Tensor]:
        """
        Predict observations.

        :param x: (n, dim_x) [m].
        :param renew: solve what changed; else tiles that were asked for since they were solved
            say what they said then, before the last folds, which costs a fraction.
        :return: mean and stddev, (n, dim_y) in model units.
        """
        mean, stddev = torch.empty(2, len(x), self.model.config.dim_y, dtype=torch.float64)
        for chunk in self._chunks(x):
            _, _, mixture = self._answer(x[chunk], renew)
            mean[chunk], stddev[chunk] = mixture.mean.cpu(), mixture.stddev.cpu()
        return mean, stddev

    def predict_joint(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Predict, with the covariance over all targets: that of the fields of `sample`, and noise.

        :return: mean and stddev (n, dim_y), covariance (dim_y, n, n).
        """
        n, dim_y = len(x), self.model.config.dim_y
        pairs, answers, mixture = self._answer(x)
        correlation = mixture.mean.new_zeros(dim_y, n, n)
        root = mixture.prior_weight.mT.sqrt()
        correlation += root.unsqueeze(-1) * root.unsqueeze(-2)
        field = torch.zeros_like(mixture.mean)
        if pairs.prior is not None:
            field = self._field_stddev(pairs, answers, mixture)
            for own, regression, share in self._by_tile(pairs, mixture):
                at, root = pairs.cover.index[own], share.mT
                block = least_squares.joint_covariance(
                    self._options, regression, pairs.cover.x[own].unsqueeze(0)
                )[0]
                block = block * root.unsqueeze(-1) * root.unsqueeze(-2)
                correlation[:, at.unsqueeze(1), at] += block
        covariance = correlation * field.mT.unsqueeze(-1) * field.mT.unsqueeze(-2)
        covariance.diagonal(dim1=1, dim2=2).copy_(mixture.stddev.square().mT)
        return mixture.mean, mixture.stddev, covariance

    def sample(self, x: Tensor, num_samples: int, seed: int) -> Tensor:
        """
        Draw whole fields, without observation noise, and evaluate them at targets.

        Each tile draws its weights, from (seed, tile); overlapping draws are blended with the
        square roots of the tiles' shares, so that the variance is that of `predict` everywhere
        and a field has no seams. Memory does not grow with the number of targets.

        :return: (num_samples, n, dim_y) in model units.
        """
        samples = torch.empty(num_samples, len(x), self.model.config.dim_y, dtype=torch.float64)
        common = torch.randn(
            num_samples, 1, samples.shape[-1], generator=torch.Generator().manual_seed(seed)
        ).double()  # of the prior: it has no detail
        for chunk in self._chunks(x):
            pairs, answers, mixture = self._answer(x[chunk])
            field = self._field_stddev(pairs, answers, mixture)
            deviation = mixture.prior_weight.sqrt() * common
            for own, regression, share in self._by_tile(pairs, mixture):
                name = repr((seed, *pairs.cover.key[own[0]].tolist())).encode()
                own_seed = int.from_bytes(sha256(name).digest()[:7], 'little')  # hash(-1) is -2's
                generator = torch.Generator().manual_seed(own_seed)
                weights = least_squares.sample_weights(regression, num_samples, generator)[0]
                phi = basis.functions(self._options, pairs.cover.x[own].unsqueeze(0))[0]
                drawn = phi @ (weights - regression.mean)  # (samples, own, dim_y)
                deviation.index_add_(1, pairs.cover.index[own], drawn * share)
            samples[:, chunk] = mixture.mean + field * deviation
        return samples

    def tiles_over(self, x: Tensor, limit: int) -> list[list[Key]]:
        """Return the tiles that cover locations (n, dim_x), so many together."""
        return self._batches(_unique(self.geometry.cover(x).key)[0], limit)

    @property
    def is_settled(self) -> bool:
        """Whether no tile was solved in a hurry, and not exactly since."""
        return not self._unsettled

    def unsettled(self, limit: int) -> list[Key]:
        """Return some tiles that were solved in a hurry; those no longer in memory need not be."""
        if self._unsettled:
            in_memory = set(self.tiles.keys_in_memory)
            self._unsettled = {key: None for key in self._unsettled if key in in_memory}
        return list(self._unsettled)[:limit]

    def refresh(self, keys: list[Key], in_a_hurry: bool = False):
        """
        Solve and encode tiles that changed, which the next prediction would do otherwise.

        :param in_a_hurry: take the evidence of tiles as it was a few points ago, see `GROWTH`.
        """
        job = self.begin_refresh(keys, in_a_hurry)
        self.end_refresh(job, self._solver.solve(job.request))

    def begin_refresh(self, keys: list[Key], in_a_hurry: bool = False) -> Job:
        """
        Return what is to be done to `refresh`, by any `Solver` of this model and lattice.

        The map may change before the end: tiles are solved as they are now.
        """
        self.tiles.rows(keys)  # what faded changes now
        levels, wanted = [], []
        if self._options is not None:
            if self._solved_at != self.tiles.num_changes:
                self._solved.clear()
            wanted = [key for key in keys if key not in self._solved]
            levels = self._solver.neighbourhood.levels(wanted, self.tiles)
        names = [key for level in levels for key in level.members]
        rows = self.tiles.rows([*keys, *names])  # into memory, all of them together
        rows, near, own = rows[: len(keys)], rows[len(keys) :], self.tiles.rows(wanted)
        stale = rows[self._latents.is_stale(rows, self.tiles.version(rows))].unique()
        unknown = self._evidence.is_stale(near, self.tiles.version(near))
        if in_a_hurry:
            unknown &= self._has_grown(near, names)
        request = Request(self.tiles.attention(stale), levels)
        if levels:
            known = near[~unknown]
            request = request._replace(
                unknown=unknown,
                unknown_sums=self.tiles.least_squares(near[unknown]),
                evidence=Evidence(*self._evidence.get(known)[:-1]) if len(known) else None,
                wanted=tuple(wanted),
                sums=self.tiles.least_squares(own),
                version=self.tiles.version(own),
                before=self._regression.version(own),
            )
        near, names = near[unknown], [names[i] for i in unknown.nonzero()[:, 0].tolist()]
        return Job(
            keys,
            request,
            in_a_hurry,
            self._epoch,
            self.tiles.num_changes,
            rows,
            own,
            stale,
            near,
            names,
            self.tiles.version(stale),
            self.tiles.version(near),
        )

    def _has_grown(self, rows, keys):
        """Return which tiles have far more points than when their evidence was found, or fewer."""
        has_grown = torch.tensor(
            [self._known.get(row) != key for row, key in zip(rows.tolist(), keys, strict=True)],
            dtype=torch.bool,
        )
        known = rows[~has_grown]
        if len(known):
            growth = self.tiles.count(known) / self._evidence.get(known)[-1]
            has_grown[~has_grown] = (growth > GROWTH) | (growth < 1 / GROWTH)
        return has_grown

    def end_refresh(self, job: Job, solution: Solution):
        """
        Take over what was solved, unless the map is another one now.

        What left its row meanwhile, or was solved since, stays as it is.
        """
        if job.epoch != self._epoch:
            return
        if len(job.stale_rows):
            self._latents.put(job.stale_rows, solution.latents, job.stale_version)
        if solution.evidence is not None:
            found = *solution.evidence, job.request.unknown_sums.count
            self._evidence.put(job.unknown_rows, found, job.unknown_version)
            for row, key in zip(job.unknown_rows.tolist(), job.unknown_keys, strict=True):
                if self.tiles.is_in(row, key):
                    self._known[row] = key
        if len(solution.regression):
            some = solution.stale
            self._regression.put(job.wanted_rows[some], solution.regression, solution.inputs[some])
        is_current = job.num_changes == self.tiles.num_changes
        again = set() if job.in_a_hurry else self._unsettled.keys() & job.keys
        if is_current and not job.in_a_hurry:
            self._solved.update(job.keys)
            self._solved_at = job.num_changes
            for key in again:
                del self._unsettled[key]
        else:  # they may have been solved since, with other hyperparameters
            self._solved.difference_update(job.keys)
        if job.in_a_hurry:
            self._unsettled.update(dict.fromkeys(job.keys))
        for row, key in zip(job.rows.tolist(), job.keys, strict=True):
            if not self.tiles.is_in(row, key):
                continue
            self._ready[row] = key
            left = self._asked.pop(row, 0) - (key not in again)
            if left > 0:
                self._asked[row] = left
            elif not is_current:  # it may have changed, and nobody would solve it again
                del self._ready[row]

    def asked(self, keys: list[Key]) -> list[Key]:
        """Return those tiles that somebody asked for, now or some refreshes ago."""
        return [
            key
            for row, key in zip(self.tiles.rows(keys).tolist(), keys, strict=True)
            if row in self._asked and self._ready.get(row) == key
        ]

    def expect(self, keys: list[Key]) -> list[Key]:
        """
        Expect that somebody soon asks for tiles, if somebody asked for some of them; return those.
        """
        keys = [key for key in keys if key in self.tiles]
        rows = self.tiles.rows(self.asked(keys)).tolist()
        if not rows:
            return []
        most = max(self._asked[row] for row in rows)
        for row in self.tiles.rows(keys).tolist():
            self._asked.setdefault(row, most)
        return keys

    def pairs(self, x: Tensor, renew: bool = True) -> Pairs:
        """
        Return the tiles that answer at each target (n, dim_x) and have data, ready to be decoded.

        :param renew: see `predict`.
        """
        cover = self.geometry.answering(x)
        keys, tile = _unique(cover.key)
        known = [key for key in keys if key in self.tiles]
        if some := known if renew else self._not_ready(known):
            self.refresh(some, not renew)
            if self._not_ready(known):  # what was needed beside them took the place of some
                self.refresh(known, not renew)
        self._asked.update(dict.fromkeys(self.tiles.rows(known).tolist(), REMEMBERED))
        row = self.tiles.rows(keys)[tile]
        there = row >= 0
        cover, row = Cover(*(part[there] for part in cover)), row[there]
        if self._options is None:
            return Pairs(cover, row, None)
        shape = (len(row), self.model.config.dim_y)
        mean, variance, noise = cover.x.new_empty(3, *shape)
        summary = cover.x.new_empty(*shape, least_squares.NUM_SUMMARIES)
        for tiles, members, mask in groups(row, AT_ONCE):
            *marginal, _, _ = self._regression.get(tiles)
            regression = Regression(*marginal, covariance=None)
            values = (
                *least_squares.predict(self._options, regression, cover.x[members]),
                regression.noise_variance.unsqueeze(1).expand(-1, members.shape[1], -1),
                regression.summary.unsqueeze(1).expand(-1, members.shape[1], -1, -1),
            )
            for whole, part in zip((mean, variance, noise, summary), values, strict=True):
                whole[members[mask]] = part[mask].double()
        context = blending.compare(
            cover, mean, (variance + noise).sqrt(), len(x), self.model.config.num_levels
        )
        return Pairs(cover, row, Prior(mean, variance, noise, summary, context))

    def decode(self, pairs: Pairs) -> Decoded:
        """
        Let each tile answer for its targets.

        :return: (pairs, dim_y) each.
        """
        size = len(Decoded._fields), len(pairs.row), self.model.config.dim_y
        answers = Decoded(*torch.empty(size, dtype=torch.float64, device=pairs.row.device))
        for tiles, members, mask in groups(pairs.row, AT_ONCE):
            own = members[mask]
            prior = pairs.prior and Prior(*(part[own] for part in pairs.prior))
            found = self.model.decode(
                self._latents.get(tiles), pairs.cover.x[own], prior, mask=mask
            )
            for whole, part in zip(answers, found, strict=True):
                whole[own] = part.double()
        return answers

    def _answer(self, x, renew=True) -> tuple[Pairs, Decoded, Mixture]:
        pairs = self.pairs(x, renew)
        answers = self.decode(pairs)
        levels = self.geometry.num_levels
        return pairs, answers, blending.blend(pairs.cover, answers, len(x), levels)

    def _field_stddev(self, pairs, answers, mixture):
        """Return the stddev of the field, without noise, at each target, (n, dim_y)."""
        noise = pairs.prior.noise_variance * answers.correction.square() * mixture.weight
        noise = torch.zeros_like(mixture.mean).index_add_(0, pairs.cover.index, noise)
        return (mixture.stddev.square() - noise).clamp(min=0).sqrt()

    def _by_tile(self, pairs, mixture):
        """
        Yield the pairs of each tile, its regression, and the factors of its deviations.

        With these factors the variances of all tiles and of the prior add up to one.
        """
        for row in pairs.row.unique().tolist():
            own = (pairs.row == row).nonzero()[:, 0]
            yield (
                own,
                self._regression_of(row, int(pairs.cover.key[own[0], 0])),
                (mixture.weight[own] / pairs.prior.variance[own]).sqrt(),
            )

    def _chunks(self, x):
        """
        Yield indices of targets that lie close together, so that their tiles fit in memory.
        """
        for start in range(0, len(x), ORDERED_AT_ONCE):
            order = start + self.geometry.order(x[start : start + ORDERED_AT_ONCE])
            for chunk in order.split(TARGETS_AT_ONCE):
                yield from self._fitting(x, chunk)

    def _fitting(self, x, chunk):
        if len(self.tiles) > self.tiles.num_in_memory and len(chunk) > 1:
            keys = _unique(self.geometry.answering(x[chunk]).key)[0]
            keys = [key for key in keys if key in self.tiles]
            needed = sum(
                len(members) for _, members in self._solver.neighbourhood.levels(keys, self.tiles)
            )
            if needed > self.tiles.max_tiles:
                for half in chunk.split(-(-len(chunk) // 2)):
                    yield from self._fitting(x, half)
                return
        yield chunk

    # What predictions need of tiles --------------------------------------------------------------

    def _not_ready(self, keys):
        """Return the tiles, of those that are somewhere, that were not solved where they are."""
        rows = self.tiles.rows(keys).tolist()
        return [key for row, key in zip(rows, keys, strict=True) if self._ready.get(row) != key]

    def _regression_of(self, row, level):
        """Return a solved regression with its covariance, which is not kept: too large."""
        rows = torch.tensor([row])
        *_, scale, weight = self._regression.get(rows)
        return self._solver.posterior(level, self.tiles.least_squares(rows), scale, weight)


class _Cache:
    """Tensors by row, each with the version of what it was made from."""

    def __init__(self):
        self._parts, self._version = [], None

    @property
    def nbytes(self):
        return sum(part.nbytes for part in self._parts)

    def is_stale(self, rows, version):
        """Return which rows were not made from this version, (n,) bool."""
        version = version.view(len(rows), math.prod(version.shape[1:]))
        if self._version is None:
            return torch.ones(len(rows), dtype=torch.bool)
        known = rows < len(self._version)
        stale = ~known
        stale[known] = (self._version[rows[known]] != version[known]).any(-1)
        return stale

    def version(self, rows):
        """Return from what rows were made, (n, ...); -1 where from nothing."""
        if self._version is None:
            return rows.new_full((len(rows), 1), -1)
        known = rows < len(self._version)
        found = self._version.new_full((len(rows), self._version.shape[1]), -1)
        found[known] = self._version[rows[known]]
        return found

    @torch.inference_mode(False)  # tensors that can be changed in either mode
    def put(self, rows, parts, version):
        version, size = version.view(len(rows), -1), int(rows.max()) + 1
        if self._version is None:
            self._version = version.new_full((0, version.shape[1]), -1)
            self._parts = [part.new_empty(0, *part.shape[1:]) for part in parts]
        if size > len(self._version):
            size = max(size, 2 * len(self._version)) - len(self._version)
            self._version = torch.cat(
                [self._version, self._version.new_full((size, version.shape[1]), -1)]
            )
            self._parts = [torch.cat([p, p.new_zeros(size, *p.shape[1:])]) for p in self._parts]
        is_new = self._version[rows, 0] <= version[:, 0]  # nothing older takes its place
        rows = rows[is_new]
        self._version[rows] = version[is_new]
        for whole, part in zip(self._parts, parts, strict=True):
            whole[rows] = part[is_new]

    def get(self, rows, which=slice(None)):
        """Return the parts of rows: which of them, or all."""
        return [part[rows] for part in self._parts[which]]


def _check_finite(keys, state):
    """Refuse states with NaN or infinity, from one sum over each tensor: cheap beside a fold."""
    for name, tensor in state.tensors().items():
        total = float(tensor.sum())
        no_points = name == 'attention.logsumexp' and total == -math.inf
        if not (math.isfinite(total) or no_points):
            raise NotFiniteError(
                f'{name} of one of the tiles {keys[:3]} (of {len(keys)}) is not finite after the '
                'fold: the map stays as it was; look at the values that were sent, and at the '
                'weights of the model'
            )


def _unique(key):
    """Return the distinct keys and which of them each is."""
    if not len(key):
        return [], key.new_empty(0)
    low = key.amin(0)
    span = (key.amax(0) - low + 1).tolist()
    if math.prod(span) >= 2**62:  # too far apart for one number each
        distinct, inverse = key.unique(dim=0, return_inverse=True)
        return keys_of(distinct), inverse
    code = torch.zeros_like(key[:, 0])
    for column, size in zip((key - low).T, span, strict=True):
        code = code * size + column
    distinct, inverse = code.unique(return_inverse=True)
    first = inverse.new_empty(len(distinct))
    first[inverse] = torch.arange(len(key), device=key.device)
    return keys_of(key[first]), inverse


def groups(tile: Tensor, limit: int):
    """
    Yield tiles with similar numbers of pairs, padded to the largest of them.

    :param tile: (pairs,).
    :return: tiles (t,), pairs (t, n) and which of those are there (t, n).
    """
    order = tile.argsort(stable=True)
    tiles, count = tile[order].unique_consecutive(return_counts=True)
    start = count.cumsum(0) - count
    bucket = (4 * count.double().log2()).ceil().long()  # within a fifth of each other
    if len(tile) and len(tiles) <= limit and len(tiles) * int(count.max()) <= FEW:
        bucket = torch.zeros_like(bucket)  # padding costs less than more calls
    for small, large in pairwise(bucket.unique().tolist()):
        some, widest = bucket == small, int(count[bucket == large].max())
        if int(some.sum()) * widest - int(count[some].sum()) <= SPARE:
            bucket[some] = large
    for size in bucket.unique().tolist():
        members = (bucket == size).nonzero()[:, 0]
        widest = int(count[members].max())
        for part in members.split(max(1, min(limit, AT_ONCE // widest))):
            step = torch.arange(widest, device=tile.device)
            mask = step < count[part].unsqueeze(1)
            at = start[part].unsqueeze(1) + torch.where(mask, step, 0)
            yield tiles[part], order[at], mask
