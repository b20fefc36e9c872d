"""`python -m softkvm.cli`: the command where its script is not on the PATH."""

import sys

from softkvm.cli import main

sys.exit(main())
