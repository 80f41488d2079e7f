"""The model card: what was recorded, for the Hub; only its generated part is ever replaced."""

import html
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from loop.config.command_line import config_yaml
from loop.errors import HubError
from loop.finished.evidence import Evidence
from loop.run.sample import NO_REPEAT, SAMPLE_TOKENS
from loop.state.files import sha256
from loop.state.ledger import perplexity

START = "<!-- loop.publish: generated from here; edits below are overwritten -->"
END = "<!-- loop.publish: generated to here; edits below are kept -->"
BLOOM_LICENSE = "bigscience-bloom-rail-1.0"
_FACTS = (
    "library_name",
    "base_model",
    "base_model_relation",
    "datasets",
    "license",
    "pipeline_tag",
    "model-index",
)
"""Metadata that follow from the run or the flags. The others keep what was written on the Hub."""


@dataclass(frozen=True)
class Target:
    """Where an adapter goes, and what the run cannot know: the base's id, license and language."""

    repo_id: str
    base: str  # Hub id
    base_commit: str | None  # None until the Hub was asked
    public: bool = False
    revision: str | None = None
    create_pr: bool = False
    tag: str | None = None
    license: str | None = None
    language: str | None = None
    evidence: bool = False

    @property
    def binding_license(self) -> str | None:
        """BLOOM's, which is inherited, or the flag's."""
        return BLOOM_LICENSE if self.is_bloom else self.license

    @property
    def is_bloom(self) -> bool:
        """Whether BLOOM's license binds it. Source: the cards of BigScience's models on the Hub."""
        return self.base.lower().startswith("bigscience/bloom")


def make_card(
    evidence: Evidence, target: Target, adapter: dict[str, bytes], own_tokenizer: bool
) -> str:
    """The whole README.md, as a new repository gets it."""
    sent = {**adapter, "ledger.jsonl": evidence.ledger, "run.json": evidence.run_json}
    card = ModelCard.from_template(
        _metadata(evidence, target),
        template_path=str(Path(__file__).with_name("card.md")),
        start=START,
        end=END,
        name=target.repo_id.partition("/")[2],
        base=target.base,
        commit=target.base_commit,
        repo_id=target.repo_id,
        revision=target.revision,
        bloom=target.is_bloom,
        own_tokenizer=own_tokenizer,
        evidence=target.evidence,
        license=target.binding_license,
        recipe=_recipe(evidence, target),
        sha256={name: sha256(content) for name, content in sent.items()},
        **_what_was_trained(evidence),
        **_how_it_went(evidence),
        **_where_it_ran(evidence),
    )
    return str(card)


def _what_was_trained(evidence: Evidence) -> dict[str, Any]:
    """What the template says of data, base and adapter."""
    run, data, census = evidence.run, evidence.run["data"], evidence.run["census"]
    return {
        "run": run,
        "identity": run["identity"],
        "config": evidence.config,
        "counts": data["counts"],
        "dataset_id": _dataset_id(evidence),
        "dataset_name": _cell(data["name"]),
        "dataset_commit": data["commit"],
        "templates": " -> ".join(_cell(template) for template in data["templates"]),
        "lora": _lora(run["identity"]),
        "trained_parameters": census["trained_parameters"],
        "all_parameters": census["all_parameters"],
        "share": 100 * census["trained_parameters"] / census["all_parameters"],
        "base_dtypes": ", ".join(census["base_dtypes"]),
    }


def _how_it_went(evidence: Evidence) -> dict[str, Any]:
    """What it says of steps, losses and samples."""
    run = evidence.run
    finished = "result" in run and evidence.step == run["num_steps"]
    samples = run.get("samples", {}) if finished else {}
    losses = [(done, loss, f"{perplexity(loss):,.1f}") for done, loss in evidence.evaluations]
    return {
        "step": evidence.step,
        "num_steps": run["num_steps"],
        "finished": finished,
        "measured": _measured(evidence),
        "evaluations": losses,
        "target_tokens": sum(entry.get("target_tokens", 0) for entry in evidence.entries),
        "head": evidence.head,
        "prompt": repr(evidence.config.sample_prompt or "The"),
        "sample_tokens": SAMPLE_TOKENS,
        "no_repeat": NO_REPEAT,
        "samples": [(of, _quote(samples[of])) for of in ("base", "adapter") if samples.get(of)],
    }


def _where_it_ran(evidence: Evidence) -> dict[str, Any]:
    """What it says of machines: of the last session that led to this step, and of all resumes."""
    run = evidence.run
    until = [s for s in run["sessions"] if s["first_step"] < max(1, evidence.step)]
    sessions = until or run["sessions"][:1]
    last = sessions[-1]
    versions = sorted(last["versions"].items())
    resumes = [(s["first_step"], line) for s in sessions for line in s["not_bit_exact"]]
    return {
        "session": last,
        "command": _command(last, run["identity"]["mixed_precision"]),
        "versions": _cell(", ".join(f"{name} {version}" for name, version in versions)),
        "device": _cell(last["device"]),
        "not_bit_exact": [_cell(f"from step {first}: {line}") for first, line in resumes],
    }


