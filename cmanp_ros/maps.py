"""
Saved maps by name, below one folder, and what is saved with them: no ROS here.

A name is no path. A map is verified, all of it, before it is used; what cannot be used is refused
with a `MapError` whose code is that of the services.
"""

import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import cmanp_ros
from cmanp_ros import checkpoint
from cmanp_ros.core.errors import CheckpointError, CMANPError, StateMismatchError
from cmanp_ros.field import NeuralField
from cmanp_ros.parameters import NodeParameters

NAME = re.compile(r'[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}')
NUM_ASIDE = 8  # maps that are set aside
_TIME = f'{"[0-9]" * 8}T{"[0-9]" * 6}.{"[0-9]" * 6}'
MAX_BYTES = 1 << 32  # of a map that is loaded: about 60,000 tiles


class Code(IntEnum):
    """What became of a request, as in SaveState.srv, LoadState.srv and MergeState.srv."""

    SUCCESS = 0
    BAD_NAME = 1
    NOT_FOUND = 2
    EXISTS = 3
    DAMAGED = 4
    OTHER_WEIGHTS = 5
    OTHER_MAP = 6
    NO_DIRECTORY = 7
    FAILED = 8


class MapError(CMANPError):
    """
    A map that cannot be saved or used; nothing was changed.

    :ivar code: why, a `Code`.
    """

    def __init__(self, code: Code, message: str):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Provenance:
    """Where and when a map was made; saved with it."""

    frame: str
    bounds: tuple[tuple[float, ...], tuple[float, ...]]
    """[m] lower and upper corner of the workspace; the origin is that of the frame."""
    oldest_stamp: int = 0
    """[ns] of the observations; 0 before the first."""
    newest_stamp: int = 0
    """[ns] of the observations; 0 before the first."""

    def __post_init__(self):
        corners = tuple(tuple(float(value) for value in corner) for corner in self.bounds)
        object.__setattr__(self, 'bounds', corners)

    def observed(self, oldest_stamp: int, newest_stamp: int) -> 'Provenance':
        """Return the provenance with other observations: of a fold, or of a map merged."""
        oldest = [stamp for stamp in (self.oldest_stamp, oldest_stamp) if stamp]
        newest = max(self.newest_stamp, newest_stamp)
        return Provenance(self.frame, self.bounds, min(oldest, default=0), newest)


class SavedMap(NamedTuple):
    """A map that was read and verified."""

    field: NeuralField
    """In memory; to be taken over by `replace_with` or `merge`."""
    provenance: Provenance
    file: tuple | None = None
    """Which file it was, see `StateDirectory.identity`; None: none."""


def empty_map(parameters: NodeParameters) -> NeuralField:
    """
    Make the map of a node, empty unless its store holds one.

    :raises CheckpointError: for a model that cannot be used.
    :raises ConfigError: for bounds, units or a device that cannot be used.
    """
    p = parameters
    return NeuralField.load(
        p.checkpoint,
        (p.bounds_min, p.bounds_max),
        p.device,
        p.value_offset,
        p.value_scale,
        p.half_life or None,
        tile_size=p.tile_size or None,
        one_tile=p.one_tile,
        max_tiles=p.max_tiles,
        store=p.store or None,
        undo_window_sec=p.undo_window or None,
    )


def save(field: NeuralField, path, provenance: Provenance) -> Path:
    """
    Write a map to a file, as a node does and can load it.

    :raises OSError: when it cannot be written; what was there still is.
    """
    return checkpoint.save_map(path, *field.exported(**_extra(field, provenance)))


def to_bytes(field: NeuralField, provenance: Provenance) -> bytes:
    """Return the content of a map's file, for a message."""
    return field.to_bytes(**_extra(field, provenance))


