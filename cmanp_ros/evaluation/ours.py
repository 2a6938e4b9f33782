"""Our own methods as the studies want them: the default, and parts of it left out."""

import dataclasses
from collections.abc import Callable

import torch

from cmanp_ros.checkpoint import load_model
from cmanp_ros.core import CMANP, Lattice, LeastSquaresConfig, Normalization, OneTile
from cmanp_ros.evaluation.windows import TILE_SIZE
from cmanp_ros.field import NeuralField

WINDOW = ((-2.0, -2.0), (2.0, 2.0))
ONE_TILE_FUNCTIONS = 16  # per axis: as many as are worth their cost in a single tile


def for_windows(checkpoint='field', tile_size=TILE_SIZE, attention=None) -> dict[str, Callable]:
    """
    Return what is scored on the windows, name -> function (x, y, x_target) -> mean, stddev.

    :param attention: checkpoint of a model without the least-squares memory; None: leave it out.
    """
    model = load_model(checkpoint)
    size = model.config.least_squares
    wide = dataclasses.replace(
        size,
        functions_per_axis=ONE_TILE_FUNCTIONS,
        voxels_per_axis=round(1.5 * ONE_TILE_FUNCTIONS),
        lengths=tuple(length / 2 for length in size.lengths),
    )
    geometry = Lattice.of(model.config, tile_size)
    methods = {
        'cmanp tiles': (model, geometry),
        'least squares alone': (without_corrections(model), geometry),
        'one tile': (with_basis(model, wide), OneTile(*WINDOW)),
    }
    if attention is not None:
        methods['attention alone'] = (load_model(attention), geometry)
    return {name: _one_task(*parts) for name, parts in methods.items()}


def without_corrections(model: CMANP) -> CMANP:
    """Return the model without its network: least squares, levels weighted by precision."""
    copy = with_basis(model, model.config.least_squares)
    torch.nn.init.zeros_(copy.predictor[-1].weight)
    torch.nn.init.zeros_(copy.predictor[-1].bias)
    return copy


def with_basis(model: CMANP, least_squares: LeastSquaresConfig) -> CMANP:
    """Return the same network over another basis."""
    copy = CMANP(dataclasses.replace(model.config, least_squares=least_squares))
    copy.load_state_dict(model.state_dict())
    return copy.eval().requires_grad_(False)


def stream(
    checkpoint='field', tile_size=20.0, value_offset=0.0, value_scale=1.0, corrected=True
) -> Callable:
    """
    Return a function that makes an empty map, for `studies.tracks` and `tile_size.propose`.

    :param corrected: False: least squares alone.
    """
    model = load_model(checkpoint)
    model = model if corrected else without_corrections(model)

    def make(tile_size=tile_size):
        normalization = Normalization(value_offset, value_scale)
        return NeuralField(model, Lattice.of(model.config, tile_size), normalization)

    return make


def _one_task(model, geometry):
    def predict(x, y, x_target):
        field = NeuralField(model, geometry, Normalization())
        field.observe(x, y)
        mean, stddev = field.predict(x_target)
        return mean[:, 0], stddev[:, 0]

    return predict
