"""
Run all tests: the unit tests together, each file of integration tests in a process of its own.

ROS keeps state per process; a file that hangs or crashes must not take the others along.
"""

import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path
from subprocess import call

TEST = Path(__file__).parent.parent / 'test'
PYTEST = Path(sys.executable).parent / 'pytest'  # python -m pytest would import ./launch


def run(tests, report):
    """
    Run pytest on a path.

    :return: whether it failed, and the numbers of tests passed and skipped.
    """
    print(f'\n== {tests.relative_to(TEST.parent)}', flush=True)
    failed = call([PYTEST, '-q', '-rs', f'--junitxml={report}', tests], cwd=TEST.parent) != 0
    if not report.exists():
        return True, 0, 0
    suite = xml.etree.ElementTree.parse(report).find('testsuite')
    total, *not_passed = (int(suite.get(k)) for k in ('tests', 'failures', 'errors', 'skipped'))
    return failed, total - sum(not_passed), not_passed[-1]


def main():
    """Run everything, print the totals, and fail if anything did."""
    folders = [TEST / name for name in ('unit', 'regression') if (TEST / name).is_dir()]
    failures, passed, skipped = [], 0, 0
    with tempfile.TemporaryDirectory() as reports:
        for tests in [*folders, *sorted((TEST / 'integration').glob('test_*.py'))]:
            failed, *counts = run(tests, Path(reports) / f'{tests.name}.xml')
            passed, skipped = passed + counts[0], skipped + counts[1]
            failures += [str(tests.relative_to(TEST.parent))] if failed else []
    print(f'\n== in total {passed} passed, {skipped} skipped')
    for name in failures:
        print(f'== FAILED: {name}')
    return 1 if failures else 0


sys.exit(main())
