"""Lets one thread at a time build models, because `transformers` changes the whole process while it builds one.

It swaps `torch.nn.init`'s functions and torch's default dtype for a while and puts back what it found; two threads
that do so at once leave the process with the wrong ones, and models built later are not initialised.
"""

from __future__ import annotations

import threading

CONSTRUCTION = threading.RLock()
"""Hold it around every `from_config`, `from_pretrained` and `_init_weights`."""
