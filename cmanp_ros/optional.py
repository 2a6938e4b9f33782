"""Libraries that only some commands use, imported when they are needed."""

from importlib import import_module

from cmanp_ros.core.errors import CMANPError

DISTRIBUTIONS = {
    'sklearn': 'scikit-learn',
    'distributed': "'dask[distributed]'",
}  # module -> what pip calls it, where that is something else


def library(name: str, purpose: str):
    """
    Import a module of a library that is not required to run.

    :param name: of the module, such as 'scipy.spatial'.
    :param purpose: what needs it, for the message.
    :return: the module.
    :raises CMANPError: where it is not installed.
    """
    top = name.split('.')[0]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or '').split('.')[0] != top:
            raise
        raise CMANPError(
            f'{purpose} needs {top}, which is not installed: '
            f'pip install {DISTRIBUTIONS.get(top, top)}'
        ) from error