def from_bytes(data: bytes, field: NeuralField, frame: str, source='the map') -> SavedMap:
    """
    Read a map that fits `field`, which is unchanged: every part of it is verified.

    :param frame: that the map must be in.
    :param source: what errors call it.
    :raises MapError: with the code DAMAGED, OTHER_WEIGHTS or OTHER_MAP.
    """
    try:
        found, extra = field.read(data, source)
        provenance = _provenance(extra, source)
    except checkpoint.OtherWeightsError as error:
        raise MapError(Code.OTHER_WEIGHTS, str(error)) from error
    except CheckpointError as error:
        raise MapError(Code.DAMAGED, str(error)) from error
    except StateMismatchError as error:
        raise MapError(Code.OTHER_MAP, str(error)) from error
    if provenance.frame.strip('/') != frame.strip('/'):
        raise MapError(
            Code.OTHER_MAP,
            f'{source} is in the frame {provenance.frame!r}, this map in {frame!r}: set map_frame '
            'to that one, or use a map of this frame',
        )
    return SavedMap(found, provenance)


def summary(field: NeuralField) -> str:
    """Return what a map holds, in words for whoever saved or loaded it."""
    text = f'{field.num_observations} observations in {field.num_tiles} tiles'
    if field.half_life_sec is not None:
        text += (
            f'; with a half-life of {field.half_life_sec:g} s: what was saved fades from the '
            'moment it is loaded, not for the time it lay on disk'
        )
    return text


