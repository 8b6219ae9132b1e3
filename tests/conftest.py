"""What every test may use: a real S3 server, and a cache of hashes that ends with the session."""

import shutil
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path

import pytest
from cluster import kueue
from s3_server import serving

LONG = (
    "test_demo.py", "test_run.py",
    "test_chaos_faults.py", "test_upgrade.py", "test_features_seen.py", "test_chaos_kills.py",
    "test_features_runs.py", "test_trajectory.py", "test_chaos_vanished.py",
    "test_features_pods.py", "test_monitoring.py", "test_crd.py", "test_soak.py", "test_cli.py",
    "test_chaos_two.py", "test_features_restart.py", "test_rbac.py", "e2e",
)  # fmt: skip
"""Files, and folders of files, that take minutes; who has one with few tests is given another at
once, which waits: so short files come between (played with the measured times, 477 -> 438 s)."""


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an S3 server of this session."""
    with serving(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


@pytest.fixture(autouse=True, scope="session")
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What killed processes leave in the temporary folder, gigabytes of models, ends too."""
    tmp_path_factory.getbasetemp()  # pytest's own is beside it, not in it
    folder = Path(tempfile.mkdtemp(prefix="btx-tests-"))
    folder.chmod(0o1777)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", str(folder))
        yield
    # After multiprocessing's own folder, which it looks for at its end (priority -100).
    Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=-200)


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hashes of files are kept for this session only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_configure() -> None:
    """Programs that tests start and interrupt hear SIGINT, even if a shell began us in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes begin first, so that none is left alone at the end."""
    rank = {name: number for number, name in enumerate(LONG)}
    rest = len(LONG)
    items.sort(key=lambda item: rank.get(item.path.name, rank.get(item.path.parent.name, rest)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which real part a test did without."""
    passed = terminalreporter.stats.get("passed", ())
    if kueue.missing() and any("test_features_kueue" in report.nodeid for report in passed):
        terminalreporter.section("LEFT OUT: a real Kueue", red=True, bold=True)
        terminalreporter.line(
            f"{kueue.missing()} not in the environment; a field manager of the test took its place"
        )
