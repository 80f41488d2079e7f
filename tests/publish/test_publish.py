"""Publishing to a Hub on loopback, through the real client: what is sent, what never is, and every
fault on the way.

Most of it calls the command in this process, which spares the imports; no time passes while the
client waits."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from loop.process.command import run_command
from loop.publish.__main__ import main
from tests.conftest import flags, published_settings
from tests.loopback_hub import HUB_URL, Fault, Hub, serving
from tests.process.test_launcher import launch, user_environment

pytestmark = pytest.mark.runs
CANARY = "hf_canary0123456789abcdefghijklmnop"
SENT = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "tokenizer.json",
    "tokenizer_config.json",
}
MADE_BY_THE_HUB = {".gitattributes"}
NAMED = ("--repo_id", "anna/lora", "--base_model", "owner/base", "--license", "apache-2.0")
"""What a run on a local base needs to be told."""
FOREVER = 99


@pytest.fixture
def hub(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that knows anna, whose token may write, and has the base as owner/base."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with serving(Hub()) as server:
        server.users[CANARY] = {"name": "anna", "role": "write"}
        server.put_model("owner/base", bloom)
        yield server
    huggingface_hub.close_session()


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.rstrip().splitlines()[-1]


Publish = Callable[..., Outcome]


@pytest.fixture
def publish(
    trained: Path, waits: list[float], capfd: pytest.CaptureFixture[str]
) -> Iterator[Publish]:
    """The command on `trained`. At the end nothing it wrote anywhere holds the token."""
    seen = []

    def of(*words: str, source: Path = trained) -> Outcome:
        capfd.readouterr()
        code = run_command(lambda: main([str(source), *words]), debug="--debug" in words)
        seen.append(Outcome(code, *capfd.readouterr()))
        return seen[-1]

    yield of
    assert seen
    assert not [outcome for outcome in seen if CANARY in outcome.out + outcome.err]
    written = [
        path for path in trained.parent.rglob("*") if path.is_file() and not path.is_symlink()
    ]
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]


# What is sent.


def test_finished_run_is_published_private_in_one_commit_and_nothing_else_leaves(
    trained: Path, hub: Hub, publish: Publish
) -> None:
    done = publish(*NAMED)
    repository = hub.models["anna/lora"]
    assert done.code == 0, done.err
    assert repository.private
    assert repository.commits == 2  # the Hub's own first one, and this
    assert set(repository.files) == SENT | MADE_BY_THE_HUB
    sha = repository.branches["main"]
    assert (
        done.out.rstrip().splitlines()[-1]
        == f"published and verified: {HUB_URL}/anna/lora, commit {sha}"
    )
    weights = (trained / "adapter" / "adapter_model.safetensors").read_bytes()
    assert repository.files["adapter_model.safetensors"] == weights
    published = json.loads((trained / "published.json").read_text())
    assert published["commit"] == sha
    assert published["files"]["adapter_model.safetensors"] == {
        "bytes": len(weights),
        "sha256": sha256(weights).hexdigest(),
    }
    config = json.loads(repository.files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "owner/base"
    assert config["revision"] == hub.models["owner/base"].branches["main"]


def test_plan_names_every_file_with_its_hash_before_anything_is_sent(
    trained: Path, hub: Hub, publish: Publish
) -> None:
    base = hub.models["owner/base"].branches["main"]
    done = publish(
        "--repo_id", "anna/lora", "--base_model", f"owner/base@{base}", "--license", "mit"
    )
    repository = hub.models["anna/lora"]
    assert "to        anna/lora, private\n" in done.out
    assert f"base      owner/base at {base}\n" in done.out
    planned = dict(
        re.findall(
            r"^send      (\S+): [\d,]+ bytes, sha256 (\w{64})$", done.out, flags=re.MULTILINE
        )
    )
    assert planned == {name: sha256(repository.files[name]).hexdigest() for name in SENT}
    assert repository.files["README.md"].decode().strip() in done.out
    for name in (
        "checkpoints/ (10 files)",
        "config.yaml",
        "ledger.jsonl",
        "metrics.jsonl",
        "run.json",
    ):
        assert f"left out  {name}\n" in done.out


def test_checkpoint_is_published_when_it_is_named(
    trained: Path, hub: Hub, publish: Publish
) -> None:
    folder = trained / "checkpoints" / "step-000003"
    assert publish(*NAMED, source=folder).code == 0
    files = hub.models["anna/lora"].files
    assert files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert b"for 3 of 6 steps" in files["README.md"]
    assert b"Not a finished run" in files["README.md"]


def test_unfinished_run_is_refused_with_its_newest_checkpoint_named(
    trained: Path, hub: Hub, publish: Publish
) -> None:
    run_json = json.loads((trained / "run.json").read_text())
    del run_json["result"]
    (trained / "run.json").write_text(json.dumps(run_json))
    done = publish(*NAMED)
    assert done.code == 2
    assert done.last_line.endswith(f"name a checkpoint: {trained / 'checkpoints' / 'step-000006'}")
    assert hub.requests == []


def test_evidence_sends_the_ledger_and_the_run_manifest_whose_hashes_the_card_states(
    trained: Path, hub: Hub, publish: Publish
) -> None:
    assert publish(*NAMED, "--evidence").code == 0
    files = hub.models["anna/lora"].files
    assert set(files) == SENT | MADE_BY_THE_HUB | {"ledger.jsonl", "run.json"}
    for name in ("ledger.jsonl", "run.json"):
        assert files[name] == (trained / name).read_bytes()
        assert sha256(files[name]).hexdigest().encode() in files["README.md"]


def test_everything_else_in_the_folder_is_left_out_and_listed(
    trained: Path, hub: Hub, publish: Publish
) -> None:
    strangers = [
        "optimizer.pt",
        "rng_state.pth",
        ".env",
        ".netrc",
        "id_rsa",
        "wandb/run.log",
        "__pycache__/a.pyc",
    ]
    for folder in (trained, trained / "adapter"):
        for name in strangers:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("hf_abcdefghijklmnopqrstuvwxyz")
    done = publish(*NAMED)
    assert done.code == 0, done.err
    assert set(hub.models["anna/lora"].files) == SENT | MADE_BY_THE_HUB
    for name in (
        "optimizer.pt",
        ".env",
        ".netrc",
        "id_rsa",
        "wandb/ (1 files)",
        "__pycache__/ (1 files)",
    ):
        assert f"left out  {name}\n" in done.out
        assert f"left out  adapter/{name}\n" in done.out


def test_public_branch_and_tag_are_as_asked(hub: Hub, publish: Publish) -> None:
    assert publish(*NAMED, "--public", "--tag", "v1").code == 0
    repository = hub.models["anna/lora"]
    assert not repository.private
    assert repository.tags == {"v1": repository.branches["main"]}
    assert publish(*NAMED, "--public", "--revision", "smaller", "--license", "mit").code == 0
    assert repository.commits == 3
    assert repository.files["README.md"].count(b"license: apache-2.0") == 1
    assert repository.trees[repository.branches["smaller"]]["README.md"].count(b"license: mit") == 1


def test_tag_of_another_commit_is_refused_before_anything_is_committed(
    hub: Hub, publish: Publish
) -> None:
    assert publish(*NAMED, "--tag", "v1").code == 0
    done = publish(*NAMED, "--license", "mit", "--tag", "v1")
    assert (done.code, hub.models["anna/lora"].commits) == (6, 2)
    assert "--tag: v1 is another commit already" in done.last_line


def test_new_branch_keeps_what_was_written_by_hand_on_main(hub: Hub, publish: Publish) -> None:
    assert publish(*NAMED).code == 0
    repository = hub.models["anna/lora"]
    edited = repository.files["README.md"] + b"\nBy hand.\n"
    repository.add({**repository.files, "README.md": edited}, parent=repository.branches["main"])
    assert publish(*NAMED, "--revision", "v2", "--license", "mit").code == 0
    assert repository.trees[repository.branches["v2"]]["README.md"].endswith(b"\nBy hand.\n")


def test_pull_request_leaves_main_and_is_opened_once(
    hub: Hub, publish: Publish, trained: Path
) -> None:
    first = hub.models["owner/base"].branches["main"]
    hub.models["owner/base"].files["README.md"] = b"---\nlicense: mit\n---\nThe base.\n"
    words = ("--repo_id", "owner/base", *NAMED[2:], "--public", "--create_pr")
    assert [publish(*words).code for _ in range(2)] == [0, 0]
    repository = hub.models["owner/base"]
    assert repository.branches == {"main": first}
    assert [author for author, _ in repository.requests.values()] == ["anna"]
    assert repository.trees[repository.requests[1][1]].keys() >= SENT


@pytest.mark.parametrize(
    ("private", "words", "says"),
    [
        (False, (), "is public; write --public"),
        (True, ("--public",), "is private; leave --public out"),
    ],
)
def test_visibility_of_a_repository_that_is_there_is_never_changed(
    private: bool, words: tuple[str, ...], says: str, hub: Hub, publish: Publish, bloom: Path
) -> None:
    hub.put_model("anna/lora", bloom, private=private)
    done = publish(*NAMED, *words)
    assert (done.code, hub.models["anna/lora"].commits, hub.models["anna/lora"].private) == (
        6,
        1,
        private,
    )
    assert says in done.last_line


def test_json_is_one_object_with_the_plan_and_what_came_of_it(hub: Hub, publish: Publish) -> None:
    planned = json.loads(publish(*NAMED, "--json", "--dry_run").out)
    assert planned["published"] is None
    assert planned["blocked"] == []
    done = json.loads(publish(*NAMED, "--json").out)
    assert done["published"]["commit"] == hub.models["anna/lora"].branches["main"]
    assert set(done["published"]["files"]) == set(planned["files"]) == SENT


# A dry run.


def test_dry_run_says_what_blocks_the_push_and_needs_neither_token_nor_hub(
    publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    done = publish("--repo_id", "anna/lora", "--dry_run")
    assert done.code == 0
    assert "BLOCKED: the base is a local folder" in done.out
    assert "name it with --base_model" in done.out
    assert "BLOCKED: no licence is recorded: write --license ID" in done.out
    assert done.out.rstrip().splitlines()[-1].startswith("dry run: nothing was sent; ")


def test_dry_run_opens_no_socket_and_writes_nothing(finished: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    code = (
        "from tests.processes import run_without_network as r; from loop.publish.__main__ import"
        " main; r(main)"
    )
    words = [sys.executable, "-c", code, str(finished), *NAMED, "--dry_run"]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "0"}
    )
    assert done.returncode == 0, done.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before


def test_what_blocks_a_push_blocks_it_before_the_hub_is_asked(hub: Hub, publish: Publish) -> None:
    done = publish("--repo_id", "anna/lora")
    assert done.code == 2
    assert "BLOCKED: the base is a local folder" in done.err
    assert hub.requests == []


# P1, P2: who may.


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (None, "no token: publishing needs one that may write; hf auth login, or set HF_TOKEN"),
        (f"{CANARY} and\tmore", "the token holds characters that no token has"),
        (f"{CANARY}ü", "the token holds characters that no token has"),
        (f"{CANARY}expired", "the Hub answered 401"),
    ],
)
def test_wrong_token_is_refused_before_anything_is_sent(
    token: str | None, says: str, hub: Hub, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    done = publish(*NAMED)
    assert (done.code, set(hub.models)) == (6, {"owner/base"})
    assert says in done.last_line


def test_token_that_may_only_read_is_refused_before_anything_is_sent(
    hub: Hub, publish: Publish
) -> None:
    hub.users[CANARY]["role"] = "read"
    done = publish(*NAMED)
    assert (done.code, set(hub.models), hub.asked("POST", "")) == (6, {"owner/base"}, 0)
    assert "the token of anna may only read" in done.last_line


@pytest.mark.parametrize("there", [False, True])
def test_repository_of_somebody_else_is_refused_and_left_as_it_was(
    there: bool, hub: Hub, publish: Publish, bloom: Path
) -> None:
    if there:
        hub.put_model("other/lora", bloom)
    before = {name: dict(repository.branches) for name, repository in hub.models.items()}
    done = publish(*NAMED, "--repo_id", "other/lora", *(["--public"] if there else []))
    assert done.code == 6
    assert "403" in done.last_line
    assert "this token of anna may not do that" in done.last_line
    assert {name: dict(repository.branches) for name, repository in hub.models.items()} == before


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lora", "the owner is missing"),
        ("anna/lora/more", "expected OWNER/NAME"),
        ("anna/lo ra", "expected OWNER/NAME"),
        ("anna/../lora", "expected OWNER/NAME"),
        ("anna/" + "a" * 97, "expected OWNER/NAME"),
        ("аnna/lora", "expected OWNER/NAME"),  # the first letter is Cyrillic
    ],
)
def test_name_that_no_repository_has_is_refused_without_asking(
    name: str, says: str, hub: Hub, publish: Publish
) -> None:
    done = publish(*NAMED, "--repo_id", name)
    assert (done.code, hub.requests) == (6, [])
    assert says in done.err


def test_disabled_or_gated_repository_is_refused(hub: Hub, publish: Publish, bloom: Path) -> None:
    hub.put_model("anna/lora", bloom, private=True, disabled=True)
    done = publish(*NAMED)
    assert (done.code, done.last_line) == (6, "error: anna/lora is disabled on the Hub")
    hub.put_model("anna/lora", bloom, private=True)
    hub.faults.append(
        Fault("GET", "/api/models/anna/lora", status=403, headers={"X-Error-Code": "GatedRepo"})
    )
    done = publish(*NAMED)
    assert (done.code, hub.models["anna/lora"].commits) == (6, 1)
    assert "it is gated: ask for access on its page" in done.last_line


def test_base_that_the_hub_does_not_have_or_has_otherwise_is_refused_before_anything_is_sent(
    hub: Hub, publish: Publish, gpt2: Path
) -> None:
    hub.put_model("owner/other", gpt2)
    for base, says in (
        ("owner/nothing", "the base owner/nothing at main: not on the Hub"),
        ("owner/base@" + "0" * 40, f"the base owner/base at {'0' * 40}: not on the Hub"),
        ("owner/other", "its config.json is not that of the base trained on"),
    ):
        done = publish(*NAMED, "--base_model", base)
        assert (done.code, set(hub.models)) == (6, {"owner/base", "owner/other"})
        assert says in done.last_line


# P3: the network, at each request of a publication.

REQUESTS = {
    "ask whose token it is": ("GET", "/api/whoami-v2"),
    "the base": ("GET", "/api/models/owner/base"),
    "the base's config": ("GET", "/owner/base/resolve/.*/config.json"),
    "the repository": ("GET", "/api/models/anna/lora"),
    "make the repository": ("POST", "/api/repos/create"),
    "check the card": ("POST", "/api/validate-yaml"),
    "how files are sent": ("POST", "/preupload/"),
    "where large files go": ("POST", "/lfs/objects/batch"),
    "send a large file": ("PUT", "/lfs/"),
    "say that it was sent": ("POST", "/lfs/.*/verify"),
    "commit": ("POST", "/commit/"),
    "download again": ("GET", "/anna/lora/resolve/.*/adapter_model.safetensors"),
}
BAD_DAYS: dict[str, dict[str, Any]] = {
    "429": {"status": 429, "headers": {"Retry-After": "7"}},
    "503": {"status": 503, "message": "over capacity"},
    "dropped": {"drop": 0},
    "answer lost": {"lose": True},
}


@pytest.mark.parametrize("day", BAD_DAYS)
@pytest.mark.parametrize("request_", REQUESTS)
def test_one_bad_answer_costs_a_line_and_some_seconds(
    request_: str, day: str, hub: Hub, publish: Publish, waits: list[float]
) -> None:
    hub.faults.append(Fault(*REQUESTS[request_], **BAD_DAYS[day]))
    done = publish(*NAMED)
    assert done.code == 0, done.err
    assert hub.models["anna/lora"].commits == 2
    assert set(hub.models["anna/lora"].files) == SENT | MADE_BY_THE_HUB
    if request_ == "commit" and day == "answer lost":
        assert waits == []  # it was there when it was looked for
    else:
        assert len(waits) == 1
        assert waits[0] == pytest.approx(
            7 if day == "429" else 1, abs=1
        )  # the client adds a second
        assert re.search(r"again in \d+ s|Retrying in \d|Waiting \d|Trying to resume", done.err)
    assert "X-Amz-Signature" not in done.err


@pytest.mark.parametrize("day", ["503", "dropped"])
@pytest.mark.parametrize(
    "request_", sorted(REQUESTS.keys() - {"say that it was sent"})
)  # which is not needed
def test_hub_that_stays_down_is_given_up_on_and_a_second_run_repairs_it(
    request_: str, day: str, hub: Hub, publish: Publish, trained: Path, waits: list[float]
) -> None:
    hub.faults.append(Fault(*REQUESTS[request_], times=FOREVER, **BAD_DAYS[day]))
    done = publish(*NAMED)
    assert done.code == 6
    assert len(waits) < 25
    assert "Traceback" not in done.err
    assert done.last_line.startswith("error: ")
    assert not (trained / "published.json").exists()
    repository = hub.models.get("anna/lora")
    committed = request_ == "download again"
    assert repository is None or repository.commits == (2 if committed else 1)
    hub.faults.clear()
    assert publish(*NAMED).code == 0
    assert hub.models["anna/lora"].commits == 2


@pytest.mark.parametrize("status", [500, 502, 504])
def test_other_statuses_that_pass_are_waited_for(
    status: int, hub: Hub, publish: Publish, waits: list[float]
) -> None:
    hub.faults += [
        Fault("GET", "/api/whoami-v2", status=status),
        Fault("POST", "/commit/", status=status),
    ]
    assert publish(*NAMED).code == 0
    assert (waits, hub.models["anna/lora"].commits) == ([1, 1], 2)


@pytest.mark.parametrize("after", [1, 1000, 3000])
def test_connection_dropped_in_mid_upload_is_taken_up_again(
    after: int, hub: Hub, publish: Publish
) -> None:
    hub.faults.append(Fault("PUT", "/lfs/", drop=after))
    assert publish(*NAMED).code == 0
    assert hub.models["anna/lora"].commits == 2


@pytest.mark.parametrize(
    "request_",
    ["ask whose token it is", "how files are sent", "send a large file", "download again"],
)
def test_hub_that_asks_for_an_hour_is_not_waited_for(
    request_: str, hub: Hub, publish: Publish, waits: list[float]
) -> None:
    hub.faults.append(
        Fault(*REQUESTS[request_], FOREVER, status=429, headers={"Retry-After": "3600"})
    )
    done = publish(*NAMED)
    assert (done.code, waits) == (6, [])
    assert "the Hub asks to be left alone for 3600 s" in done.last_line


def test_hub_that_says_nothing_is_given_up_on(
    hub: Hub, publish: Publish, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    monkeypatch.setattr("loop.publish.hub.TIMEOUT", 0.2)
    hub.faults.append(Fault("GET", "/api/whoami-v2", FOREVER, delay=0.6))
    done = publish(*NAMED)
    assert (done.code, waits) == (6, [1, 2, 4])
    assert "ReadTimeout" in done.last_line


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [("http://no-such-host.invalid", "ConnectError"), (HUB_URL.replace("http:", "https:"), "SSL")],
    ids=["no such name", "no certificate"],
)
def test_hub_that_cannot_be_reached_is_given_up_on(
    endpoint: str,
    says: str,
    hub: Hub,
    publish: Publish,
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    done = publish(*NAMED)
    assert (done.code, waits) == (6, [1, 2, 4])
    assert says in done.last_line


NONSENSE = [b"{}", b"[]", b"null", b'"x"', b"<html>Welcome to the hotel</html>", b""]


@pytest.mark.parametrize("body", NONSENSE)
@pytest.mark.parametrize(
    "request_", ["ask whose token it is", "the repository", "how files are sent", "commit"]
)
def test_answer_that_no_hub_gives_is_one_line(
    request_: str, body: bytes, hub: Hub, publish: Publish
) -> None:
    hub.faults.append(Fault(*REQUESTS[request_], FOREVER, body=body))
    done = publish(*NAMED)
    assert done.code == 6, done.err
    assert "Traceback" not in done.err
    assert "anna/lora" not in hub.models or hub.models["anna/lora"].commits == 1


@pytest.mark.parametrize("body", [b"[]", b"null", b"<html>"])
def test_gateway_that_answers_for_the_hub_is_one_line(
    body: bytes, hub: Hub, publish: Publish
) -> None:
    hub.faults.append(Fault("GET", "/api/models/anna", FOREVER, status=502, body=body))
    done = publish(*NAMED)
    assert (done.code, "Traceback" in done.err) == (6, False)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET", "/api/models/anna/lora", status=400, message=f"bad header: Bearer {CANARY}"),
        Fault("PUT", "/lfs/", FOREVER, status=403, message=CANARY),
        Fault("GET", "/anna/lora/resolve/", FOREVER, status=404, message=CANARY),
    ],
    ids=["echoed", "upload", "download"],
)
def test_debug_shows_no_token_and_no_signature(fault: Fault, hub: Hub, publish: Publish) -> None:
    hub.faults.append(fault)
    done = publish(*NAMED, "--debug")  # the fixture looks for the token
    assert done.code == 6
    assert "X-Amz-Signature" not in done.err + done.out


def test_warning_of_the_hub_is_repeated_without_the_token(hub: Hub, publish: Publish) -> None:
    warning = {"X-HF-Warning": f"topic; your token {CANARY} is old"}
    hub.faults.append(
        Fault(
            "GET",
            "/api/models/anna/lora",
            status=404,
            headers={**warning, "X-Error-Code": "RepoNotFound"},
        )
    )
    done = publish(*NAMED)
    assert done.code == 0
    assert "your token **** is old" in done.err


# P4, P5, P14: one commit.


def test_same_content_is_never_committed_twice(hub: Hub, publish: Publish, trained: Path) -> None:
    assert publish(*NAMED).code == 0
    (trained / "published.json").unlink()
    done = publish(*NAMED)
    sha = hub.models["anna/lora"].branches["main"]
    assert (done.code, hub.models["anna/lora"].commits) == (0, 2)
    assert f"all of it is there already, at {sha}: nothing was sent" in done.err
    assert json.loads((trained / "published.json").read_text())["commit"] == sha


@pytest.mark.parametrize("words", [(), ("--create_pr",)])
def test_commit_whose_answer_is_lost_each_time_is_found(
    words: tuple[str, ...], hub: Hub, publish: Publish
) -> None:
    assert publish(*NAMED).code == 0
    hub.faults.append(Fault("POST", "/commit/", FOREVER, lose=True))
    assert publish(*NAMED, "--license", "mit", *words).code == 0
    assert hub.models["anna/lora"].commits == 3
    assert len(hub.models["anna/lora"].requests) == len(words)


@pytest.mark.parametrize("status", [0, 409, 412])
def test_repository_that_moves_after_the_plan_is_left_alone_with_both_shas_named(
    status: int, hub: Hub, publish: Publish
) -> None:
    assert publish(*NAMED).code == 0
    repository = hub.models["anna/lora"]
    planned = repository.branches["main"]

    def move() -> None:
        repository.add({**repository.files, "notes.txt": b"mine"}, parent=planned)

    hub.faults.append(Fault("POST", "/commit/", act=move, status=status))
    done = publish(*NAMED, "--license", "mit")
    assert (done.code, repository.commits) == (6, 3)
    assert (
        f"was at {planned} when this was planned, and is at {repository.branches['main']}"
        in done.last_line
    )
    assert repository.files["notes.txt"] == b"mine"
    assert publish(*NAMED, "--license", "mit").code == 0
    assert repository.files["notes.txt"] == b"mine"


def test_commit_under_a_later_one_is_not_called_nothing(hub: Hub, publish: Publish) -> None:
    """The answer is lost, and somebody edits the card before the commit is looked for."""

    def edit() -> None:
        repository = hub.models["anna/lora"]
        files = {**repository.files, "README.md": b"edited"}
        repository.add(files, parent=repository.branches["main"])

    hub.faults.append(Fault("POST", "/commit/", lose=True, after=edit))
    done = publish(*NAMED)
    assert (done.code, hub.models["anna/lora"].commits) == (6, 3)
    assert "has moved" in done.last_line
    assert "nothing was committed" not in done.last_line
    assert "look at its history" in done.last_line


def test_commit_that_cannot_be_looked_for_is_said_not_to_be_known(
    hub: Hub, publish: Publish
) -> None:
    hub.faults.append(Fault("POST", "/commit/", lose=True, after=lambda: hub.faults.append(down)))
    down = Fault("GET", "/api/models/anna/lora", FOREVER, status=503)
    done = publish(*NAMED)
    assert (done.code, hub.models["anna/lora"].commits) == (6, 2)
    assert "whether it is there is not known" in done.last_line
    assert "run the same command again" in done.last_line


def test_repository_that_appears_meanwhile_is_left_alone(
    hub: Hub, publish: Publish, bloom: Path
) -> None:
    def appear() -> None:
        hub.put_model("anna/lora", bloom, private=True)

    hub.faults.append(Fault("POST", "/api/repos/create", act=appear))
    done = publish(*NAMED)
    assert (done.code, hub.models["anna/lora"].commits) == (6, 1)
    assert "was made by somebody else meanwhile" in done.last_line


def test_repository_made_public_while_it_is_verified_is_not_called_verified(
    hub: Hub, publish: Publish
) -> None:
    def expose() -> None:
        hub.models["anna/lora"].private = False

    hub.faults.append(Fault("GET", "/anna/lora/resolve/.*/README.md", act=expose))
    done = publish(*NAMED)
    assert done.code == 6
    assert "the repository was changed while it was verified" in done.last_line


def test_answer_with_a_commit_that_is_none_is_not_believed(
    hub: Hub, publish: Publish, trained: Path
) -> None:
    answer = {"commitOid": "main", "commitUrl": f"{HUB_URL}/anna/lora/commit/main"}
    hub.faults.append(Fault("POST", "/commit/", FOREVER, body=json.dumps(answer).encode()))
    done = publish(*NAMED)
    assert (done.code, (trained / "published.json").exists()) == (6, False)
    assert "the Hub answered without a commit; nothing was committed" in done.last_line


def test_tag_that_is_not_there_afterwards_is_not_stated(
    hub: Hub, publish: Publish, trained: Path
) -> None:
    hub.faults.append(Fault("POST", "/tag/", body=b"{}"))
    done = publish(*NAMED, "--tag", "v1")
    assert (done.code, (trained / "published.json").exists()) == (6, False)
    assert "--tag: v1 does not stand for" in done.last_line


def test_conflict_without_a_new_commit_passes(hub: Hub, publish: Publish) -> None:
    hub.faults.append(
        Fault("POST", "/commit/", status=409, message="another operation is in progress")
    )
    assert publish(*NAMED).code == 0
    assert hub.models["anna/lora"].commits == 2


def test_publication_killed_in_mid_upload_is_one_commit_after_a_second_run(
    hub: Hub, publish: Publish, trained: Path
) -> None:
    words = [sys.executable, "-m", "loop.publish", str(trained), *NAMED]
    places = {**os.environ, "HF_HUB_OFFLINE": "0", "TMPDIR": str(trained.parent / "tmp")}
    (trained.parent / "tmp").mkdir()
    for attempt, number in enumerate((signal.SIGTERM, signal.SIGKILL), start=1):
        hub.faults.append(Fault("PUT", "/lfs/", delay=30))
        killed = subprocess.Popen(
            words, env=places, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while hub.asked("PUT", "/lfs/") < attempt:
            assert killed.poll() is None
        killed.send_signal(number)
        _, err = killed.communicate()
        assert killed.returncode == (143 if number == signal.SIGTERM else -number)
        if number == signal.SIGTERM:
            assert (
                "error: interrupted: anna/lora may hold the commit, unverified; run the same"
                in err.splitlines()[-1]
            )
            assert not list((trained.parent / "tmp").iterdir())
    assert hub.models["anna/lora"].commits == 1
    assert not (trained / "published.json").exists()
    assert publish(*NAMED).code == 0
    assert hub.models["anna/lora"].commits == 2


# P7 to P10: what must not be published.


@pytest.mark.parametrize(
    ("secret", "kind"),
    [
        ("hf_abcdefghijklmnopqrstuvwxyz", "token of the Hub, hf_a****"),
        ("sk-proj-abcdefghijklmnopqrstuv", "API key, sk-p****"),
        ("AKIAIOSFODNN7EXAMPLE", "key of a cloud, AKIA****"),
        ("-----BEGIN RSA PRIVATE KEY-----", "private key, ----****"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dBjftJeZ4CVP", "web token, eyJh****"),
        ("https://anna:geheim@example.org/", "password in an address"),
        ("/srv/secret-project/rows.csv", "absolute path, /srv****"),
    ],
)
def test_secret_in_a_text_refuses_the_push_with_file_and_line_masked(
    secret: str, kind: str, hub: Hub, publish: Publish, trained: Path
) -> None:
    run_json = json.loads((trained / "run.json").read_text())
    run_json["samples"]["adapter"] = f"A good tool. {secret} and more"
    (trained / "run.json").write_text(json.dumps(run_json, indent=2))
    done = publish(*NAMED, "--evidence")
    assert (done.code, hub.requests) == (2, [])
    assert re.search(rf"BLOCKED: README\.md:\d+: {re.escape(kind)}", done.err)
    assert re.search(rf"BLOCKED: run\.json:\d+: {re.escape(kind)}", done.err)
    assert secret not in done.err + done.out
    assert secret not in publish(*NAMED, "--json", "--dry_run").out


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_link_in_the_place_of_a_file_is_refused(
    link: Callable[[Path, Path], None], name: str, hub: Hub, publish: Publish, trained: Path
) -> None:
    path, elsewhere = trained / "adapter" / name, trained.parent / name
    path.rename(elsewhere)
    link(path, elsewhere)
    done = publish(*NAMED)
    assert (done.code, hub.requests) == (4, [])
    assert "expected a regular file" in done.last_line


@pytest.mark.parametrize(
    "name", ["аdapter_model.safetensors", "adapter_model.safetensors\u200b", "notes"]
)
def test_name_that_looks_like_another_or_leads_elsewhere_is_refused(
    name: str, hub: Hub, publish: Publish, trained: Path
) -> None:
    if name == "notes":
        (trained / "adapter" / name).symlink_to("/etc/passwd")
    else:
        (trained / "adapter" / name).write_bytes(b"another")
    done = publish(*NAMED)
    assert (done.code, hub.requests) == (4, [])
    assert "in adapter/: a " in done.err


def restate(trained: Path) -> None:
    """run.json with the sha256 of the adapter that is there now, as whoever changed both would
    write it."""
    run_json = json.loads((trained / "run.json").read_text())
    content = (trained / "adapter" / "adapter_model.safetensors").read_bytes()
    run_json["result"]["adapter_sha256"] = sha256(content).hexdigest()
    (trained / "run.json").write_text(json.dumps(run_json))


def test_link_in_the_place_of_the_adapter_s_folder_is_refused(
    hub: Hub, publish: Publish, trained: Path
) -> None:
    (trained / "adapter").rename(trained.parent / "elsewhere")
    (trained / "adapter").symlink_to(trained.parent / "elsewhere")
    done = publish(*NAMED)
    assert (done.code, hub.requests) == (4, [])
    assert "adapter/ is a link to another folder" in done.err


@pytest.mark.parametrize(
    "fault", ["torn", "NaN", "base weight", "another rank", "metadata", "no JSON"]
)
def test_adapter_that_is_not_the_run_s_is_refused(
    fault: str, hub: Hub, publish: Publish, trained: Path
) -> None:
    path = trained / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    if fault == "torn":
        path.write_bytes(path.read_bytes()[:-1])
    elif fault == "NaN":
        save_file({**tensors, first: tensors[first] * float("nan")}, path)
    elif fault == "base weight":
        save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(384, 32)}, path)
    elif fault == "metadata":
        save_file(tensors, path, {"format": "pt", "note": "hf_abcdefghijklmnopqrstuvwxyz"})
    elif fault == "no JSON":
        (trained / "adapter" / "adapter_config.json").write_text("[]")
    else:
        config = json.loads((trained / "adapter" / "adapter_config.json").read_text())
        (trained / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    restate(trained)
    done = publish(*NAMED)
    assert (done.code, hub.requests) == (4, [])
    assert "adapter_" in done.last_line


def test_changed_adapter_is_refused_by_its_hash(hub: Hub, publish: Publish, trained: Path) -> None:
    path = trained / "adapter" / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = publish(*NAMED)
    assert (done.code, hub.requests) == (4, [])
    assert "run.json states sha256" in done.last_line


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--base_model", "./bloom"), 6, "--base_model: found './bloom', expected OWNER/NAME"),
        (
            ("--base_model", "/models/bloom"),
            6,
            "--base_model: found '/models/bloom', expected OWNER/NAME",
        ),
        (
            ("--license", "Apache 2.0"),
            2,
            "--license: found 'Apache 2.0', expected an id such as apache-2.0",
        ),
        (
            ("--tag", "my tag"),
            2,
            "--tag: found 'my tag', expected letters, digits, dots and dashes",
        ),
        (
            ("--revision", "../main"),
            2,
            "--revision: found '../main', expected the name of a branch",
        ),
        (("--license", "\udcff"), 2, "found a flag that is not UTF-8"),
        (("--language", "English"), 2, "--language: found 'English', expected a code such as en"),
        (
            ("--base_model", "bigscience/bloom-7b1"),
            2,
            "is under bigscience-bloom-rail-1.0, which binds what is",
        ),
    ],
)
def test_metadata_that_the_card_could_not_state_are_refused(
    words: tuple[str, ...], code: int, says: str, hub: Hub, publish: Publish
) -> None:
    done = publish(*NAMED, *words)
    assert (done.code, hub.requests) == (code, [])
    assert says in done.err


def test_bloom_s_licence_is_inherited_and_pointed_to(
    hub: Hub, publish: Publish, bloom: Path
) -> None:
    hub.put_model("bigscience/bloom-7b1", bloom)
    done = publish("--repo_id", "anna/lora", "--base_model", "bigscience/bloom-7b1")
    assert done.code == 0, done.err
    card = ModelCard(hub.models["anna/lora"].files["README.md"].decode())
    assert card.data.license == "bigscience-bloom-rail-1.0"
    assert "the use restrictions of its Attachment A apply" in card.text


# P11, P12, P13: another Hub, another moment, other bytes.


def test_offline_is_said_and_not_tried(
    hub: Hub, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = publish(*NAMED)
    assert (done.code, hub.requests) == (6, [])
    assert done.last_line == "error: HF_HUB_OFFLINE is set: publishing needs the network; unset it"


def test_files_that_change_while_they_are_sent_are_sent_as_planned(
    hub: Hub, publish: Publish, trained: Path
) -> None:
    path = trained / "adapter" / "adapter_model.safetensors"
    planned = path.read_bytes()

    def change() -> None:
        for file in (path, trained / "adapter" / "adapter_config.json", trained / "run.json"):
            file.write_bytes(b"changed")

    hub.faults.append(Fault("POST", "/api/repos/create", act=change))
    assert publish(*NAMED).code == 0
    assert hub.models["anna/lora"].files["adapter_model.safetensors"] == planned


@pytest.mark.parametrize("name", sorted(SENT))
def test_download_with_one_wrong_byte_is_not_called_published(
    name: str, hub: Hub, publish: Publish, trained: Path
) -> None:
    hub.faults.append(Fault("GET", f"/anna/lora/resolve/.*/{name}", spoil=True))
    done = publish(*NAMED)
    assert done.code == 6
    assert f"{name} is served as sha256" in done.last_line
    assert "do not use this commit" in done.last_line
    assert not (trained / "published.json").exists()
    assert "published" not in done.out.splitlines()[-1]


def test_hub_that_keeps_other_bytes_or_none_is_not_called_published(
    hub: Hub, publish: Publish, trained: Path
) -> None:
    def forget() -> None:
        del hub.models["anna/lora"].files["adapter_config.json"]

    hub.faults.append(Fault("POST", "/commit/", after=forget))
    done = publish(*NAMED)
    assert (done.code, (trained / "published.json").exists()) == (6, False)
    assert "adapter_config.json is served as no such file" in done.last_line


def test_logits_from_the_hub_are_those_of_the_run_or_it_says_so(
    hub: Hub, publish: Publish, other_bloom: Path
) -> None:
    assert publish(*NAMED, "--verify_logits").code == 0
    hub.put_model("owner/other", other_bloom)  # the same config, other weights
    done = publish(*NAMED, "--base_model", "owner/other", "--verify_logits")
    assert done.code == 6
    assert "logits from the Hub differ from the run's by up to" in done.last_line


def test_private_base_cannot_be_compared_and_that_is_said_before_anything_is_sent(
    hub: Hub, publish: Publish, bloom: Path
) -> None:
    hub.put_model("anna/secret", bloom, private=True)
    done = publish(*NAMED, "--base_model", "anna/secret", "--verify_logits")
    assert (done.code, "anna/lora" in hub.models) == (6, False)


# The card on the Hub.


def test_card_edited_on_the_hub_keeps_its_edits(hub: Hub, publish: Publish) -> None:
    assert publish(*NAMED).code == 0
    repository = hub.models["anna/lora"]
    card = (
        repository.files["README.md"]
        .decode()
        .replace("tags:\n", "thumbnail: a.png\ntags:\n- mine\n", 1)
    )
    edited = (
        card.replace("\n---\n\n<!--", "\n---\n\nWritten by hand, above.\n\n<!--", 1)
        + "\nAnd below.\n"
    )
    repository.add(
        {**repository.files, "README.md": edited.encode()}, parent=repository.branches["main"]
    )
    assert publish(*NAMED, "--evidence").code == 0
    assert repository.commits == 4
    now = ModelCard(repository.files["README.md"].decode())
    assert "Written by hand, above." in now.text
    assert now.text.rstrip().endswith("And below.")
    assert (now.data.thumbnail, now.data.tags[0]) == ("a.png", "mine")
    assert now.text.count("# lora\n") == 1
    assert "`ledger.jsonl` up to this step, published here" in now.text


# Everything together.


def test_documented_flow_from_hub_ids_to_a_loaded_adapter(
    hub: Hub, bloom: Path, ragged: Path, tmp_path: Path
) -> None:
    """Train from a base and a dataset of the Hub under the real launcher, publish, run the card's
    own code."""
    rows = {
        "rows.jsonl": ragged.read_bytes(),
        "README.md": b"---\nlicense: cc-by-4.0\n---\nRows.\n",
    }
    hub.put_dataset("owner/rows", rows)
    base, data = (
        kind[name].branches["main"]
        for kind, name in ((hub.models, "owner/base"), (hub.datasets, "owner/rows"))
    )
    online = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": CANARY}
    used = published_settings(Path("owner/base"), Path("owner/rows"), tmp_path / "run")
    trained = launch("cpu.yaml", flags(used), tmp_path, online)
    assert trained.returncode == 0, trained.stderr
    dry_run = f"python -m loop.publish {tmp_path / 'run'} --repo_id OWNER/NAME --dry_run"
    assert trained.stdout.rstrip().endswith(dry_run)
    assert {token for _, _, token in hub.requests} == {None}  # training has none
    assert all(
        re.search("owner/(base|rows)", path) for _, path, _ in hub.requests
    )  # and asks for nothing else
    words = [sys.executable, "-m", "loop.publish", str(tmp_path / "run"), "--repo_id", "anna/lora"]
    words += ["--license", "mit", "--language", "en", "--verify_logits"]
    done = subprocess.run(
        words, env={**user_environment(), **online}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    files = hub.models["anna/lora"].files
    assert (
        set(files) == SENT - {"tokenizer.json", "tokenizer_config.json"} | MADE_BY_THE_HUB
    )  # the base has them
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.datasets, card.data.language) == (
        "owner/base",
        ["owner/rows"],
        "en",
    )
    assert f'from_pretrained("owner/base", revision="{base}"' in card.text
    assert (
        f"[owner/rows](https://huggingface.co/datasets/owner/rows) at commit `{data}`" in card.text
    )
    code = re.search(r"```python\n(.+?)```", card.text, flags=re.DOTALL)
    assert code is not None
    loaded = subprocess.run(
        [sys.executable, "-c", code[1]],
        env={
            **os.environ,
            **online,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        },  # as a user's own Python has it
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr
    sample = json.loads((tmp_path / "run" / "run.json").read_text())["samples"]["adapter"]
    assert loaded.stdout.rstrip("\n") == sample  # the card's code writes the card's sample
    home = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not [path for path in home if CANARY.encode() in path.read_bytes()]
    assert CANARY not in done.stdout + done.stderr + trained.stdout + trained.stderr
