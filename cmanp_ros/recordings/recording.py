"""One or several files, opened: what is folded of them, in the order of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cmanp_ros.core.errors import InputError
from cmanp_ros.parameters import NodeParameters, SourceParameters
from cmanp_ros.recordings.parts import Chunk, Losses, Points, Span, Thinning

BAG_SUFFIXES = ('.mcap', '.db3', '.bag')


class Recording:
    """
    Bags, merged in the order of time, or tables of points one after the other.

    To be closed, or used as a context manager.

    :ivar parameters: `NodeParameters` that it is read with.
    :ivar num_messages: how many `chunks` will read (of a table: batches of lines).
    :ivar duration_sec: [s] from the first to the last message; None for a table.
    :ivar losses: what was left out so far.
    :ivar thinning: what was admitted so far.
    :ivar num_read: messages read so far.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        sources: Sequence[str] | None = None,
        map_frame: str = 'map',
        dim_x: int = 2,
        dim_y: int = 1,
        parameters: NodeParameters | None = None,
    ) -> None:
        """
        Open files.

        :param paths: bags (folders, .mcap, .db3), or tables (.csv, .xyz, .las and other texts).
        :param sources: each 'TOPIC[:FIELD]', or ':FIELD' of a table; None: those of the
            parameters that are there, or else the only topic that can be one.
        :param map_frame: frame to bring the points to; that of the parameters comes first.
        :param dim_x: numbers per location.
        :param dim_y: numbers per value.
        :param parameters: of the node that would have heard the messages; None: defaults.
        :raises InputError: for files that cannot be read.
        :raises ConfigError: for sources that are not there.
        """
        paths = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        self.parameters = parameters or NodeParameters(map_frame=map_frame)
        self.losses, self.thinning, self.num_read = Losses(), Thinning(), 0
        arguments = (paths, list(sources or ()), self.parameters, dim_x, dim_y)
        if _are_bags(paths):
            from cmanp_ros.recordings.bags import Bags

            self._files = Bags(*arguments)
        else:
            from cmanp_ros.recordings.tables import Tables

            self._files = Tables(*arguments)
        self.num_messages = self._files.num_messages
        self.duration_sec = self._files.duration_sec

    @property
    def rejected(self) -> dict[str, int]:
        """Reason -> number of points left out so far for it."""
        return dict(self.losses.points)

    @property
    def sources(self) -> list[SourceParameters]:
        """What is read: the topics, or the value of a table."""
        return self._files.sources

    @property
    def descriptions(self) -> list[str]:
        """What is read, in words: topics with types, or files, and what the value is."""
        return self._files.descriptions

    @property
    def is_thinned(self) -> bool:
        """Whether what is folded of a message depends on those before it."""
        return any(source.voxel_size or source.max_rate for source in self.sources)

    def chunks(self, span: Span | None = None) -> Iterator[Chunk]:
        """
        Read, in the order of time.

        :param span: a part made by `split`; None: all.
        :return: points of each message of which some are left; the rest is counted in `losses`.
        """
        for points in self.points(span):
            yield Chunk(points.x, points.y, points.stamp * 1e-9)

    def points(self, span: Span | None = None) -> Iterator[Points]:
        """Read as `chunks`, with the source and the stamp to the nanosecond."""
        for points in self._files.read(self, span):
            good, rejected = self.thinning.thin(points)
            self.losses.reject_points(rejected)
            if good.any():
                yield points._replace(x=points.x[good], y=points.y[good])

    def split(self, num_parts: int) -> list[Span]:
        """Cut the recording into so many parts at most, of the same length."""
        return self._files.split(num_parts)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _are_bags(paths: Sequence[Path]) -> bool:
    """Tell bags from tables."""
    if not paths:
        raise InputError('no file is given; expected a bag, or a table of points')
    for path in paths:
        if not path.exists():
            raise InputError(
                f'{path} is not there; expected a bag (a folder, .mcap, .db3) or a '
                'table of points (.csv, .xyz, .las)'
            )
    are_bags = [path.is_dir() or path.suffix in BAG_SUFFIXES for path in paths]
    if len(set(are_bags)) > 1:
        raise InputError(
            f'{", ".join(map(str, paths))}: bags and tables at once, whose times cannot be '
            'compared; expected either: replay them one after the other, and merge the maps'
        )
    return are_bags[0]
