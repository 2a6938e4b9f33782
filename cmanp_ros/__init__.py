"""
Constant Memory Attentive Neural Processes for ROS 2.

The modules here and the generated ``cmanp_ros.msg`` and ``cmanp_ros.srv`` make one package, also
where they lie in different directories: in the source tree, and installed by links.
"""

import os.path
import pkgutil

# Installed by links (`make setup`, colcon build --symlink-install), this file leads to the source
# tree. That comes first, so files added since are found; extend_path adds the generated modules.
_sources = os.path.dirname(os.path.realpath(__file__))
__path__ = list(dict.fromkeys([_sources, *pkgutil.extend_path(__path__, __name__)]))


def __getattr__(name):
    if name == '__version__':
        from importlib.metadata import version

        return version('cmanp_ros')  # package.xml is where it is written down
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
