"""A LoRA fine-tuning loop for causal language models, written to be audited by reading it."""

import logging

__version__ = "0.1.0"
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at each import it recommends a package for inference
