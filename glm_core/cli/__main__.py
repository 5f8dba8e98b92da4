"""`python -m glm_core.cli`: the same as `glm-core`."""

import sys

from glm_core.cli import main

sys.exit(main())
