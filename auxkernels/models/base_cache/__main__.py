"""`python -m auxkernels.models.base_cache`: see `command`."""

import sys

from .command import main

sys.exit(main())
