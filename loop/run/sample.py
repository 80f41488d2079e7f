"""One continuation of one prompt, to look at: an impression, never a measurement."""

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

SAMPLE_TOKENS = 40
NO_REPEAT = 3
"""No run of so many tokens is written twice: a small model would write nothing else."""


def sample(
    accelerator: Accelerator, model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: str
) -> str:
    """The greedy continuation of `prompt`, at most SAMPLE_TOKENS tokens.

    Uses no random numbers; keeps the mode."""
    inputs = tokenizer(prompt, return_tensors="pt").to(accelerator.device)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    greedy = GenerationConfig(
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=False,
        no_repeat_ngram_size=NO_REPEAT,
        eos_token_id=eos,
        pad_token_id=eos if pad is None else pad,
    )
    was_training = model.training
    model.eval()
    with torch.no_grad(), accelerator.autocast():
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=greedy,
        )
    model.train(was_training)
    text = tokenizer.decode(tokens[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)