def _dataset_id(evidence: Evidence) -> str | None:
    """The dataset's Hub id; None for a local file."""
    data = evidence.run["data"]
    return str(data["name"]) if data["commit"] else None


def merge_cards(new: str, on_hub: str) -> str:
    """The card on the Hub with its generated part, and the metadata in `_FACTS`, replaced.

    A card that this program did not make gets the part at its end.
    Raises: HubError where it cannot be read."""
    try:
        return _merge(ModelCard(new), ModelCard(on_hub, ignore_metadata_errors=True))
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise HubError(
            f"README.md on the Hub: its metadata cannot be read: {error}; correct it there"
        ) from error


def _merge(card: ModelCard, old: ModelCard) -> str:
    begin, end = old.text.find(START), old.text.rfind(END)
    generated = card.text[card.text.index(START) : card.text.rindex(END) + len(END)]
    if old.text.count(START) > 1 or (begin < 0) != (end < 0) or end < begin:
        reason = "one of the two marks around the generated part is gone"
        raise HubError(f"README.md on the Hub: {reason}; remove the other")
    if begin < 0:
        old.text = old.text.rstrip("\n") + "\n\n" + generated + "\n"
    else:
        old.text = old.text[:begin] + generated + old.text[end + len(END) :]
    made, kept = card.data.to_dict(), old.data.to_dict()
    written = {key: value for key, value in kept.items() if key not in _FACTS}
    old_tags = kept.get("tags", [])
    tags = [*old_tags, *(tag for tag in made["tags"] if tag not in old_tags)]
    old.data = ModelCardData(**{**written, **made, "tags": tags})
    return str(old)


def _metadata(evidence: Evidence, target: Target) -> ModelCardData:
    name, data = target.repo_id.partition("/")[2], evidence.run["data"]
    dataset_id = _dataset_id(evidence)
    last = evidence.evaluations[-1:] * _measured(evidence)
    losses = [("base", evidence.evaluations[:1]), ("adapter", last)]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset_id or data["name"],
            dataset_name=data["name"],
            dataset_split=evidence.config.dataset_test_split or evidence.config.dataset_train_split,
            dataset_revision=data["commit"],
            metric_type=kind,
            metric_value=round(value, 6),
            metric_name=f"held-out {kind} of the {of}{unit}",
        )
        for of, ((_, loss),) in ((of, pairs) for of, pairs in losses if pairs)
        for kind, value, unit in (
            ("loss", loss, ", nats per target token"),
            ("perplexity", perplexity(loss), ""),
        )
        if math.isfinite(value)
    ]
    return ModelCardData(
        library_name="peft",
        base_model=target.base,
        base_model_relation="adapter",
        datasets=[dataset_id] if dataset_id else None,
        license=target.binding_license,
        language=target.language,
        pipeline_tag="text-generation",
        tags=[f"base_model:adapter:{target.base}", "lora", "transformers"],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _measured(evidence: Evidence) -> bool:
    """Whether the held-out loss was taken of this very state of the adapter."""
    return len(evidence.evaluations) > 1 and evidence.evaluations[-1][0] == evidence.step


def _lora(identity: dict[str, Any]) -> str:
    kind = "DoRA" if identity["use_dora"] else "rsLoRA" if identity["use_rslora"] else "LoRA"
    numbers = f"r={identity['lora_r']}, alpha {identity['lora_alpha']}"
    dropout = f"dropout {identity['lora_dropout']:g}"
    return f"{kind}, {numbers}, {dropout}, on {', '.join(identity['lora_target_modules'])}"


def _recipe(evidence: Evidence, target: Target) -> str:
    """The run's config with public names in the place of folders, as YAML that `--config` reads."""
    output_dir = f"runs/{target.repo_id.partition('/')[2]}"
    public = {"model_name_or_path": target.base, "model_revision": target.base_commit}
    public |= {"dataset_name": evidence.run["data"]["name"], "output_dir": output_dir}
    public |= {"resume_from_checkpoint": "auto", "stop_after_steps": None}
    return config_yaml(replace(evidence.config, **public), evidence.set_by)  # type: ignore[arg-type]


def _command(session: dict[str, Any], precision: str) -> str:
    """The launch config for as many processes on such devices."""
    processes = session["num_processes"]
    if session["device"].startswith(("x86", "arm", "aarch")):
        more = f"cpu_2.yaml --num_processes {processes}"
        launch = {1: "cpu.yaml", 2: "cpu_2.yaml"}.get(processes, more)
    elif processes == 1:
        name = "one_gpu_fp16" if precision == "fp16" else "one_gpu"
        launch = f"{name}.yaml --mixed_precision {precision}"
    else:
        launch = f"multi_gpu.yaml --num_processes {processes} --mixed_precision {precision}"
    command = "-m loop.train --config recipe.yaml"
    return f"accelerate launch --quiet --config_file launch_configs/{launch} {command}"


def _cell(text: str) -> str:
    """Text for a cell of a table: nothing in it is Markdown or HTML."""
    return html.escape(repr(text)[1:-1], quote=False).replace("|", "&#124;")


def _quote(text: str) -> str:
    """Text as a quotation: nothing in it is HTML, so no sample can end the generated part."""
    return "\n".join(f"> {html.escape(line, quote=False)}" for line in text.splitlines() or [""])
