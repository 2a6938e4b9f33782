"""
What takes observations: ours and others, `condition(chunks) -> memory`, `update(memory, x, y)`.

Models and GPs alike see points (n, 2) and values (n, 1) in chunks, float32; hyperparameters of the
GPs are given: only what new points cost is compared.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cmanp_ros.benchmark.eager import EagerCMANP
from cmanp_ros.core import CMANP, CMANPConfig, Lattice, World
from cmanp_ros.evaluation.kernels import Kernel, distances
from cmanp_ros.evaluation.sparse_gp import OnlineSparseGP
from cmanp_ros.optional import library

Chunk = tuple[Tensor, Tensor]
KERNEL = Kernel(nu=1.5, scale=0.7, length=0.5, noise=0.1)
NUM_INDUCING = 512


class Peer(Protocol):
    """Something that takes observations."""

    limit: int | None
    """Points beyond which it is not asked; None: any number."""

    def condition(self, chunks: Iterable[Chunk]):
        """Return what is kept of all points."""

    def update(self, memory, x: Tensor, y: Tensor):
        """Return what is kept with new points."""

    def nbytes(self, memory) -> int:
        """Return the size of what is kept [bytes]."""


class _Incremental:
    """Conditions by updates."""

    limit: int | None = None

    def condition(self, chunks):
        memory = self.empty()
        for x, y in chunks:
            memory = self.update(memory, x, y)
        return memory


class Ours(_Incremental):
    """One state, for the `paper` preset or a single tile."""

    def __init__(self, model: CMANP):
        self._model = model

    def empty(self):
        return self._model.init_state(1)

    def update(self, memory, x, y):
        return self._model.update(memory, x[None], y[None])

    def nbytes(self, memory):
        return memory.nbytes


class OurTiles(_Incremental):
    """The default: a world of tiles with a spacing of 1."""

    def __init__(self, model: CMANP):
        self._model = model

    def empty(self):
        return World(self._model, Lattice.of(self._model.config, 1.0))

    def update(self, memory, x, y):
        memory.fold(x.double(), y.double())
        return memory

    def nbytes(self, memory):
        return memory.tiles.nbytes


class Eager(_Incremental):
    """The paper as it reads: latents are encoded at each update."""

    def __init__(self, model: EagerCMANP):
        self._model = model

    def empty(self):
        return None

    def update(self, memory, x, y):
        if memory is None:
            return self._model.condition(x[None], y[None])
        return self._model.update(memory, x[None], y[None])

    def nbytes(self, memory):
        return memory.nbytes


class Kept(NamedTuple):
    """All that was observed, for those that keep it."""

    x: Tensor
    y: Tensor


class _KeepsAll:
    """Keeps every point and works through all of them again."""

    limit: int | None = None

    def condition(self, chunks):
        points = Kept(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
        return points, self.encode(points)

    def update(self, memory, x, y):
        return self.condition([memory[0], Kept(x, y)])

    def nbytes(self, memory):
        return sum(part.nbytes for part in memory[0])


class Reencoding(_KeepsAll):
    """
    As LBANP (Feng et al., ICLR 2023): latents attend to all points, from the start at each update.
    """

    limit = 100_000

    def __init__(self, model: EagerCMANP):
        self._model = model

    def encode(self, points):
        return self._model.condition(points.x[None], points.y[None])


class FullAttention(_KeepsAll):
    """
    As TNP-D (Nguyen and Grover, ICML 2022): every point attends to every point, in each layer.
    """

    limit = 2_000

    def __init__(self, config: CMANPConfig):
        dim = config.dim_model
        self._embedder = nn.Linear(config.dim_x + config.dim_y, dim)
        layer = nn.TransformerEncoderLayer(
            dim, config.num_heads, config.dim_feedforward, dropout=0.0, batch_first=True
        )
        self._encoder = nn.TransformerEncoder(layer, config.num_blocks).eval()

    def encode(self, points):
        return self._encoder(self._embedder(torch.cat(points, -1)[None]))


class ExactGP(_KeepsAll):
    """Factorizes the covariance of all points."""

    limit = 10_000

    def encode(self, points):
        x = points.x.double().numpy()
        covariance = KERNEL(distances(x, x))
        covariance[np.diag_indices(len(x))] += KERNEL.noise**2
        linalg = library('scipy.linalg', 'the exact GP')
        factor = linalg.cholesky(covariance, lower=True, overwrite_a=True, check_finite=False)
        return factor, linalg.cho_solve((factor, True), points.y.double().numpy())

    def nbytes(self, memory):
        return super().nbytes(memory) + memory[1][0].nbytes


class SparseGP(_Incremental):
    """FITC on fixed inducing points, folded chunk by chunk."""

    def empty(self):
        inducing = np.random.default_rng(0).uniform(-2, 2, (NUM_INDUCING, 2))
        return OnlineSparseGP(KERNEL, inducing)

    def update(self, memory, x, y):
        memory.observe(x.double().numpy(), y.double().numpy())
        return memory

    def nbytes(self, memory):
        return 8 * NUM_INDUCING * (NUM_INDUCING + 1)
