"""What is found in a text that is about to be published, and what is left alone. No secret here is
anybody's."""

import json
import pwd
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from loop.finished.evidence import read_evidence
from loop.publish.card import Target
from loop.publish.plan import make_plan
from loop.publish.scan import findings, machine_names, mask
from tests.conftest import flags
from tests.processes import run

HUB_TOKEN = (
    "hf_" + "aB3" * 11
)  # put together here, so that no scan of this repository takes it for one
SECRETS = {  # a secret -> what is said of it
    HUB_TOKEN: "token of the Hub, hf_a****",
    "sk-" + "aB3-" * 8: "API key, sk-a****",
    "sk-proj-" + "aB3_" * 12: "API key, sk-p****",
    "AIza" + "Sy_x-" * 7: "API key, AIza****",
    "glpat-" + "aB3x" * 5: "API key, glpa****",
    "xoxb-" + "123456-" * 3 + "aB3": "API key, xoxb****",
    "AKIA" + "IOSFODNN7EXAMPLE": "key of a cloud, AKIA****",
    "AccountKey=" + "aB3/" * 10 + "==": "key of a cloud, Acco****",
    "ghp_" + "aB3x" * 9: "token of GitHub, ghp_****",
    "gho_" + "aB3x" * 9: "token of GitHub, gho_****",
    "github_pat_" + "11AB_" * 8: "token of GitHub, gith****",
    "-----BEGIN " + "PRIVATE KEY-----": "private key, ----****",
    "-----BEGIN OPENSSH " + "PRIVATE KEY-----": "private key, ----****",
    "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl": "web token, eyJh****",
    "carla:geheim12@db.example.org": "password in an address, carl****",
    "https://carla:geheim12@db.example.org/": "password in an address, http****",
    "https://:geheim12@db.example.org/": "password in an address, http****",
    "postgresql://carla:geheim12@db/things": "password in an address, ://c****",
    "password=geheim12": "password, pass****",
    "PASSWD = 'geheim12'": "password, PASS****",
    "api_key: geheim12": "password, api_****",
    '"apiKey": "geheim12"': "password, apiK****",
    r"{\"auth_token\": \"geheim12\"}": (  # as it stands in a JSON text within JSON
        "password, auth****"
    ),
}
PATHS = {
    "/home/carla/run": "absolute path, /hom****",
    "/Users/carla/run": "absolute path, /Use****",
    "~/run/adapter": "absolute path, ~/ru****",
    "file:///home/carla/run": "absolute path, file****",
    "file:/home/carla/run": "absolute path, /hom****",
    "db.example.org:/srv/data": "absolute path, /srv****",
    "output_dir=/tmp/run": "absolute path, /tmp****",
    r"C:\Users\carla": "absolute path, C:****",
    r"C:\\new\\run": "absolute path, C:****",  # a folder named new, as JSON spells it
    "C:/Users/carla": "absolute path, /Use****",
    r"\\nas\team": r"absolute path, \\n****",
    r"\\\\nas\\team": r"absolute path, \\\\****",
}
HARMLESS = [
    "https://huggingface.co/bigscience/bloom-560m/resolve/main/config.json",
    "http://127.0.0.1:8080/api/models",
    "https://example.org",
    "git@github.com:carla/things.git",
    "748ffccf785b6f17b795d821311d02cb44fecedf2ca15ea7eee14ee0b9fad73e",
    "sha256:748ffccf785b6f17b795d821311d02cb44fecedf2ca15ea7eee14ee0b9fad73e",
    "f9f0ed9793aa7d9d17380df9fdc075d4e9da3b5c",
    "and/or, he/she/it, 1/2/3, n/a",
    "/* comment */ // another",
    "output_dir: runs/demo",
    "<s>a</s> <br/> </s>",
    "[the card](mailto:carla@example.org) <mailto:carla@example.org>",
    "carla@example.org",
    "a ratio 1:2, at 12:30, of 07:05:01",
    '  "pad_token": "<pad>",',
    '"revision": null, "password": 12345, "api_key": "no"',
    "the password: none; your password is safe; api_keys",
    "@media (width: 3px) {a:hover}",
    r"Q:\n{question}\nA:\n",
    r"{question}\\n\\n{answer}",  # somebody typed \n\n where the shell left it as it is; JSON spells it so
    r"Password:\nplease say it",
    "Password:\nplease-say-it",
    "hf_transfer, hf_hub_download, sk-learn, AKIAK, eyJ.eyJ.x",
    "-----BEGIN PUBLIC KEY-----",
    "{{ name }} | $x^{2}$ | ~ | / | // | \\ | C: | :",
]


