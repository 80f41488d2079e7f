"""The Hub, as publishing needs it: look, send one commit, fetch it back. Nothing is deleted."""

import errno
import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    Discussion,
    HfApi,
    ModelCard,
    constants,
    get_token,
    hf_hub_download,
    set_client_factory,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from loop.errors import DISK_IS_FULL, EnvironmentFault, HubError, LoopError

Answer = TypeVar("Answer")
WAITS = (1.0, 2.0, 4.0)
"""Seconds before each retry. The client itself repeats uploads and downloads, five times."""
LONGEST_WAIT = 300.0
"""Seconds; where the Hub asks for more patience than this, the user decides."""
TIMEOUT = 60.0
"""Seconds without a byte, in either direction. The client's own default is to wait for ever."""
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_DISK = DISK_IS_FULL | {errno.EACCES}
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Hub:
    """The client, and whose token it uses: passed to each call, never kept in the environment."""

    api: HfApi
    token: str
    user: str


@dataclass(frozen=True)
class Remote:
    """A repository and one of its branches, as they were when looked at."""

    private: bool
    head: str | None  # commit; None while the branch is not there
    oids: dict[str, str]  # file -> sha256 where it is stored as a large file, git's sha1 otherwise

    def holds(self, files: dict[str, bytes]) -> bool:
        """Whether each of these files is there, with these bytes."""
        return all(
            self.oids.get(name) in (hashlib.sha256(c).hexdigest(), _git_oid(c))
            for name, c in files.items()
        )


@dataclass(frozen=True)
class Sent:
    """Where the files are: a commit, and the pull request that it is in, if it is in one."""

    commit: str
    pull_request: str | None = None  # its address


def connect() -> Hub:
    """Find the token and ask the Hub whose it is. Raises: HubError."""
    if constants.is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set: publishing needs the network; unset it")
    hint = "hf auth login, or set HF_TOKEN"
    try:
        token = get_token()
    except Exception as error:  # a file that is no text, a failed exchange: of no common kind
        raise HubError(f"the token cannot be read: {type(error).__name__}; {hint}") from None
    if token is None:
        raise HubError(f"no token: publishing needs one that may write; {hint}")
    if not re.fullmatch(r"[\x21-\x7e]+", token):  # the client would quote it in its complaint
        reason = "the token holds characters that no token has"
        raise HubError(f"{reason}; copy it again: {hint}")
    set_client_factory(_client)
    for module in ("utils._http", "file_download"):
        logging.getLogger(f"huggingface_hub.{module}").filters = [_RetryLog(token)]
    hub = Hub(HfApi(token=token), token, "")
    about = with_retries(hub, "ask whose token it is", lambda: _whoami(hub.api))
    if about["role"] == "read":
        raise HubError(
            f"the token of {about['name']} may only read; make one that may write: hf auth login"
        )
    return replace(hub, user=about["name"])


def look(hub: Hub, repo_id: str, revision: str | None) -> Remote | None:
    """What is at a branch (None: main) now; None where there is no such repository.

    A branch that is not there yet has main's files, which it will begin with, and no head.
    Raises: HubError."""
    what = f"look at {repo_id}{f', {revision}' if revision else ''}"

    def ask(branch: str | None) -> Remote:
        info = hub.api.model_info(repo_id, revision=branch, files_metadata=True)
        if getattr(info, "disabled", False):
            raise HubError(f"{repo_id} is disabled on the Hub")
        if not _COMMIT.fullmatch(info.sha or ""):
            raise HubError(f"{what}: the Hub answered without a commit")
        oids = {
            file.rfilename: (file.lfs.sha256 if file.lfs else file.blob_id) or ""
            for file in info.siblings or []
        }
        return Remote(bool(info.private), info.sha, oids)

    try:
        return with_retries(
            hub, what, lambda: ask(revision), RepositoryNotFoundError, RevisionNotFoundError
        )
    except GatedRepoError as error:
        raise _hub_error(hub, what, error) from None
    except RepositoryNotFoundError:
        return None
    except RevisionNotFoundError:
        return replace(with_retries(hub, what, lambda: ask(None)), head=None)


def create(hub: Hub, repo_id: str, public: bool) -> None:
    """Make the repository; one that is there already is left as it is.

    Raises: HubError, and then there is none."""
    with_retries(
        hub,
        f"create {repo_id}",
        lambda: hub.api.create_repo(repo_id, private=not public, exist_ok=True),
    )


