"""The rest is in pyproject.toml, which cannot install recipes/ as lavit_tok/recipes."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lavit_tok*", "lavit_lm*"]), "lavit_tok.recipes"],
    package_dir={"lavit_tok.recipes": "recipes"},
)
