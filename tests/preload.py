"""What the server of `processes.py` does once, behind its imports, so that none of the runs that it
forks has to."""

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from loop.process.environment import source_sha256

# transformers compiles a thousand expressions at the first model it loads
get_checkpoint_conversion_mapping("bloom")
source_sha256()  # the same for each of them: 60 ms
gc.freeze()  # no collection of a run goes through what was imported, which would copy its pages
