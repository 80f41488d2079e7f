"""A LoRA fine-tuning loop for causal language models, written to be audited by reading it."""

__version__ = "0.1.0"
