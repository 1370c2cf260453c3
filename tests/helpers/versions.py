"""What the installed versions of PEFT and Transformers can do together."""

import peft
import pytest
from packaging.version import Version
from transformers.integrations import peft as transformers_peft


# Transformers 5.24 wants PEFT 0.22 for `model.add_adapter`, `set_adapter` and the like; PEFT's own functions work
WANTED_PEFT = getattr(transformers_peft, "MIN_PEFT_VERSION", "0")
OLD_PEFT = Version(peft.__version__) < Version(WANTED_PEFT)
needs_adapters_of_transformers = pytest.mark.skipif(
    OLD_PEFT,
    reason=f"model.add_adapter of this Transformers wants PEFT {WANTED_PEFT} or newer",
)
