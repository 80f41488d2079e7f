"""The Hub, as a publication needs it: look, send one commit, fetch it back. Nothing here deletes anything."""

import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    Discussion,
    HfApi,
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

from loop.errors import HubError

Answer = TypeVar("Answer")
WAITS = (1.0, 2.0, 4.0)
"""Seconds before each further attempt. The client itself repeats uploads and downloads, five times."""
LONGEST_WAIT = 300.0
"""Seconds; where the Hub asks for more patience than this, the user decides."""
TIMEOUT = 60.0
"""Seconds without a byte, in either direction. The client's own default is to wait for ever."""
_PASSING = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Hub:
    """The client, and whose token it uses. The token is passed to each call and never kept in the environment."""

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
        return all(self.oids.get(name) in (hashlib.sha256(c).hexdigest(), _git_oid(c)) for name, c in files.items())


def connect() -> Hub:
    """Find the token and ask the Hub whose it is. Raises: HubError."""
    if constants.is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set: publishing needs the network; unset it")
    token = get_token()
    if token is None:
        raise HubError("no token: publishing needs one that may write; hf auth login, or set HF_TOKEN")
    if not re.fullmatch(r"[\x21-\x7e]+", token):  # the client would quote it in its complaint
        raise HubError("the token holds characters that no token has; copy it again: hf auth login, or set HF_TOKEN")
    set_client_factory(lambda: httpx2.Client(follow_redirects=True, timeout=TIMEOUT))
    for module in ("utils._http", "file_download"):
        logging.getLogger(f"huggingface_hub.{module}").addFilter(_say_it_plainly)
    hub = Hub(HfApi(token=token), token, "")
    about = patiently(hub, "who the token belongs to", hub.api.whoami)
    if about.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"the token of {about['name']} may only read; make one that may write: hf auth login")
    return Hub(hub.api, token, str(about["name"]))


def look(hub: Hub, repo_id: str, revision: str | None) -> Remote | None:
    """What is at a branch (None: main) now; None where there is no such repository. Raises: HubError."""
    asked = f"{repo_id}{f' at {revision}' if revision else ''}"

    def ask(branch: str | None) -> Remote:
        info = hub.api.model_info(repo_id, revision=branch, files_metadata=True)
        if getattr(info, "disabled", False):
            raise HubError(f"{repo_id} is disabled on the Hub")
        oids = {file.rfilename: (file.lfs.sha256 if file.lfs else file.blob_id) or "" for file in info.siblings or []}
        return Remote(bool(info.private), info.sha, oids)

    try:
        return patiently(hub, asked, lambda: ask(revision), RepositoryNotFoundError, RevisionNotFoundError)
    except GatedRepoError as error:
        raise _in_words(hub, asked, error) from error
    except RepositoryNotFoundError:
        return None
    except RevisionNotFoundError:
        return Remote(patiently(hub, repo_id, lambda: ask(None)).private, None, {})


def create(hub: Hub, repo_id: str, public: bool) -> None:
    """Make the repository; one that is there already is left as it is. Raises: HubError, and then there is none."""
    patiently(hub, f"create {repo_id}", lambda: hub.api.create_repo(repo_id, private=not public, exist_ok=True))


def create_branch(hub: Hub, repo_id: str, branch: str) -> None:
    """Make a branch where main is."""
    patiently(hub, f"branch {branch}", lambda: hub.api.create_branch(repo_id, branch=branch, exist_ok=True))


def open_pull_request(hub: Hub, repo_id: str, files: dict[str, bytes]) -> str | None:
    """The commit of an open pull request by this user that already holds these files."""

    def ask() -> list[Discussion]:
        found = hub.api.get_repo_discussions(
            repo_id, author=hub.user, discussion_type="pull_request", discussion_status="open"
        )
        return list(found)

    for request in patiently(hub, f"pull requests of {repo_id}", ask):
        remote = look(hub, repo_id, f"refs/pr/{request.num}")
        if remote is not None and remote.holds(files):
            return remote.head
    return None


