"""
What else maps a field from single tasks, fitted and asked in two steps, so that each can be timed.

`peers` returns name -> function `fit(x, y) -> predict`, with `predict(x_target) -> mean, stddev`:
x is (m, 2), y (m,), mean and stddev (n,), noise included. Each sees nothing but the task, in the
units of the windows: x about [-2, 2]^2, values with a standard deviation of about 0.65.
"""

from collections.abc import Callable

import numpy as np
import torch

from cmanp_ros.evaluation import convcnp, kernels, ours
from cmanp_ros.evaluation import peers as stream_peers
from cmanp_ros.evaluation.kernels import Kernel
from cmanp_ros.evaluation.scores import score
from cmanp_ros.evaluation.sparse_gp import inducing_points
from cmanp_ros.evaluation.windows import TILE_SIZE
from cmanp_ros.optional import library

__all__ = ['CONVCNP', 'REFERENCE', 'STORED', 'peers']

REFERENCE = 'exact GP'  # what all are compared with
CONVCNP = 'ConvCNP, undertrained'
STORED = (
    *(REFERENCE, 'Vecchia GP', 'local GP', 'sparse GP', 'local basis filter', 'random features'),
    *('kriging', 'Kalman grid', 'linear interpolation'),
)  # those without weights, which may have changed since
SMOOTHNESS = (1.5, 2.5)  # of the Matern covariances to choose from
LEAST_NOISE_VARIANCE = 1e-6
NUM_FIRST_FIT = 256  # points on which the exact GP chooses its smoothness and start
NUM_FIT = 512  # points that the hyperparameters of the approximate GPs are fitted to
NUM_NEIGHBORS = 20  # of the Vecchia GP
NUM_INDUCING = 512
NUM_FREQUENCIES = 1024  # two features each
BATCH = 64  # observations that are folded at once
CELL_SIZES = (0.125, 0.25, 0.5, 1.0)
VARIOGRAMS = ('exponential', 'spherical')
NUM_LAGS = 20
FOLDS = 5


def peers(checkpoint='field', tile_size: float = TILE_SIZE, folder='build/evaluation'):
    """
    Return all of them, ours last; a library that is missing shows when its peer is called.

    :param tile_size: of ours [units of x].
    :param folder: where the ConvCNP is, or is to be trained.
    """
    return {
        REFERENCE: exact_gp,
        'Vecchia GP': vecchia_gp,
        'local GP': local_gp,
        'sparse GP': sparse_gp,
        'local basis filter': local_basis_filter,
        'random features': random_features,
        'kriging': kriging,
        'Kalman grid': kalman_grid,
        'linear interpolation': linear_interpolation,
        CONVCNP: _convcnp(folder),
        'cmanp tiles': ours_in_tiles(checkpoint, tile_size),
    }


# GPs ---------------------------------------------------------------------------------------------


def exact_gp(x, y) -> Callable:
    """
    Fit an exact GP (gpytorch): Matern-3/2 or -5/2, mean, scale, length and noise by evidence.

    The best of two starts for each smoothness on some of the points goes on with all of them.
    """
    gpytorch = library('gpytorch', 'the exact GP')
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:NUM_FIRST_FIT]
    starts = []
    for nu in SMOOTHNESS:
        for length in (0.3, 1.0):
            model = _gpytorch_model(gpytorch, x[some], y[some], nu, length)
            starts.append((_maximize_evidence(gpytorch, model, 50), nu, model))
    _, nu, best = max(starts, key=lambda start: start[0])
    model = _gpytorch_model(gpytorch, x, y, nu, 1.0)
    model.load_state_dict(best.state_dict())
    if len(x) > len(some):
        _maximize_evidence(gpytorch, model, 20)
    model.eval()

    def predict(x_target):
        with torch.no_grad(), gpytorch.settings.max_cholesky_size(10**9):
            found = model.likelihood(model(torch.as_tensor(x_target)))
            return found.mean.numpy(), found.variance.sqrt().numpy()

    return predict


def _gpytorch_model(gpytorch, x, y, nu, length):
    class Model(gpytorch.models.ExactGP):
        def __init__(self):
            noise = gpytorch.constraints.GreaterThan(LEAST_NOISE_VARIANCE)
            likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=noise)
            super().__init__(x, y, likelihood)
            self.mean = gpytorch.means.ConstantMean()
            self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu))

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    model = Model().double()
    model.mean.constant = y.mean()
    model.kernel.base_kernel.lengthscale = length
    model.kernel.outputscale = y.var()
    model.likelihood.noise = 1e-3
    return model.train()


