"""Small models and datasets that every test shares; all offline, in a cache of their own, on one
thread."""

import os
import tempfile

from tests.loopback_hub import HUB_URL

# Before torch and the Hub's libraries are imported: they read these once. A worker of pytest has a
# cache of its own, and the runs that it forks share it.
os.environ.setdefault(
    "LOOP_TESTS_CACHE_" + os.environ.get("PYTEST_XDIST_WORKER", ""),
    tempfile.mkdtemp(prefix="loop-tests-"),
)
os.environ.update(
    OMP_NUM_THREADS="1",
    HF_ENDPOINT=HUB_URL,  # where nobody listens but in the tests that start a Hub
    HF_HUB_DISABLE_XET="1",
    HF_HOME=os.environ["LOOP_TESTS_CACHE_" + os.environ.get("PYTEST_XDIST_WORKER", "")],
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    COLUMNS="200",
)

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import BloomConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from loop.config.knobs import Config

QUOTES = Path(__file__).parent.parent / "loop" / "demo" / "quotes.jsonl"
DEMO_MODEL = Path(__file__).parent.parent / "loop" / "demo" / "model"
VOCABULARY = 384
LONGEST = [
    "test_gpu",
    "test_demo",
    "test_first_mistakes",
    "test_signals",
    "test_launcher",
    "test_train",
    "test_publish",
    "test_examples",
]
"""Begun first, so that at the end no worker is alone with one of them."""

for _number, _usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if (
        signal.getsignal(_number) == signal.SIG_IGN
    ):  # behind & or nohup; what the tests launch would inherit it
        signal.signal(_number, _usual)
torch.set_num_threads(1)
transformers.logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; else in the order that they were collected in."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
        )
    )


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 384 tokens with <unk> 0, <s> 1, </s> 2, <pad> 3, in BLOOM's order; adds
    none by itself."""
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = ByteLevelBPETokenizer()
    texts = [json.loads(line)["quote"] for line in QUOTES.read_text(encoding="utf-8").splitlines()]
    bpe.train_from_iterator(
        texts, VOCABULARY, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", "<pad>"]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    tokenizer.save_pretrained(folder)
    return folder


def _save_model(folder: Path, tokenizer_folder: Path, config: Any, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # large enough that logits and gradients are not nearly uniform
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


def bloom_config() -> BloomConfig:
    return BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip


@pytest.fixture(scope="session")
def bloom(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return _save_model(tmp_path_factory.mktemp("bloom"), tokenizer_folder, bloom_config())


@pytest.fixture(scope="session")
def other_bloom(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Of the same shape as `bloom`, with other weights."""
    return _save_model(
        tmp_path_factory.mktemp("other-bloom"), tokenizer_folder, bloom_config(), seed=1
    )


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    return _save_model(tmp_path_factory.mktemp("gpt2"), tokenizer_folder, config)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    return _save_model(tmp_path_factory.mktemp("llama"), tokenizer_folder, config)


@pytest.fixture(scope="session")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 rows of 1 to 60 words of the demo's quotes, in a column `text`: lengths far apart, no two
    alike."""
    words = " ".join(
        json.loads(line)["quote"] for line in QUOTES.read_text(encoding="utf-8").splitlines()
    ).split()
    rows = [" ".join(words[37 * i : 37 * i + 1 + (i * 23) % 60]) for i in range(40)]
    path = tmp_path_factory.mktemp("ragged") / "ragged.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(bloom: Path, ragged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 6 steps: held-out rows, a sample, checkpoints after 3 and 6. To be copied,
    not changed."""
    from tests.processes import run  # which imports this file in another process

    folder = tmp_path_factory.mktemp("finished")
    run(flags(published_settings(bloom, ragged, folder / "run")), folder / "log")
    return folder / "run"


@pytest.fixture
def trained(finished: Path, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited for, in no time."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


def published_settings(base: Path, rows: Path, output: Path, **changed: Any) -> dict[str, Any]:
    """Knobs of a run that has everything which a card states."""
    usual: dict[str, Any] = {"model_name_or_path": base, "dataset_name": rows, "output_dir": output}
    usual |= {
        "max_length": 128,
        "micro_batch_tokens": 256,
        "global_batch_size": 8,
        "max_steps": 6,
        "lora_r": 4,
    }
    usual |= {
        "learning_rate": 1e-2,
        "eval_fraction": 0.1,
        "save_steps": 3,
        "sample_prompt": "A good tool",
    }
    return {**usual, **changed}


@pytest.fixture
def settings(bloom: Path, ragged: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Knobs of a small run, with what a test wants different."""

    def of(**changed: Any) -> dict[str, Any]:
        usual: dict[str, Any] = {
            "model_name_or_path": str(bloom),
            "dataset_name": str(ragged),
            "output_dir": str(tmp_path / "run"),
            "max_length": 128,
            "micro_batch_tokens": 256,
            "global_batch_size": 8,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "lora_r": 4,
            "lora_target_modules": "all-linear",
        }
        return {**usual, **changed}

    return of


@pytest.fixture
def config(settings: Callable[..., dict[str, Any]]) -> Callable[..., Config]:
    return lambda **changed: Config(**settings(**changed))


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]
