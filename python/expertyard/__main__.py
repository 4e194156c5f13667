# SPDX-License-Identifier: Apache-2.0
"""`python -m expertyard` is the command `expertyard`."""

import sys

from expertyard.cli import main

if __name__ == "__main__":
    sys.exit(main())
