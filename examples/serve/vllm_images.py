"""Guided images by vLLM from an exported directory: a logits processor, two sequences an image.

    python examples/serve/vllm_images.py DIRECTORY --scale 3 --count 64 "a red bag"

Runs in vLLM's environment (docs/serving.md), which needs nothing of this package; guided_pairs.py
beside this file has the arithmetic. Guidance is LaVIT's (section 3.2). An image whose two sequences
differ is an error. Prints the codes of every image as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from typing import Any

# In this process, so that all requests are there before the first step: both of a pair are in it.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from guided_pairs import Pairs
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotLogitsProcessor

CODE = re.compile(r"<\|vis_(?:(\d+)_)?(\d+)\|>")
"""Its groups are the stage of a nested code, and the code."""


class GuidedPairs(LogitsProcessor, SlotLogitsProcessor):
    """Pairs for both of vLLM's interfaces: of model runner V1 (CPU), and of V2 (GPU).

    V1 reports which requests move where in the batch, V2 gives the slot of each request.
    """

    def __init__(self, vllm_config: Any, *state: Any) -> None:
        self.pairs = Pairs()

    def is_argmax_invariant(self) -> bool:
        return False

    # V1

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:  # removed, added, moved: the order that vLLM demands
            self.pairs.add(index, None)
        for index, params, *_ in batch_update.added:
            self.pairs.add(index, params.extra_args)
        for first, second, direction in batch_update.moved:
            self.pairs.move(first, second, direction == MoveDirectionality.SWAP)

    # V2

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return bool(self.pairs.add(req_idx, sampling_params.extra_args))

    # Both

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        slots = range(len(logits)) if ctx is None else ctx.expanded_idx_mapping.tolist()
        guided: torch.Tensor = self.pairs.apply(logits, slots)
        return guided


def requests(
    tokenizer: Any, prompts: list[str], scale: float, seed: int, codes: int, temperature: float
) -> tuple[list[dict[str, Any]], list[SamplingParams]]:
    """Two requests for each prompt, for images of exactly so many codes."""
    vocabulary = tokenizer.get_vocab()
    names = {name: match[1] for name in vocabulary if (match := CODE.fullmatch(name))}
    visual, grammar = [vocabulary[name] for name in names], None
    if None not in names.values():  # nested codes: which are allowed depends on their rank
        stages = len(set(names.values()))
        ranks = [stage for stage in range(stages) for _ in range(4 ** max(0, (stage - 1) // 3))]
        if codes > len(ranks):
            raise SystemExit(f"--codes: expected at most {len(ranks)}, got {codes}")
        image = "".join(rf"<\|vis_{stage:02d}_\d+\|>" for stage in ranks[:codes])
        grammar = StructuredOutputsParams(regex=image)
    inputs, params = [], []
    for number, prompt in enumerate(prompts):
        for text, factor in ((f"{prompt}<|img|>", scale), ("<|img|>", 0.0)):
            extra = {"guidance_pair": number, "guidance_scale": factor, "seed": seed + number}
            extra |= {"temperature": temperature, "top_k": 50}
            inputs.append({"prompt_token_ids": tokenizer(text).input_ids})
            params.append(
                SamplingParams(
                    temperature=0.0, max_tokens=codes, min_tokens=codes,
                    allowed_token_ids=visual, extra_args=extra, skip_special_tokens=False,
                    structured_outputs=grammar,
                )
            )  # fmt: skip
    return inputs, params


def main() -> None:
    """Generate images and print their codes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", help="what MultimodalLM.export wrote")
    parser.add_argument("prompt")
    parser.add_argument("--count", type=int, default=8, help="images")
    parser.add_argument("--codes", type=int, default=21, help="of an image")
    parser.add_argument("--scale", type=float, default=3.0, help="of guidance")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the most likely ids")
    parser.add_argument("--seed", type=int, default=0, help="of the first image")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory", type=float, default=0.5, help="fraction of memory for vLLM")
    args = parser.parse_args()
    if args.scale <= 0:
        parser.error(f"--scale: expected a positive number, got {args.scale}")
    llm = LLM(
        args.directory,
        dtype=args.dtype,
        enforce_eager=True,
        logits_processors=[GuidedPairs],
        max_num_seqs=2 * args.count,
        max_model_len=128,
        gpu_memory_utilization=args.memory,
    )
    prompts = [args.prompt] * args.count
    options = (args.scale, args.seed, args.codes, args.temperature)
    start = time.monotonic()
    outputs = llm.generate(*requests(llm.get_tokenizer(), prompts, *options), use_tqdm=False)
    seconds = time.monotonic() - start
    texts = [output.outputs[0].text for output in outputs]
    for guided, partner in zip(texts[::2], texts[1::2], strict=True):
        if guided != partner:
            raise SystemExit("the two sequences of an image differ: they were not in one step")
        print(json.dumps({"codes": [int(code) for _, code in CODE.findall(guided)]}))
    print(json.dumps({"images": args.count, "seconds": round(seconds, 3)}))


if __name__ == "__main__":
    main()
