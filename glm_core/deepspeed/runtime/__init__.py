"""Parts of the interface that scripts import by DeepSpeed's longer paths."""

import sys

from glm_core.deepspeed.runtime import seeding

utils = seeding
sys.modules[__name__ + ".utils"] = seeding
