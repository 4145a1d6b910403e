from lavit_tok.cli.parser import main

__all__ = ["main"]
