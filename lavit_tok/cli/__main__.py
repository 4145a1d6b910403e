import sys

from lavit_tok.cli.parser import main

sys.exit(main())
