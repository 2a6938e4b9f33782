"""Models small enough for unit tests, with weights that make every part count."""

import torch
from torch import nn

from cmanp_ros.core import CMANP, CMANPConfig, LeastSquaresConfig

SIZES = {
    'num_latents': 11,
    'num_latents_per_block': 7,
    'dim_feedforward': 13,
    'num_blocks': 2,
    'chunk_size': 5,
}


def paper(dim_x=2, dim_y=1, **overrides):
    """Return a configuration of the paper's kind."""
    sizes = SIZES | {'dim_model': 15, 'num_heads': 3}
    return CMANPConfig.paper(dim_x, dim_y, **(sizes | overrides))


def field(dim_x=2, dim_y=1, **overrides):
    """Return a configuration with both memories."""
    memory = LeastSquaresConfig(
        functions_per_axis={1: 11, 2: 5, 3: 3}[dim_x],
        lengths=(0.4, 1.0),
        noise_ratios=(0.1, 0.3),
        voxels_per_axis=17,
        outlier_share=0.05,
    )
    sizes = SIZES | {'dim_model': 12, 'num_heads': 3, 'least_squares': memory}
    return CMANPConfig.field(dim_x, dim_y, **(sizes | overrides))


PRESETS = {'paper': paper, 'field': field}


def build(config, dtype=torch.float64):
    """Return a model for prediction in which no weight is left at zero."""
    model = CMANP(config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def points(config, n, batch=1, dtype=torch.float64):
    """Return locations and values of n observations."""
    x = torch.rand(batch, n, config.dim_x, dtype=torch.float64) * 4 - 2
    wave = torch.sin(2 * x.sum(-1, keepdim=True) + torch.arange(config.dim_y))
    y = wave + 0.1 * torch.randn(batch, n, config.dim_y, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def assert_states_close(found, expected, **tolerance):
    """Compare every tensor of two states."""
    found, expected = found.tensors(), expected.tensors()
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **tolerance)
