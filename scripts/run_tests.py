"""
Run all tests: the unit tests together, each file of integration tests in a process of its own.

ROS keeps state per process; a file that hangs or crashes must not take the others along. Several
run at once, but for those that put a load on the machine themselves.
"""

import os
import sys
import tempfile
import time
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from subprocess import PIPE, STDOUT, run

TEST = Path(__file__).parent.parent / 'test'
PYTEST = Path(sys.executable).parent / 'pytest'  # python -m pytest would import ./launch
ALONE = ('test_crash.py', 'test_demo.py', 'test_overload.py', 'test_soak.py')
AT_ONCE = max(1, min(4, os.cpu_count() or 1))


def result(tests, report):
    """
    Run pytest on a path, and print what it printed.

    :return: whether it failed, and the numbers of tests passed and skipped.
    """
    started = time.monotonic()
    done = run(
        [PYTEST, '-q', '-rs', f'--junitxml={report}', tests],
        cwd=TEST.parent,
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
        errors='replace',
    )
    seconds = time.monotonic() - started
    print(f'\n== {tests.relative_to(TEST.parent)} ({seconds:.0f} s)\n{done.stdout}', flush=True)
    if not report.exists():
        return True, 0, 0
    suite = xml.etree.ElementTree.parse(report).find('testsuite')
    total, *not_passed = (int(suite.get(k)) for k in ('tests', 'failures', 'errors', 'skipped'))
    return done.returncode != 0, total - sum(not_passed), not_passed[-1]


def main():
    """Run everything, print the totals, and fail if anything did."""
    folders = [TEST / name for name in ('unit', 'regression') if (TEST / name).is_dir()]
    files = sorted((TEST / 'integration').glob('test_*.py'))
    together = [*folders, *(path for path in files if path.name not in ALONE)]
    failures, passed, skipped = [], 0, 0
    with tempfile.TemporaryDirectory() as reports:
        for batch, at_once in ((together, AT_ONCE), ([p for p in files if p.name in ALONE], 1)):
            with ThreadPoolExecutor(at_once) as pool:
                jobs = {
                    pool.submit(result, tests, Path(reports) / f'{tests.name}.xml'): tests
                    for tests in batch
                }
                for job in as_completed(jobs):
                    failed, *counts = job.result()
                    passed, skipped = passed + counts[0], skipped + counts[1]
                    failures += [str(jobs[job].relative_to(TEST.parent))] if failed else []
    print(f'\n== in total {passed} passed, {skipped} skipped')
    for name in sorted(failures):
        print(f'== FAILED: {name}')
    return 1 if failures else 0


sys.exit(main())
