"""Access: names of the server, the token and its cookie, and the headers of every answer."""

import socket
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from watched_runs import make_run

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.watching.access import Access, checked_token
from fedsmoothlora.watching.confined import WatchedFolder
from fedsmoothlora.watching.pages import Pages

TOKEN = "a-token-of-some-length"


def client(folder: Path, access: Access, **options: object) -> TestClient:
    app = Pages(WatchedFolder(folder)).app(access)
    return TestClient(app, base_url="http://127.0.0.1:8090", follow_redirects=False, **options)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_run(tmp_path / "a")
    return tmp_path


@pytest.fixture
def local(folder: Path) -> TestClient:
    return client(folder, Access(host="127.0.0.1", is_local=True, token=None))


@pytest.fixture
def with_token(folder: Path) -> TestClient:
    return client(folder, Access(host="0.0.0.0", is_local=False, token=TOKEN))


@pytest.mark.parametrize(
    ("header", "at_home", "elsewhere"),
    [
        ("127.0.0.1", True, True),
        ("127.0.0.1:8090", True, True),
        ("localhost:1", True, True),
        ("LOCALHOST.", True, True),
        ("[::1]:8090", True, True),
        ("192.0.2.7:8090", False, True),
        ("[2001:db8::1]", False, True),
        ("fl.example.org", False, True),
        ("evil.example", False, False),
        ("localhost.evil.example", False, False),
        ("127.0.0.1.evil.example", False, False),
        ("", False, False),
        ("127.0.0.1:8090:1", False, False),
        ("evil.example@127.0.0.1", False, False),
        ("[::1", False, False),
        ("127.0.0.1/..", False, False),
    ],
)
def test_the_host_must_be_a_name_of_this_machine(header: str, at_home: bool, elsewhere: bool) -> None:
    assert Access(host="127.0.0.1", is_local=True, token=None).is_known_host(header) is at_home
    assert Access(host="fl.example.org", is_local=False, token=TOKEN).is_known_host(header) is elsewhere


def test_the_own_name_of_the_machine_is_known() -> None:
    assert Access(host="0.0.0.0", is_local=False, token=TOKEN).is_known_host(f"{socket.gethostname()}:80")


def test_a_request_with_another_host_reads_nothing(local: TestClient) -> None:
    for address in ("/", "/run?id=a", "/live.js", "/events/list"):
        answer = local.get(address, headers={"host": "evil.example"})
        assert answer.status_code == 421
        assert "a" not in answer.text.split()
    assert local.get("/", headers=[("host", "127.0.0.1"), ("host", "evil.example")]).status_code == 421


@pytest.mark.parametrize("address", ["/", "/run?id=a", "/compare?id=a", "/live.js", "/no", "/run?id=no"])
def test_every_answer_has_the_headers_of_safety(local: TestClient, address: str) -> None:
    headers = local.get(address).headers
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "http" not in policy
    assert "frame-ancestors 'none'" in policy
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_pages_can_only_be_read(local: TestClient, method: str) -> None:
    for address in ("/", "/run?id=a", "/events/list"):
        assert local.request(method, address).status_code == 405


def test_without_the_token_nothing_is_shown(with_token: TestClient) -> None:
    for address in (
        "/",
        "/run?id=a",
        "/live.js",
        "/events/list",
        "/?token=",
        f"/?token={TOKEN}x",
        "/?token=ü",
    ):
        answer = with_token.get(address)
        assert answer.status_code == 401
        assert "set-cookie" not in answer.headers
        assert TOKEN not in answer.text


def test_the_token_is_shown_once_and_a_cookie_takes_its_place(with_token: TestClient) -> None:
    answer = with_token.get(f"/?token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert TOKEN not in cookie
    answer = with_token.get("/")
    assert answer.status_code == 200
    assert TOKEN not in answer.text


def test_a_wrong_cookie_is_refused(with_token: TestClient) -> None:
    with_token.cookies.set("fedsmoothlora-watch", TOKEN)
    assert with_token.get("/").status_code == 401


def test_the_token_leads_nowhere_else(with_token: TestClient) -> None:
    answer = with_token.get(f"http://127.0.0.1:8090//evil.example/?token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")


def test_tokens_are_long_and_made_where_they_are_needed() -> None:
    assert checked_token(None, is_local=True) is None
    made = checked_token(None, is_local=False)
    assert made is not None
    assert len(made) > 40
    assert made != checked_token(None, is_local=False)
    assert checked_token(TOKEN, is_local=True) == TOKEN
    for short in ("", "short", "ü" * 20, "a\n" * 20):
        with pytest.raises(ConfigError, match="16 printable"):
            checked_token(short, is_local=False)
