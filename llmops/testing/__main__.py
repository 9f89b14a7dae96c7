"""`python -m llmops.testing my_package.my_specs:SPEC`: the same as `llmops conform`."""

import sys

from llmops.testing._command import main

sys.exit(main())
