"""
Worlds for training: fields such as robots meet, how they are observed, and what is asked.
"""

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

HALF_WIDTH = 2.0
SPACING = 0.75  # of the finest tiles, in the units in which worlds are drawn
PARKED = 0.1  # share of worlds
NUM_FEATURES = 512  # random Fourier features of a training field: cheap, close to Gaussian


def _uniform(generator, size, low, high):
    return low + (high - low) * torch.rand(size, dtype=torch.float64, generator=generator)


def _log_uniform(generator, size, low, high):
    return _uniform(generator, size, torch.tensor(low).log(), torch.tensor(high).log()).exp()


class WorldTask(NamedTuple):
    """
    One field, observed and asked about; locations in units of the finest tiles, float64.
    """

    x_context: Tensor
    """(num_context, dim_x)."""
    y_context: Tensor
    """(num_context, 1)."""
    x_target: Tensor
    """(num_target, dim_x)."""
    y_target: Tensor
    """(num_target, 1): observations, noise included, but no outliers."""


def world_task(generator, max_context=1200, num_target=48, dim_x=2) -> WorldTask:
    """
    Draw a field, where it is observed, and targets in and around it.

    Observations: uniform, along winding tracks or survey lines with a footprint, clusters,
    half-seen regions, parked robots; noise that may vary tenfold, passes that disagree, outliers;
    amplitudes over two decades. Targets: clusters anywhere, and where the track goes on.
    """
    chance, uniform, log_uniform = _draws(generator)
    size = uniform(0, 1)
    num_context = int((max_context + 1) ** size) if size > 0.04 else 0
    side = log_uniform(2.5, 14.0)
    if chance(0.25) and num_context:  # as many readings of a tile as there may be
        side = min(14.0, max(0.7, (num_context / log_uniform(5, 500)) ** (1 / dim_x)))
    on_track = chance(0.5)
    stride = 2 ** int(uniform(0, 3)) if on_track else 1  # how far ahead the targets reach
    count = num_context + stride * num_target
    if on_track:
        x = _track(generator, count, side, dim_x)
    elif chance(0.8):
        x = _uniform(generator, (count, dim_x), -side / 2, side / 2)
    else:  # clusters: a robot that stops here and there
        center = _uniform(generator, (8, dim_x), -side / 2, side / 2)
        spread = _log_uniform(generator, (8, 1), 0.02, 1.0)
        which = torch.randint(0, 8, (count,), generator=generator)
        white = torch.randn(count, dim_x, dtype=torch.float64, generator=generator)
        x = center[which] + spread[which] * white
    if chance(0.2):  # half of the map was never seen
        x[:, 0] = x[:, 0].abs()
    x_context, ahead = x[:num_context], x[num_context::stride][:num_target]
    x_target = ahead  # as a robot meets them
    if not chance(0.6 if on_track else 0.15):
        x_target = _targets(generator, x_context, num_target, side)

    if num_context > 1 and chance(PARKED):  # a robot stands still, and is asked about the place
        stays = int(log_uniform(1, num_context))
        x_context[-stays:] = x_context[-stays].clone()
        x_target[: num_target // 4] = x_context[-1]

    x = torch.cat([x_context, x_target])
    field, noise = _field(generator, x)
    white = torch.randn(field.shape, dtype=torch.float64, generator=generator)
    if on_track and chance(0.5):  # passes that disagree: tides, drift, another ship
        every = int(log_uniform(10, 400))
        passes = torch.randn(len(x) // every + 1, 1, dtype=torch.float64, generator=generator)
        bias = passes.repeat_interleave(every, 0)[: len(x)]
        field = field + log_uniform(0.01, 0.5) * bias
    y = field + noise * white
    if chance(0.3):  # readings that went wrong
        wrong = torch.rand(y.shape, generator=generator) < uniform(0.01, 0.1)
        wrong[num_context:] = False
        side = torch.randint(0, 2, y.shape, generator=generator) * 2.0 - 1
        size = log_uniform(4.0, 20.0) * (noise + 0.02 * field.std())
        y = torch.where(wrong, y + side * size, y)
    offset = torch.randn(1, dtype=torch.float64, generator=generator)
    y = log_uniform(0.02, 1.5) * y + offset * chance(0.7)
    x_context, x_target = x_context / SPACING, x_target / SPACING
    return WorldTask(x_context, y[:num_context], x_target, y[num_context:])


def _draws(generator):
    """
    Return functions that draw one number: whether, uniform, and log-uniform.
    """

    def uniform(low, high):
        return _uniform(generator, 1, low, high).item()

    def log_uniform(low, high):
        return _log_uniform(generator, 1, float(low), float(high)).item()

    return (lambda probability: uniform(0, 1) < probability), uniform, log_uniform


def _targets(generator, x_context, num_target, side):
    """
    Return targets (num_target, dim_x) in two clusters of about a tile: anywhere, or near data.
    """
    dim_x, clusters = x_context.shape[1], 2
    center = _uniform(generator, (clusters, dim_x), -side / 2, side / 2)
    if len(x_context):
        near = x_context[torch.randint(0, len(x_context), (clusters,), generator=generator)]
        white = torch.randn(clusters, dim_x, dtype=torch.float64, generator=generator)
        near = near + white * _log_uniform(generator, (clusters, 1), 0.1, 3.0)
        is_near = torch.rand(clusters, 1, generator=generator) < 0.6
        center = torch.where(is_near, near, center)
    which = torch.arange(num_target) % clusters
    return center[which] + _uniform(generator, (num_target, dim_x), -0.7, 0.7)


def _field(generator, x):
    """
    Return a field of standard deviation 1 and the noise at x (n, dim_x), (n, 1) each.

    Sums of random fields of many lengths and smoothnesses; and what real ones have beside: rough
    regions beside flat ones, plains and shores, escarpments, hills, ridges, heavy tails, step
    edges, trends.
    """
    chance, uniform, log_uniform = _draws(generator)
    n, dim_x = x.shape
    smoothnesses = torch.tensor([0.5, 1.5, 1.5, 2.5, torch.inf])

    def random_field(length, smoothness=torch.inf):
        smoothness, length = torch.tensor([smoothness]), torch.tensor([length])
        return _random_field(generator, x[None], smoothness, length.double())[0]

    field, length = torch.zeros(n, 1, dtype=torch.float64), log_uniform(0.4, 12.0)
    for share in (1.0, 0.5 * chance(0.4), 0.25 * chance(0.3)):
        if share:
            which = torch.randint(0, 5, (1,), generator=generator)
            field = field + share * random_field(length, smoothnesses[which].item())
            length = max(0.2, length * log_uniform(0.1, 1.0))
    slow = log_uniform(2.0, 12.0)
    if chance(0.4):  # rough here, flat there, without a border
        field = field * (uniform(0.3, 2.0) * random_field(slow)).exp()
    if chance(0.35):  # the same, with one
        flat = torch.sigmoid(log_uniform(2, 20) * (random_field(slow) + uniform(-1, 1)))
        field = field * (log_uniform(0.01, 0.3) + flat)
    if chance(0.15):  # ridges
        field = field.abs()
    if chance(0.15):  # heavy tails, as of concentrations
        field = (uniform(0.3, 1.2) * field).clamp(max=30.0).exp()  # rough ones overflow
    if chance(0.45):  # hills and seamounts
        for _ in range(int(log_uniform(1, 12))):
            center = x[torch.randint(0, n, (1,), generator=generator)]
            center = center + 2 * torch.randn(1, dim_x, dtype=torch.float64, generator=generator)
            distance = (x - center).norm(dim=-1, keepdim=True) / log_uniform(0.2, 4.0)
            field = field + log_uniform(0.3, 5.0) * torch.exp(-0.5 * distance.square())
    if chance(0.25):  # escarpments
        field = field + uniform(-4, 4) * torch.tanh(random_field(slow) * log_uniform(1, 20))
    if chance(0.15):  # plains, lakes, the sea
        field = field.clamp(min=field.quantile(uniform(0.1, 0.6)))
    direction = torch.randn(dim_x, 1, dtype=torch.float64, generator=generator)
    across = (x - _uniform(generator, dim_x, -2, 2)) @ (direction / direction.norm())
    field = field / field.std().clamp(min=1e-3)
    if chance(0.2):
        field = field + uniform(-2, 2) * across.sign()
    if chance(0.3):
        field = field + uniform(-0.5, 0.5) * across
    noise = torch.full((n, 1), log_uniform(0.003, 0.7), dtype=torch.float64)
    if chance(0.25):  # tenfold from end to end
        noise = noise * (1.15 * torch.tanh(across / slow)).exp()
    if chance(0.25):
        noise = torch.full_like(noise, 1e-4)  # as from a survey
    return field, noise


def _track(generator, n, side, dim_x):
    """
    Return n readings along a winding track, or along survey lines, (n, dim_x), in their order.
    """
    step = _log_uniform(generator, 1, 0.01, 0.6)
    if torch.rand(1, generator=generator) < 0.6:
        turn = torch.randn(n, dim_x, dtype=torch.float64, generator=generator)
        turn[1:] *= _log_uniform(generator, 1, 0.005, 0.3)
        heading = turn.cumsum(0)
        heading = heading / heading.norm(dim=-1, keepdim=True)
        path = (heading * step).cumsum(0) * 2 / (side / 2) + turn[:1]
        path = _reflect(path) * (side / 4)
    else:
        along = torch.arange(n, dtype=torch.float64) * step
        lane = (along / side).floor()
        place = along - lane * side - side / 2
        path = torch.zeros(n, dim_x, dtype=torch.float64)
        path[:, 0] = torch.where(lane % 2 == 0, place, -place)
        path[:, -1] += (lane * _log_uniform(generator, 1, 0.1, 2.0)) % side - side / 2
    footprint = _log_uniform(generator, 1, 1e-3, 0.3)
    return path + footprint * torch.randn(path.shape, dtype=torch.float64, generator=generator)


def _reflect(x):
    """
    Fold the line into [-2, 2] by reflection at both ends.
    """
    period = 4 * HALF_WIDTH
    x = (x + HALF_WIDTH) % period
    return torch.minimum(x, period - x) - HALF_WIDTH


def _random_field(generator, x, smoothness, length):
    """
    Return fields of unit variance at x (batch, n, dim_x) by spectral sampling, (batch, n, 1).
    """
    batch, _, dim_x = x.shape
    shape = (batch, dim_x, NUM_FEATURES)
    omega = torch.randn(shape, dtype=torch.float64, generator=generator)
    dof = torch.where(smoothness.isinf(), 1.0, 2 * smoothness).double()
    # A Matern spectrum is a Student t with 2 nu degrees of freedom: normal over root chi-square.
    normal = torch.randn(batch, 5, NUM_FEATURES, dtype=torch.float64, generator=generator)
    used = torch.arange(5)[:, None] < dof[:, None, None]
    chi2 = (normal.square() * used).sum(1, keepdim=True)
    heavy = omega * (dof[:, None, None] / chi2).sqrt()
    omega = torch.where(smoothness.isinf()[:, None, None], omega, heavy) / length[:, None, None]
    phase = (
        2 * torch.pi * torch.rand(batch, 1, NUM_FEATURES, dtype=torch.float64, generator=generator)
    )
    weight = torch.randn(batch, NUM_FEATURES, 1, dtype=torch.float64, generator=generator)
    return sqrt(2 / NUM_FEATURES) * torch.cos(x @ omega + phase) @ weight
