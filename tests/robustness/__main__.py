"""The long campaign: python -m tests.robustness --minutes 30 [--only images,kills]."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from robustness.campaign import main

    sys.exit(main())
