"""What the scripts share: command lines, data, tokenizers, metrics, timing, stages, reports."""
