"""`python -m nested_learning` is `nested-learning`."""

import sys

from nested_learning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
