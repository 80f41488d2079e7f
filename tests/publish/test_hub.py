"""What is known of a repository, and how long a Hub is waited for; the rest is in
test_publish.py."""

from hashlib import sha256

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from loop.errors import HubError
from loop.publish.hub import Hub, Remote, with_retries

HUB = Hub(HfApi(token="hf_secret"), "hf_secret", "anna")


def refused(status: int, message: str = "", **headers: str) -> HfHubHTTPError:
    response = httpx2.Response(
        status, headers=headers, request=httpx2.Request("GET", "http://127.0.0.1/")
    )
    return HfHubHTTPError("no", response=response, server_message=message)


class Failing:
    """Raises these one after the other, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def test_files_are_compared_by_git_s_hash_or_by_sha256() -> None:
    # `printf 'hello\n' | git hash-object --stdin`
    remote = Remote(
        True,
        "c",
        {"a": "ce013625030ba8dba906f756967f9e9ca394464a", "b": sha256(b"large").hexdigest()},
    )
    assert remote.holds({"a": b"hello\n", "b": b"large"})
    assert remote.holds({})
    assert not remote.holds({"a": b"hello"})
    assert not remote.holds({"b": b"larger"})
    assert not remote.holds({"c": b""})


def test_failure_that_passes_is_waited_out_with_a_line_each(
    waits: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    call = Failing(
        refused(503, "over capacity"),
        httpx2.ConnectError("refused"),
        refused(429, **{"Retry-After": "9"}),
    )
    assert with_retries(HUB, "look", call) == "done"
    assert waits == [1, 2, 9]
    assert capfd.readouterr().err.splitlines() == [
        "look: the Hub answered 503 (over capacity); again in 1 s",
        "look: no connection (ConnectError: refused); again in 2 s",
        "look: the Hub answered 429; again in 9 s",
    ]


def test_patience_ends(waits: list[float]) -> None:
    with pytest.raises(HubError, match="look: the Hub answered 502; run the same command again"):
        with_retries(HUB, "look", Failing(*(refused(502) for _ in range(9))))
    assert waits == [1, 2, 4]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 501])
def test_refusal_is_not_repeated(status: int, waits: list[float]) -> None:
    with pytest.raises(HubError, match=f"look: the Hub answered {status}"):
        with_retries(HUB, "look", Failing(refused(status)))
    assert waits == []


def test_wrong_certificate_is_not_tried_again(waits: list[float]) -> None:
    with pytest.raises(HubError, match="CERTIFICATE_VERIFY_FAILED"):
        with_retries(
            HUB, "look", Failing(httpx2.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] expired"))
        )
    assert waits == []


def test_token_in_an_answer_is_never_repeated() -> None:
    with pytest.raises(HubError) as error:
        with_retries(HUB, "look", Failing(refused(400, "bad header Bearer hf_secret")))
    assert "hf_secret" not in str(error.value)
    assert "Bearer ****" in str(error.value)


def test_expected_exception_is_handed_on(waits: list[float]) -> None:
    with pytest.raises(HfHubHTTPError):
        with_retries(HUB, "look", Failing(refused(404)), HfHubHTTPError)