class StateDirectory:
    """
    The maps in one folder, each `<name>.safetensors`.
    """

    def __init__(self, folder, frame: str, max_bytes: int = MAX_BYTES):
        """
        Make the folder if need be, and remove what a killed process left half written in it.

        :param folder: '' or None: there is none, and everything is refused with NO_DIRECTORY.
        :param frame: of the maps.
        :param max_bytes: of a map that is loaded.
        """
        self._folder = Path(folder).resolve() if folder else None
        self._frame, self._max_bytes = frame, max_bytes
        if self._folder is not None:
            with suppress(OSError):  # whoever asks for a map is told
                self._folder.mkdir(parents=True, exist_ok=True)
                checkpoint.remove_leftovers(self._folder)

    @property
    def folder(self) -> Path | None:
        """Where the maps are; None: nowhere."""
        return self._folder

    def names(self) -> list[str]:
        """Return the names of the maps that are there."""
        if self._folder is None:
            return []
        paths = self._folder.glob('*.safetensors')
        return sorted(p.stem for p in paths if p.is_file() and NAME.fullmatch(p.stem))

    def save(
        self, field: NeuralField, name: str, provenance: Provenance, overwrite: bool = False
    ) -> Path:
        """
        Write a map; after a crash or a power cut its file is the old or the new one, whole.

        :param overwrite: replace a map of that name.
        :return: the path of the file.
        :raises MapError: with the code BAD_NAME, EXISTS, NO_DIRECTORY or FAILED.
        """
        return self.writer(field, name, provenance, overwrite)()

    def writer(
        self, field: NeuralField, name: str, provenance: Provenance, overwrite: bool = False
    ) -> Callable[[], Path]:
        """
        Copy a map for `save`, and return what writes the copy: on any thread, however slow a disk.

        :raises MapError: as `save`; so does what is returned.
        """
        path = self._path(name)
        self.check()
        if os.path.lexists(path) and not overwrite:
            raise MapError(
                Code.EXISTS,
                f'a map {name!r} is there already: set overwrite, or use another name',
            )
        content = field.exported(**_extra(field, provenance))

        def write():
            try:
                return checkpoint.save_map(path, *content)
            except (OSError, CMANPError) as error:
                raise MapError(
                    Code.FAILED,
                    f'the map {name!r} was not saved ({error}): what was there still is',
                ) from error

        return write

    def check(self):
        """
        See whether maps can be saved.

        :raises MapError: with the code NO_DIRECTORY.
        """
        self._check_folder()
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise MapError(
                Code.NO_DIRECTORY, f'state_directory {self._folder} is not writable: make it so'
            )

    def identity(self, name: str) -> tuple | None:
        """
        Return what tells the file of a map from all others, before and after; None: there is none.

        :raises MapError: with the code BAD_NAME, NO_DIRECTORY or FAILED.
        """
        try:
            return _identity(self._path(name).stat())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MapError(
                Code.FAILED, f'the map {name!r} cannot be looked at ({error})'
            ) from error

    def set_aside(self, name: str) -> str | None:
        """
        Keep a map also as '<name>-<time>', so that another map may take its name.

        Of those set aside the `NUM_ASIDE` newest stay.

        :return: the other name; None when there is no such map.
        :raises MapError: with the code BAD_NAME, NO_DIRECTORY or FAILED.
        """
        path = self._path(name)
        try:
            written = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
            aside = path.with_stem(f'{name}-{written:%Y%m%dT%H%M%S.%f}')
            if not aside.exists():
                os.link(path, aside)  # the old name stays until a new map takes it, whole
            earlier = sorted(self._folder.glob(f'{name}-{_TIME}.safetensors'))
            for old in earlier[:-NUM_ASIDE]:
                old.unlink()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MapError(
                Code.FAILED, f'the map {name!r} cannot be set aside ({error}): nothing was saved'
            ) from error
        return aside.stem

    def load(self, name: str, field: NeuralField) -> SavedMap:
        """
        Read a map that fits `field`, which is unchanged: every part of it is verified.

        :raises MapError: with the code BAD_NAME, NOT_FOUND, DAMAGED, OTHER_WEIGHTS, OTHER_MAP,
            NO_DIRECTORY or FAILED.
        """
        data, file = self._content(name)
        return from_bytes(data, field, self._frame, f'the map {name!r}')._replace(file=file)

    def _path(self, name):
        """Return the path of a map, which lies in the folder, or a link there."""
        if NAME.fullmatch(name) is None:
            raise MapError(
                Code.BAD_NAME,
                f'name {name!r}: expected 1 to 64 of the characters A-Z a-z 0-9 _ . - and no dot '
                'in front; no path',
            )
        self._check_folder()
        return self._folder / f'{name}.safetensors'

    def _check_folder(self):
        if self._folder is None:
            raise MapError(
                Code.NO_DIRECTORY, 'state_directory is not set: give the folder for saved maps'
            )
        if not self._folder.is_dir():
            raise MapError(
                Code.NO_DIRECTORY,
                f'state_directory {self._folder} is no folder and could not be made: make it',
            )

    def _content(self, name):
        path = Path(os.path.realpath(self._path(name)))
        if not path.is_relative_to(self._folder):
            raise MapError(
                Code.BAD_NAME,
                f'the map {name!r} is a link that leads out of state_directory: copy the file '
                'there instead',
            )
        try:  # not blocked by a pipe, nor led elsewhere by a link that was just made
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            with os.fdopen(descriptor, 'rb') as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise FileNotFoundError(f'{path} is no file')
                if found.st_size > self._max_bytes:
                    raise MapError(
                        Code.FAILED,
                        f'the map {name!r} has {found.st_size} bytes, at most {self._max_bytes} '
                        'are read: use a smaller map',
                    )
                return file.read(self._max_bytes), _identity(found)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise MapError(
                Code.NOT_FOUND, f'no map {name!r}: expected one of {self.names()}'
            ) from error
        except OSError as error:
            raise MapError(
                Code.FAILED, f'the map {name!r} cannot be read ({error}): make it readable'
            ) from error


def _identity(found):
    """Return what a file has in common with no other, by what `stat` found."""
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _extra(field, provenance):
    """Return what is saved with a map, as plain values."""
    return asdict(provenance) | {
        'num_observations': field.num_observations,
        'num_tiles': field.num_tiles,
        'package_version': cmanp_ros.__version__,
    }


def _provenance(extra, source):
    """
    Return the provenance that was saved.

    :raises CheckpointError: when it is none.
    """
    try:
        found = Provenance(
            extra['frame'], extra['bounds'], extra['oldest_stamp'], extra['newest_stamp']
        )
        stamps = found.oldest_stamp, found.newest_stamp
        if type(found.frame) is str and {type(stamp) for stamp in stamps} == {int}:
            return found
    except (KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(
        f'{source} was saved with {extra!r}: expected frame, bounds, oldest_stamp and '
        'newest_stamp; save it again with this package'
    )
