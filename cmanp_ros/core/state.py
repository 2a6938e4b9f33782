"""The state of a batch of maps: two additive memories of constant size, and their algebra."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cmanp_ros.core import attention, least_squares
from cmanp_ros.core.attention import AttentionSums
from cmanp_ros.core.config import LeastSquaresConfig
from cmanp_ros.core.errors import InputError, StateMismatchError
from cmanp_ros.core.least_squares import LeastSquaresSums


@dataclass(frozen=True, eq=False)
class State:
    """
    Immutable; every tensor has a leading batch axis: tiles.
    """

    attention: AttentionSums
    least_squares: LeastSquaresSums | None
    """None in the `paper` preset."""
    num_observations: Tensor
    """(batch,) int64: points ever folded, forgotten ones included."""

    @property
    def batch(self) -> int:
        """
        Return the number of independent maps in this state.
        """
        return len(self.num_observations)

    @property
    def nbytes(self) -> int:
        """
        Return the size of the state [bytes]; it does not depend on what was folded.
        """
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """
        Return every tensor by name, as state files hold them.
        """
        named = {f'attention.{k}': v for k, v in self.attention._asdict().items()}
        if self.least_squares is not None:
            named |= {f'least_squares.{k}': v for k, v in self.least_squares._asdict().items()}
        return named | {'num_observations': self.num_observations}

    def is_possible(self, config: LeastSquaresConfig | None, largest: float) -> bool:
        """
        Return whether observations can have given these sums: a stranger may send any.

        :param config: of the least-squares memory.
        :param largest: absolute value in model units that no observation exceeds.
        """
        possible = attention.is_possible(self.attention) & (self.num_observations >= 0)
        if self.least_squares is not None:
            possible &= least_squares.is_possible(
                config, self.least_squares, self.num_observations, largest
            )
        return bool(possible.all())

    def is_finite(self) -> bool:
        """
        Return whether no sum is NaN or infinite (-inf is the logsumexp of no points).
        """
        if torch.isnan(self.attention.logsumexp).any():
            return False
        if (self.attention.logsumexp == torch.inf).any():
            return False
        values = [self.attention.mean_value, *(self.least_squares or ())]
        return all(bool(torch.isfinite(value).all()) for value in values)


def from_tensors(tensors: dict[str, Tensor]) -> State:
    """
    Build the state whose `tensors()` are given.

    :raises KeyError: when one is missing.
    """

    def part(cls, prefix):
        return cls(**{name: tensors[f'{prefix}.{name}'] for name in cls._fields})

    has_regression = any(name.startswith('least_squares.') for name in tensors)
    return State(
        attention=part(AttentionSums, 'attention'),
        least_squares=part(LeastSquaresSums, 'least_squares') if has_regression else None,
        num_observations=tensors['num_observations'],
    )


def merge(a: State, b: State) -> State:
    """
    Return the state of all points of both. Commutative, associative, exact.

    :raises StateMismatchError: when their sizes differ.
    """
    shapes_a, shapes_b = ({k: tuple(v.shape) for k, v in s.tensors().items()} for s in (a, b))
    if shapes_a != shapes_b:
        different = sorted(
            name for name in shapes_a | shapes_b if shapes_a.get(name) != shapes_b.get(name)
        )
        raise StateMismatchError(
            f'the states differ in the shape of {", ".join(different)}: '
            f'{[shapes_a.get(name) for name in different]} and '
            f'{[shapes_b.get(name) for name in different]}; merge states of one model only'
        )
    return State(
        attention=attention.merge(a.attention, b.attention),
        least_squares=a.least_squares and least_squares.merge(a.least_squares, b.least_squares),
        num_observations=a.num_observations + b.num_observations,
    )


def concatenate(parts: list[State]) -> State:
    """
    Return one state with the tiles of all parts, in their order.
    """
    named = [part.tensors() for part in parts]
    return from_tensors({name: torch.cat([part[name] for part in named]) for name in named[0]})


def select(state: State, tiles) -> State:
    """
    Return the state of some tiles.

    :param tiles: slice, or indices (n,).
    """
    return from_tensors({name: value[tiles] for name, value in state.tensors().items()})


def repeat(state: State, times: int) -> State:
    """
    Return the whole batch again and again, `times` in all.
    """
    return from_tensors(
        {k: v.repeat(times, *[1] * (v.dim() - 1)) for k, v in state.tensors().items()}
    )


def forget(state: State, factor: float) -> State:
    """
    Weight every point folded so far by `factor` against points to come; exact.

    :param factor: in (0, 1]; exp(-dt / tau) for a memory that fades with time constant tau.
    :raises InputError: for another factor.
    """
    if not 0 < factor <= 1:
        raise InputError(f'forget by {factor!r}: expected a factor in (0, 1]; 1 keeps everything')
    return State(
        attention=attention.forget(state.attention, factor),
        least_squares=state.least_squares and least_squares.forget(state.least_squares, factor),
        num_observations=state.num_observations,
    )
