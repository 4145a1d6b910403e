import sys

from lavit_lm.cli.parser import main

sys.exit(main())