def commit(
    hub: Hub, repo_id: str, files: dict[str, bytes], parent: Remote, revision: str | None, create_pr: bool, message: str
) -> str:
    """Send files as one commit on `parent`, and return its sha.

    An answer that was lost may stand for a commit that is there: after each failure it is looked for first.
    Raises: HubError; then nothing was committed, or it says that this is not known."""
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
            return str(sent.oid)
        except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            if create_pr:
                there = open_pull_request(hub, repo_id, files)
                if there is not None:
                    return there
            now = look(hub, repo_id, revision)
            if now is not None and now.holds(files) and now.head is not None and not create_pr:
                return now.head
            if now is None or now.head != parent.head:
                moved = f"it was at {parent.head} when this was planned, and is at {now and now.head}"
                raise HubError(f"{repo_id} has moved: {moved}; nothing was committed; run it again") from error
            conflict = getattr(getattr(cause, "response", None), "status_code", None) in (409, 412)
            if wait is None or not (conflict or _is_passing(cause)):
                raise _in_words(hub, f"commit to {repo_id}", cause, "; nothing was committed") from error
            _pause(hub, f"commit to {repo_id}", cause, wait)
    raise AssertionError("unreachable")


def tag_commit(hub: Hub, repo_id: str, tag: str, commit: str) -> None:
    """Name a commit; a name that there is already is left as it is."""
    patiently(hub, f"tag {tag}", lambda: hub.api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))


def tagged(hub: Hub, repo_id: str, tag: str) -> str | None:
    """The commit that a tag stands for."""
    refs = patiently(hub, f"tags of {repo_id}", lambda: hub.api.list_repo_refs(repo_id))
    return next((str(ref.target_commit) for ref in refs.tags if ref.name == tag), None)


def fetch(hub: Hub, repo_id: str, name: str, commit: str | None, folder: Path) -> bytes | None:
    """One file as the Hub serves it, through a cache in `folder`; None where it has none. Raises: HubError."""
    try:
        path = patiently(
            hub,
            f"download {name} of {repo_id}",
            lambda: hf_hub_download(repo_id, name, revision=commit, token=hub.token, cache_dir=folder),
            EntryNotFoundError,
        )
        return Path(path).read_bytes()
    except EntryNotFoundError:
        return None


def patiently(hub: Hub, what: str, call: Callable[[], Answer], *expected: type[Exception]) -> Answer:
    """Call; after a failure that may pass, again, a bounded number of times, each with a line on stderr.

    Raises: HubError in one sentence; exceptions of the `expected` kinds as they are."""
    for wait in (*WAITS, None):
        try:
            return call()
        except (httpx2.HTTPError, OSError, ValueError) as error:
            lost = isinstance(error, LocalEntryNotFoundError)  # what a download makes of a failed connection
            if isinstance(error, expected) and not lost:
                raise
            cause = error.__cause__ if lost and error.__cause__ is not None else error
            if wait is None or not _is_passing(cause):
                raise _in_words(hub, what, cause) from error
            _pause(hub, what, cause, wait)
    raise AssertionError("unreachable")


def _is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later."""
    if isinstance(error, HfHubHTTPError):
        asked = error.response.headers.get("Retry-After", "0")
        return error.response.status_code in _PASSING and (not asked.isdigit() or float(asked) <= LONGEST_WAIT)
    torn = isinstance(error, OSError) and error.errno is None  # a download that ended early
    return torn or (isinstance(error, (httpx2.TransportError, json.JSONDecodeError)) and not _is_certificate(error))


def _is_certificate(error: BaseException) -> bool:
    return "certificate" in str(error).lower()


def _pause(hub: Hub, what: str, error: BaseException, wait: float) -> None:
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    wait = max(wait, float(asked)) if asked.isdigit() else wait
    print(f"{what}: {_found(hub, error)}; again in {wait:g} s", file=sys.stderr, flush=True)
    time.sleep(wait)


def _found(hub: Hub, error: BaseException) -> str:
    """What happened, in a few words, and never with the token."""
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, (error.server_message or "").splitlines()
        words = f"the Hub answered {status}{f' ({said[0][:200]})' if said else ''}"
    else:
        words = f"{type(error).__name__}: {(str(error).splitlines() or ['no connection'])[0][:200]}"
    return words.replace(hub.token, "****")


def _in_words(hub: Hub, what: str, error: BaseException, state: str = "") -> HubError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    ways = {
        401: "the token is wrong or expired; log in again: hf auth login",
        403: f"this token{f' of {hub.user}' if hub.user else ''} may not do that; take one that may write there",
        404: "is the name right, and may this token see it?",
    }.get(status or 0, "run the same command again: it looks before it sends" if _is_passing(error) else "")
    if isinstance(error, GatedRepoError):
        ways = "it is gated: ask for access on its page"
    return HubError(f"{what}: {_found(hub, error)}{state}{'; ' if ways else ''}{ways}")


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _say_it_plainly(record: logging.LogRecord) -> bool:
    """What the client logs of a repeated request, without an address's query: for an upload it is a password."""
    print(re.sub(r"\?\S+", "", record.getMessage()), file=sys.stderr, flush=True)
    return False
