"""`helm test`'s program: it waits for the operator, and says what it answered."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from btx_api.names import SETTINGS_ENV
from btx_operator.cluster import check


@pytest.fixture
def pages() -> Iterator[tuple[str, list[int]]]:
    """A server's URL, and the codes of its next answers; 200 when there are no more."""
    codes: list[int] = []

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(codes.pop(0) if codes else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/readyz", codes
        server.shutdown()


def test_it_waits_until_the_operator_is_ready(pages: tuple[str, list[int]]) -> None:
    """A Service without endpoints and an operator that lists both become well in a moment."""
    url, codes = pages
    codes += [503]

    assert check.ready(url, seconds=30) == ""
    assert codes == []


def test_it_says_what_the_operator_answered(pages: tuple[str, list[int]]) -> None:
    """Once its time is over."""
    url, codes = pages
    codes += [503]

    assert "503" in check.ready(url, seconds=0)
    assert "refused" in check.ready("http://127.0.0.1:1/readyz", seconds=0)


def test_a_proxy_of_the_pod_is_not_asked(
    pages: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Service is inside of the cluster."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")

    assert check.ready(pages[0], seconds=0) == ""


def test_without_a_cluster_it_fails_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    """Not with a traceback."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv(SETTINGS_ENV, json.dumps({"trainerImage": "x"}))

    assert check.main("http://127.0.0.1:1/readyz") == 1
    assert capsys.readouterr().out.startswith("rights: 0 NoCluster")