def create_branch(hub: Hub, repo_id: str, branch: str) -> None:
    """Make a branch where main is."""
    with_retries(
        hub,
        f"branch {branch}",
        lambda: hub.api.create_branch(repo_id, branch=branch, exist_ok=True),
    )


def check_card(hub: Hub, card: str) -> None:
    """Let the Hub read the card's metadata before anything is made there.

    Raises: HubError with what it dislikes."""
    with_retries(hub, "check the card's metadata", lambda: ModelCard(card).validate())


def open_pull_request(hub: Hub, repo_id: str, files: dict[str, bytes]) -> Sent | None:
    """An open pull request by this user that already holds these files."""

    def ask() -> list[Discussion]:
        requests = hub.api.get_repo_discussions(
            repo_id, author=hub.user, discussion_type="pull_request", discussion_status="open"
        )
        return list(requests)

    for request in with_retries(hub, f"pull requests of {repo_id}", ask):
        remote = look(hub, repo_id, f"refs/pr/{request.num}")
        if remote is not None and remote.head is not None and remote.holds(files):
            return Sent(remote.head, f"{hub.api.endpoint}/{repo_id}/discussions/{request.num}")
    return None


def commit(
    hub: Hub,
    repo_id: str,
    files: dict[str, bytes],
    parent: Remote,
    revision: str | None,
    create_pr: bool,
    message: str,
) -> Sent:
    """Send files as one commit on `parent`.

    An answer that was lost may stand for a commit that is there: after each failure it is looked
    for first. Raises: HubError; then nothing was committed, or it says that this is not known."""
    what = f"commit to {repo_id}"
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    for wait in (*WAITS, None):
        try:
            sent = hub.api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent.head,
            )
            if not _COMMIT.fullmatch(sent.oid):
                raise HubError(f"{what}: the Hub answered without a commit")
            return Sent(sent.oid, sent.pr_url)
        except Exception as error:  # what a client may raise on a bad answer has no common kind
            inner = error.__cause__
            cause = inner if inner and isinstance(error, RuntimeError) else error
            there = _landed(hub, repo_id, files, parent, revision, create_pr, cause)
            if there is not None:
                return there
            status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
            conflict = status in (409, 412)
            if wait is None or not (conflict or _is_passing(cause)):
                raise _hub_error(hub, what, cause, "; nothing was committed") from None
            _pause(hub, what, cause, wait)
    raise AssertionError("unreachable")


def _landed(
    hub: Hub, repo_id: str, files: dict[str, bytes], parent: Remote,
    revision: str | None, create_pr: bool, error: BaseException,
) -> Sent | None:  # fmt: skip
    """The commit that a failed call may have left; None if it has left none.

    Raises: HubError if that is not known."""
    try:
        there = open_pull_request(hub, repo_id, files) if create_pr else None
        now = look(hub, repo_id, revision)
    except HubError as unknown:
        state = f"commit to {repo_id}: {_what_happened(hub, error)}"
        state += f"; whether it is there is not known: {unknown}"
        raise HubError(f"{state}; run the same command again: it looks before it sends") from None
    if not create_pr and now is not None and now.head is not None and now.holds(files):
        there = Sent(now.head)
    if there is None and (now is None or now.head != parent.head):
        moved = f"it was at {parent.head} when this was planned, and is at {now and now.head}"
        raise HubError(
            f"{repo_id} has moved: {moved}; look at its history, then run it again"
        ) from None
    return there


def tag_commit(hub: Hub, repo_id: str, tag: str, commit: str) -> None:
    """Name a commit. Raises: HubError if afterwards the name does not stand for it."""
    with_retries(
        hub,
        f"tag {tag}",
        lambda: hub.api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True),
    )
    if tagged(hub, repo_id, tag) != commit:
        raise HubError(
            f"--tag: {tag} does not stand for {commit}; choose another name and run it again"
        )


def tagged(hub: Hub, repo_id: str, tag: str) -> str | None:
    """The commit that a tag stands for."""
    refs = with_retries(hub, f"tags of {repo_id}", lambda: hub.api.list_repo_refs(repo_id))
    return next((str(ref.target_commit) for ref in refs.tags if ref.name == tag), None)


def fetch(hub: Hub, repo_id: str, name: str, commit: str | None, folder: Path) -> Path | None:
    """One file as the Hub serves it, through a cache in `folder`; None where it has none.

    Raises: HubError."""

    def download() -> str:
        return hf_hub_download(repo_id, name, revision=commit, token=hub.token, cache_dir=folder)

    what = f"download {name} of {repo_id}"
    try:
        return Path(with_retries(hub, what, download, EntryNotFoundError))
    except EntryNotFoundError:
        return None