def _maximize_evidence(gpytorch, model, max_iter):
    """Change the model's hyperparameters, and return their log evidence per point."""
    evidence = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=max_iter, line_search_fn='strong_wolfe'
    )

    def loss():
        optimizer.zero_grad()
        value = -evidence(model(*model.train_inputs), model.train_targets)
        value.backward()
        return value

    with gpytorch.settings.max_cholesky_size(10**9):
        optimizer.step(loss)
        with torch.no_grad():
            return float(evidence(model(*model.train_inputs), model.train_targets))


def vecchia_gp(x, y) -> Callable:
    """
    Fit a Vecchia GP (gpboost): Matern-3/2 or -5/2, the better by its likelihood.
    """
    gpboost = library('gpboost', 'the Vecchia GP')
    fits = []
    for nu in SMOOTHNESS:
        model = gpboost.GPModel(
            gp_coords=x,
            cov_function='matern',
            cov_fct_shape=nu,
            gp_approx='vecchia',
            num_neighbors=min(NUM_NEIGHBORS, len(x) - 1),
            num_parallel_threads=torch.get_num_threads(),
        )
        model.fit(y=y, X=np.ones((len(x), 1)))
        fits.append((model.get_current_neg_log_likelihood(), nu, model))
    best = min(fits, key=lambda fit: fit[0])[2]

    def predict(x_target):
        found = best.predict(
            gp_coords_pred=x_target, X_pred=np.ones((len(x_target), 1)), predict_var=True
        )
        return found['mu'], np.sqrt(found['var'])

    return predict


def local_gp(x, y) -> Callable:
    """
    Fit a GP that predicts from the nearest 64 observations.
    """
    return _folded(stream_peers.LocalGP(_kernel(x, y), float(np.mean(y))), x, y)


def sparse_gp(x, y) -> Callable:
    """
    Fit a sparse GP (FITC) and fold the observations a few at a time.
    """
    inducing = x if len(x) <= NUM_INDUCING else inducing_points(x, NUM_INDUCING)
    return _folded(stream_peers.OnlineSparseGP(_kernel(x, y), inducing, float(np.mean(y))), x, y)


def local_basis_filter(x, y) -> Callable:
    """
    Fold the observations into the filter of Viset et al., a few at a time.
    """
    kernel = _kernel(x, y, support_lengths=2.0)
    spacing = kernel.support / 12
    return _folded(stream_peers.LocalBasisFilter(kernel, spacing, 2, float(np.mean(y))), x, y)


def random_features(x, y, seed: int = 0) -> Callable:
    """
    Regress on random Fourier features (Rahimi and Recht 2007) of the fitted covariance.

    Scale and noise are fitted once more, by the evidence of the features: these are too few for
    the noise of the GP, with which they would claim to know what they cannot represent.
    """
    kernel, offset = _kernel(x, y), float(np.mean(y))
    frequency = spectral_sample(kernel, NUM_FREQUENCIES, np.random.default_rng(seed))

    def features(x):
        phase = x @ frequency.T
        return np.concatenate([np.cos(phase), np.sin(phase)], 1) / NUM_FREQUENCIES**0.5

    linalg = library('scipy.linalg', 'regression on random features')
    some = np.random.default_rng(0).permutation(len(x))[:NUM_FIT]
    scale, noise = scale_and_noise(features(x[some]), y[some] - offset)
    precision, information = np.eye(2 * NUM_FREQUENCIES), 0.0
    for start in range(0, len(x), BATCH):
        part = features(x[start : start + BATCH]) * scale / noise
        precision += part.T @ part
        information = information + part.T @ (y[start : start + BATCH] - offset) / noise
    factor = np.linalg.cholesky(precision)
    weights = linalg.cho_solve((factor, True), information)

    def predict(x_target):
        asked = features(x_target) * scale
        known = linalg.solve_triangular(factor, asked.T, lower=True)
        return offset + asked @ weights, np.sqrt((known**2).sum(0) + noise**2)

    return predict