def known_as(monkeypatch: pytest.MonkeyPatch, user: str, host: str, home: str = "") -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, user)
    monkeypatch.setenv("HOME", home or f"/home/{user}")
    monkeypatch.setattr(socket, "gethostname", lambda: host)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user and a machine whose names everybody has."""
    known_as(monkeypatch, "root", "localhost", "/root")


@pytest.fixture
def anna(monkeypatch: pytest.MonkeyPatch) -> None:
    known_as(monkeypatch, "anna", "kiste.example.org")


# Secrets


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(("secret", "said"), SECRETS.items())
def test_a_secret_is_found_with_its_line_and_is_not_told(secret: str, said: str) -> None:
    text = f"---\nlicense: mit\n---\n\na text, {secret} in it\nand more\n"
    assert findings("README.md", text) == [f"README.md:5: {said}"]
    assert findings("vocab.json", text, vocabulary=True) == [f"vocab.json:5: {said}"]
    assert "geheim12" not in said
    assert secret not in said


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(
    "around", ["{}", '"{}"', "`{}`", "({})", "={}", "/{}/", "> {}", '    "adapter": "{}"', r"a\n{}"]
)
def test_a_token_is_found_whatever_it_stands_in(around: str) -> None:
    assert findings("run.json", around.format(HUB_TOKEN)) == [
        "run.json:1: token of the Hub, hf_a****"
    ]


@pytest.mark.usefixtures("nobody")
def test_everything_in_a_text_is_found_in_the_order_of_its_lines() -> None:
    text = (
        f"/home/carla/run\r\n\n{HUB_TOKEN} and again {HUB_TOKEN}\npassword=geheim12 in"
        " /Users/carla\n"
    )
    assert findings("a", text) == [
        "a:1: absolute path, /hom****",
        "a:3: token of the Hub, hf_a****",
        "a:3: token of the Hub, hf_a****",
        "a:4: absolute path, /Use****",
        "a:4: password, pass****",
    ]


@pytest.mark.parametrize(
    ("found", "masked"),
    [
        ("hf_abcdefgh", "hf_a****"),
        ("/a/b/c/d", "/a/b****"),
        ("anna", "an****"),
        ("bob", "b****"),
        ("x", "****"),
    ],
)
def test_a_mask_shows_no_more_than_half_and_no_more_than_four_characters(
    found: str, masked: str
) -> None:
    assert mask(found) == masked


# Paths


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(("path", "said"), PATHS.items())
@pytest.mark.parametrize(
    "around", ["{}", '"{}"', "see {} there", "a={}", "a: {}", "[a]({})", "> {}"]
)
def test_an_absolute_path_is_found_with_its_line(path: str, said: str, around: str) -> None:
    assert findings("README.md", "first\n" + around.format(path)) == [f"README.md:2: {said}"]


@pytest.mark.usefixtures("nobody")
def test_an_absolute_path_is_found_behind_a_line_end_as_json_spells_it() -> None:
    assert findings("run.json", json.dumps("see\n/home/carla/run")) == [
        "run.json:1: absolute path, /hom****"
    ]


@pytest.mark.usefixtures("anna")
def test_in_a_vocabulary_only_secrets_are_looked_for() -> None:
    text = "\n".join(["anna", "kiste.example.org", *PATHS])
    assert findings("vocab.json", text, vocabulary=True) == []
    assert findings("vocab.json", text + "\n" + HUB_TOKEN, vocabulary=True) == [
        "vocab.json:15: token of the Hub, hf_a****"
    ]


# Names of the user and of the machine


@pytest.mark.usefixtures("anna")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trained by anna on friday", "an****"),
        ("by:anna", "an****"),
        ("anna's", "an****"),
        ("https://huggingface.co/anna/demo", "an****"),
        ("on kiste", "ki****"),
        ("on kiste.example.org", "kist****"),
        (r'"first\nanna"', "an****"),
    ],
)
def test_the_names_of_user_and_machine_are_found(line: str, said: str) -> None:
    assert findings("README.md", f"\n{line}\n") == [
        f"README.md:2: name of a user or machine, {said}"
    ]


@pytest.mark.usefixtures("anna")
@pytest.mark.parametrize(
    "line", ["annabel", "susanna", "anna_b", "kisten", "Anna Karenina", "ANNA", ""]
)
def test_a_word_that_only_contains_a_name_is_left_alone(line: str) -> None:
    assert findings("README.md", line) == []


@pytest.mark.parametrize(
    ("user", "host", "home", "names"),
    [
        ("anna", "kiste", "/home/anna", {"anna", "kiste"}),
        (
            "anna",
            "kiste.example.org",
            "/data/a.berg/",
            {"anna", "a.berg", "kiste", "kiste.example.org"},
        ),
        ("root", "localhost", "/root", set()),
        ("runner", "Ubuntu", "/home/runner", set()),
        ("jo", "vm", "/", set()),  # two letters are in every second line
    ],
)
def test_a_machine_has_these_names(
    monkeypatch: pytest.MonkeyPatch, user: str, host: str, home: str, names: set[str]
) -> None:
    known_as(monkeypatch, user, host, home)
    assert machine_names() == names


@pytest.mark.parametrize("word", ["root", "runner", "localhost", "user", "ubuntu"])
def test_a_name_that_everybody_has_is_not_reported(
    monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    known_as(monkeypatch, word, word)
    assert findings("README.md", f"{word} and the {word} of things") == []


def test_a_container_without_a_list_of_users_has_its_hosts_name_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nobody_of(_number: int) -> None:
        raise KeyError("uid not found")

    known_as(monkeypatch, "anna", "kiste")
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", nobody_of)
    assert machine_names() == {"kiste"}


@pytest.mark.usefixtures("anna")
@pytest.mark.parametrize("start", ["> ", "  > ", '    "adapter": "', '"base": "'])
def test_in_a_samples_line_a_name_is_a_word_of_the_models_and_a_secret_is_a_secret(
    start: str,
) -> None:
    assert findings("run.json", f"\n{start}Dear anna,\n") == []
    assert findings("run.json", f"\n{start}Dear anna, {HUB_TOKEN}\n") == [
        "run.json:2: token of the Hub, hf_a****"
    ]
    assert findings("run.json", f"{start}Dear\nanna") == [
        "run.json:2: name of a user or machine, an****"
    ]


# What may stand there


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("text", HARMLESS)
@pytest.mark.parametrize("around", ["{}", '    "of": "{}",', "- {}", "| {} |"])
def test_what_only_looks_like_one_is_left_alone(text: str, around: str) -> None:
    assert findings("README.md", around.format(text)) == []


@pytest.mark.usefixtures("anna")
@pytest.mark.parametrize(
    "line",
    [
        "# anna/demo",
        '"anna/demo"',
        "https://huggingface.co/anna/demo/tree/main",
        "base_model:adapter:anna/demo",
    ],
)
def test_a_public_id_may_stand_there_although_it_contains_a_name(line: str) -> None:
    assert findings("README.md", line, ["anna/demo"]) == []
    assert (
        findings("README.md", line.replace("anna/demo", "demo/anna"), ["demo", "demo/anna"]) == []
    )
    assert findings("README.md", line) == ["README.md:1: name of a user or machine, an****"]


@pytest.mark.usefixtures("anna")
@pytest.mark.parametrize(
    ("public", "line", "said"),
    [
        ("anna/demo", "anna/demo-of-work", "name of a user or machine, an****"),
        ("anna/demo", "susi-anna/demo", "name of a user or machine, an****"),
        ("anna/demo", "by anna, anna/demo", "name of a user or machine, an****"),
        ("anna/demo", "/home/anna/demo", "absolute path, /hom****"),
        ("hf", HUB_TOKEN, "token of the Hub, hf_a****"),
        ("sk", "sk-" + "aB3-" * 8, "API key, sk-a****"),
        ("a", "anna", "name of a user or machine, an****"),
        ("", "postgresql://carla:geheim12@db/things", "password in an address, ://c****"),
    ],
)
def test_a_public_id_hides_nothing_but_itself(public: str, line: str, said: str) -> None:
    assert findings("README.md", line, ["anna/bloom", public]) == [f"README.md:1: {said}"]


@pytest.mark.usefixtures("nobody")
@given(st.text("abcdefghijklmnopqrstuvwxyzäéß ABCXYZ\n\t.,;!?"))
@examples(deadline=None)
def test_plain_words_are_left_alone(text: str) -> None:
    assert findings("README.md", text) == []


@pytest.mark.usefixtures("nobody")
@given(st.lists(st.text("abc :/\"'\\.@-", max_size=20), max_size=8), st.data())
@examples(deadline=None)
def test_a_token_between_any_lines_is_found_with_its_number(
    lines: list[str], data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(lines)))
    text = "\n".join([*lines[:place], HUB_TOKEN, *lines[place:]])
    assert f"a:{place + 1}: token of the Hub, hf_a****" in findings("a", text)


@pytest.mark.runs
@pytest.mark.usefixtures("anna")
def test_nothing_is_found_in_what_a_real_run_would_publish(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    prompt = {
        "prompt_template": "Q:\n",
        "completion_template": "{text}",
        "sample_prompt": "A good friend",
    }
    run(flags(settings(max_steps=2, eval_fraction=0.2, **prompt)), tmp_path / "log")
    target = Target("anna/demo", "anna/bloom", None, license="mit", evidence=True)
    files = make_plan(read_evidence(tmp_path / "run"), target).files
    assert {"README.md", "run.json", "ledger.jsonl", "adapter_config.json"} < files.keys()
    for name, content in files.items():
        if not name.endswith(".safetensors"):
            vocabulary = name.startswith("tokenizer")
            assert findings(name, content.decode(), ["anna/demo", "anna/bloom"], vocabulary) == []
