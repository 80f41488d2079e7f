"""What the server of `processes.py` does once, behind its imports, so that none of the runs that it
forks has to."""

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping(
    "bloom"
)  # transformers compiles a thousand expressions at the first model it loads
gc.freeze()  # no collection of a run goes through what was imported, which would copy its pages