def with_retries(
    hub: Hub, what: str, call: Callable[[], Answer], *expected: type[Exception]
) -> Answer:
    """Call; after a failure that may pass, retry a few times, each with a line on stderr.

    Raises: HubError in one sentence, without the client's own words behind it, which may quote an
    address with its signature; exceptions of the `expected` kinds as they are; EnvironmentFault if
    this machine's disk refuses."""
    for wait in (*WAITS, None):
        try:
            return call()
        except LoopError:
            raise
        except Exception as error:  # what a client may raise on a bad answer has no common kind
            # What a download makes of a failed connection.
            lost = isinstance(error, LocalEntryNotFoundError)
            if isinstance(error, expected) and not lost:
                raise
            cause = error.__cause__ if lost and error.__cause__ is not None else error
            if isinstance(cause, OSError) and cause.errno in _DISK:
                hint = "free some space, or set TMPDIR"
                raise EnvironmentFault(f"{what}: {cause.strerror}; {hint}") from None
            if wait is None or not _is_passing(cause):
                raise _hub_error(hub, what, cause) from None
            _pause(hub, what, cause, wait)
    raise AssertionError("unreachable")


def _whoami(api: HfApi) -> dict[str, str]:
    about = api.whoami()
    token = about.get("auth", {}).get("accessToken", {})
    return {"name": str(about["name"]), "role": str(token.get("role"))}


def _client() -> httpx2.Client:
    return httpx2.Client(
        follow_redirects=True, timeout=TIMEOUT, event_hooks={"response": [_refuse_long_waits]}
    )


def _refuse_long_waits(response: httpx2.Response) -> None:
    """The client waits for as long as it is asked to. Raises: HubError above LONGEST_WAIT."""
    wait = _requested_wait(response)
    if wait > LONGEST_WAIT:
        raise HubError(f"the Hub asks to be left alone for {wait:g} s; run it again then")


def _requested_wait(response: httpx2.Response) -> float:
    seconds = response.headers.get("Retry-After", "")
    return float(seconds) if re.fullmatch(r"[0-9]{1,9}", seconds) else 0.0


def _is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING
    if "certificate" in str(error).lower():
        return False
    torn = isinstance(error, OSError) and error.errno is None  # a download that ended early
    store = type(error) is RuntimeError  # hf_xet's, of a store that cannot be reached
    return torn or store or isinstance(error, (httpx2.TransportError, json.JSONDecodeError))


def _pause(hub: Hub, what: str, error: BaseException, wait: float) -> None:
    wait = max(wait, _requested_wait(error.response)) if isinstance(error, HfHubHTTPError) else wait
    print(f"{what}: {_what_happened(hub, error)}; again in {wait:g} s", file=sys.stderr, flush=True)
    time.sleep(wait)


def _what_happened(hub: Hub, error: BaseException) -> str:
    """What happened, in a few words, and never with the token."""
    kind, lines = type(error).__name__, str(error).splitlines()
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, (error.server_message or "").splitlines()
        words = f"the Hub answered {status}{f' ({said[0][:200]})' if said else ''}"
    elif isinstance(error, httpx2.TransportError):
        words = f"no connection ({kind}: {(lines or ['lost'])[0][:200]})"
    elif isinstance(error, HubError):
        words = str(error)
    else:
        words = f"an answer that cannot be read ({kind}: {(lines or [''])[0][:200]})"
    return _without_secrets(words, hub.token)


def _hub_error(hub: Hub, what: str, error: BaseException, state: str = "") -> HubError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    token = f"this token{f' of {hub.user}' if hub.user else ''}"
    again = "run the same command again: it looks before it sends" if _is_passing(error) else ""
    hints = {
        401: "the token is wrong or expired; log in again: hf auth login",
        403: f"{token} may not do that; take one that may write there",
        404: "is the name right, and may this token see it?",
    }
    hint = hints.get(status or 0, again)
    if isinstance(error, GatedRepoError):
        hint = "it is gated: ask for access on its page"
    return HubError(f"{what}: {_what_happened(hub, error)}{state}{'; ' if hint else ''}{hint}")


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _without_secrets(words: str, token: str) -> str:
    """Without the token, and without the query of an address, which for an upload is a password."""
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", words.replace(token, "****"))


class _RetryLog(logging.Filter):
    """Says plainly what the client logs of a repeated request."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token

    def filter(self, record: logging.LogRecord) -> bool:
        print(_without_secrets(record.getMessage(), self._token), file=sys.stderr, flush=True)
        return False
