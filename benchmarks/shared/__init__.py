"""What the scripts share: command lines, data, tokenizers, metrics, timing, resumable stages,
reports."""
