"""``python -m rorqual``: the rorqual command."""

import sys

from rorqual.cli.main import main

sys.exit(main())
