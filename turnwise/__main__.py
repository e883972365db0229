"""`python -m turnwise` is `turnwise`."""

import sys

from turnwise.cli import main

sys.exit(main())
