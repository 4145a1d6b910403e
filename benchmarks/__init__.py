"""One script for each question; `python -m benchmarks.NAME` or `python benchmarks/NAME.py`."""
