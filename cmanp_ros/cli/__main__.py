"""For `python -m cmanp_ros.cli`, as torchrun starts it: the same as `cmanp`."""

import sys

from cmanp_ros.cli import main

if __name__ == '__main__':
    sys.exit(main())
