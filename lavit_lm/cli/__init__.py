from lavit_lm.cli.parser import main

__all__ = ["main"]
