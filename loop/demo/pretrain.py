"""Pretrain the demo's small BLOOM from text that every Python installation carries.

A demo of fine-tuning needs a base that has something to be tuned: a random one gets better too, but
only by learning which tokens are frequent. This script makes such a base without a download. It
reads the docstrings and comments of the standard library and pydoc's topics, trains a byte-level
BPE tokenizer on them and then a BLOOM of 2.4 million parameters. The standard library differs
between Python versions, and so would the weights; that is why `loop/demo/model` ships them.

    python -m loop.demo.pretrain --output_dir some/folder
"""

import argparse
import ast
import hashlib
import inspect
import io
import re
import sysconfig
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 3072  # entries, the 4 special ones and the 256 bytes included
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]  # BLOOM's own order: ids 0, 1, 2, 3
EOS = SPECIAL.index("</s>")
BLOCK = 128  # tokens in one training row
BATCH = 16  # rows in one step
MUON_LR = 0.03
ADAMW_LR = 8e-3
WARMUP = 0.02  # share of the steps
DROPOUT = 0.1  # while pretraining only: the text is seen about twelve times and would be memorized
REPORT_EVERY = 200  # steps
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}


# ---- text ----


def strings(source: str) -> Iterator[str]:
    """The string constants of a module (docstrings, help texts, messages), without indentation."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield inspect.cleandoc(node.value)


def comments(source: str) -> Iterator[str]:
    """The comments that have their lines to themselves; neighboring lines make one text."""
    run: list[str] = []
    last_line = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or not token.line.lstrip().startswith("#"):
            continue
        if token.start[0] != last_line + 1:
            yield "\n".join(run)
            run = []
        run.append(token.string.strip("#!-=~ "))
        last_line = token.start[0]
    yield "\n".join(run)


def prose(text: str) -> Iterator[str]:
    """The paragraphs of `text` that read like English, each on one line, without markup."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(re.sub(r"(:\w+:)?`+", "", paragraph).split())
        ordinary = sum(c.islower() or c in " ,." for c in line)
        # Code, tables and doctests are full of capitals, digits and punctuation. Sentences are not.
        if len(line.split()) >= 3 and ordinary >= 0.82 * len(line) and ">>>" not in line:
            yield line


def gather() -> dict[str, list[str]]:
    """The texts of each source (a module, or a topic of pydoc), cleaned, no paragraph twice."""
    raw = {f"topic {name}": [text] for name, text in topics.items()}
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if SKIPPED.isdisjoint(name.parts) and name.parts[0] != "pydoc_data":
            with tokenize.open(path) as file:  # honors a coding cookie
                source = file.read()
            raw[name.as_posix()] = [*strings(source), *comments(source)]
    seen: set[str] = set()
    gathered: dict[str, list[str]] = {}
    for origin, texts in raw.items():
        kept = []
        for text in texts:
            new = [paragraph for paragraph in prose(text) if paragraph not in seen]
            seen.update(new)
            if new:
                kept.append("\n\n".join(new))
        gathered[origin] = kept
    return gathered


def is_held_out(origin: str) -> bool:
    """Whether a source is held out: one in twenty, whatever the seed and the order."""
    return hashlib.sha256(origin.encode()).digest()[0] < 256 / 20


# ---- tokenizer ----


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE like BLOOM's: it pads on the left and adds no <s> or </s> by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The alphabet holds all 256 bytes: an emoji that no text here has comes back as it went in.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    unk, bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts end to end as token ids, each closed by </s>, so that the model learns to stop."""
    return torch.tensor([token for text in texts for token in [*tokenizer(text)["input_ids"], EOS]])


# ---- training ----


def new_model() -> BloomForCausalLM:
    """A BLOOM with random weights; the embedding is tied to the head."""
    config = BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        n_layer=4,
        n_head=6,
        hidden_dropout=DROPOUT,
        attention_dropout=DROPOUT,
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=EOS,
        pad_token_id=SPECIAL.index("<pad>"),
        use_cache=True,
    )
    return BloomForCausalLM(config)


def optimizers(model: BloomForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding, biases and norms.

    Muon needs far fewer steps here than AdamW alone, but it is meant for matrices that map one
    hidden state to another; an embedding is a table of rows.
    """
    inner = {
        name: p for name, p in model.named_parameters() if p.ndim == 2 and "embeddings" not in name
    }
    outer = [p for name, p in model.named_parameters() if name not in inner]
    return [
        torch.optim.Muon(inner.values(), lr=MUON_LR, weight_decay=0.1),
        torch.optim.AdamW(outer, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> OneCycleLR:
    """The learning rate rises linearly for WARMUP of the steps and then falls to (almost) 0."""
    peak = optimizer.defaults["lr"]
    return OneCycleLR(
        optimizer, peak, steps, pct_start=WARMUP, anneal_strategy="linear", cycle_momentum=False
    )


@torch.no_grad()
def held_out_loss(model: BloomForCausalLM, tokens: Tensor) -> float:
    """Mean loss in nats per token over `tokens`, cut into rows of BLOCK."""
    rows = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)
    model.train(False)
    total = 0.0
    for part in torch.split(rows, 4 * BATCH):
        total += model(input_ids=part, labels=part).loss.item() * len(part)
    model.train()
    return total / len(rows)


def pretrain(
    model: BloomForCausalLM, tokens: Tensor, held_out: Tensor, steps: int, seed: int
) -> None:
    """Next-token prediction on rows from anywhere in `tokens`; reports every REPORT_EVERY steps."""
    generator = torch.Generator().manual_seed(seed)
    both = optimizers(model)
    schedules = [schedule(optimizer, steps) for optimizer in both]
    offsets = torch.arange(BLOCK)
    started = time.perf_counter()
    recent = 0.0  # sum of the losses since the last report
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - BLOCK, (BATCH, 1), generator=generator)
        rows = tokens[starts + offsets]
        loss = model(input_ids=rows, labels=rows).loss  # BLOOM shifts the labels itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
        for rate in schedules:
            rate.step()
        model.zero_grad()
        recent += loss.item()
        if step % REPORT_EVERY == 0:
            held, minutes = held_out_loss(model, held_out), (time.perf_counter() - started) / 60
            print(
                f"step {step:>5}/{steps}  loss {recent / REPORT_EVERY:.3f}  "
                f"held-out {held:.3f} nats/token  {minutes:.1f} min",
                flush=True,
            )
            recent = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Pretrain the demo's BLOOM on Python's own documentation."
    )
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument(
        "--steps", type=int, default=4400, help="training steps of BATCH x BLOCK tokens"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    # On a processor with bfloat16, products of float32 use it; a step took a fifth less time.
    torch.set_float32_matmul_precision("medium")

    gathered = gather()
    train_texts = [
        text for origin, texts in gathered.items() if not is_held_out(origin) for text in texts
    ]
    held_texts = [
        text for origin, texts in gathered.items() if is_held_out(origin) for text in texts
    ]
    tokenizer = train_tokenizer(train_texts)
    tokens, held_out = stream(tokenizer, train_texts), stream(tokenizer, held_texts)
    model = new_model()
    print(
        f"{len(gathered)} sources, {model.num_parameters():,} parameters; training + held-out: "
        f"{sum(map(len, train_texts)):,} + {sum(map(len, held_texts)):,} characters, "
        f"{len(tokens):,} + {len(held_out):,} tokens",
        flush=True,
    )
    pretrain(model, tokens, held_out, arguments.steps, arguments.seed)

    # Whoever fine-tunes it chooses anew.
    model.config.hidden_dropout = model.config.attention_dropout = 0.0
    model.bfloat16().save_pretrained(arguments.output_dir)  # half the size of float32
    tokenizer.save_pretrained(arguments.output_dir)
    stored = BloomForCausalLM.from_pretrained(arguments.output_dir, dtype=torch.float32)
    loss = held_out_loss(stored, held_out)
    print(f"stored in {arguments.output_dir}: held-out {loss:.3f} nats/token")


if __name__ == "__main__":
    main()