def scale_and_noise(features, y) -> tuple[float, float]:
    """
    Return the scale of weights and the noise that have the largest evidence, on a grid.

    :param features: (n, num_features).
    :param y: (n,).
    """
    values, vectors = np.linalg.eigh(features @ features.T)
    squares = (vectors.T @ y) ** 2
    best = None
    for ratio in np.geomspace(1e-3, 3, 60):  # noise / scale
        spectrum = np.maximum(values, 0) + ratio**2
        variance = np.mean(squares / spectrum)
        loss = np.log(spectrum).sum() + len(y) * np.log(variance)
        if best is None or loss < best[0]:
            best = loss, float(variance**0.5), float(ratio * variance**0.5)
    return best[1:]


def spectral_sample(kernel: Kernel, num: int, rng: np.random.Generator) -> np.ndarray:
    """
    Draw angular frequencies from the spectral density of a Matern covariance, (num, 2).

    It is a multivariate t distribution with 2 nu degrees of freedom.
    """
    normal = rng.standard_normal((num, 2)) / kernel.length
    return normal / np.sqrt(rng.chisquare(2 * kernel.nu, (num, 1)) / (2 * kernel.nu))


def _kernel(x, y, support_lengths=None) -> Kernel:
    sample = np.random.default_rng(0).permutation(len(x))[:NUM_FIT]
    return kernels.fit(x[sample], y[sample] - np.mean(y), support_lengths=support_lengths)


def _folded(method, x, y):
    for start in range(0, len(x), BATCH):
        method.observe(x[start : start + BATCH], y[start : start + BATCH])
    return method.predict


# Others ------------------------------------------------------------------------------------------


def kriging(x, y) -> Callable:
    """
    Fit ordinary kriging (pykrige): of the variogram models the one nearest to the binned values.
    """
    pykrige = library('pykrige.ok', 'kriging')
    fits = [
        pykrige.OrdinaryKriging(*x.T, y, variogram_model=name, nlags=NUM_LAGS, weight=True)
        for name in VARIOGRAMS
    ]

    def misfit(found):
        fitted = found.variogram_function(found.variogram_model_parameters, found.lags)
        return np.sum((fitted - found.semivariance) ** 2)

    best = min(fits, key=misfit)

    def predict(x_target):
        mean, variance = best.execute('points', *x_target.T)
        return np.asarray(mean), np.sqrt(np.maximum(variance, LEAST_NOISE_VARIANCE))

    return predict


def kalman_grid(x, y) -> Callable:
    """
    Fill a grid of scalar Kalman filters, its cells of the size that predicts left-out ones best.
    """
    fold = np.random.default_rng(0).permutation(len(x)) % FOLDS

    def fit(cell_size, x, y):
        spread = max(stream_peers.spread_in_cells(x, y, cell_size), 1e-3 * float(np.std(y)))
        grid = stream_peers.KalmanGrid(cell_size, spread, float(np.mean(y)), float(np.std(y)))
        grid.observe(x, y)
        return grid.predict

    def left_out(cell_size):
        return sum(
            score(
                *fit(cell_size, x[fold != k], y[fold != k])(x[fold == k]), y[fold == k]
            ).log_likelihood
            for k in range(FOLDS)
        )

    return fit(max(CELL_SIZES, key=left_out), x, y)


def linear_interpolation(x, y) -> Callable:
    """
    Find the one stddev of linear interpolation: the error at observations that are left out.
    """
    stddev = stream_peers.linear_interpolation(x, y, x[:1])[1][0]
    return lambda x_target: (
        stream_peers.interpolate(x, y, x_target),
        np.full(len(x_target), stddev),
    )


# Networks: what takes time is loaded when they are first called ----------------------------------


def _convcnp(folder):
    loaded = []

    def fit(x, y):
        if not loaded:
            loaded.append(convcnp.trained(folder))
        return lambda x_target: loaded[0](x, y, x_target)  # its encoder knows the targets

    return fit


def ours_in_tiles(checkpoint: str, tile_size: float) -> Callable:
    """
    Return our default map as `fit`.
    """
    make = []

    def fit(x, y):
        if not make:
            make.append(ours.stream(checkpoint, tile_size))
        field = make[0]()
        field.observe(x, y)
        return lambda x_target: tuple(v[:, 0] for v in field.predict(x_target))

    return fit
