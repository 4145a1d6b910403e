"""The command line `lavit-lm`: train language models on text and images, and use them.

    fit, validate, test -c RECIPE     train, or compute losses on held-out data, by LightningCLI
    fit-tokenizer -c RECIPE           train VL-GPT's tokenizer and detokenizer
    fit-decoder -c RECIPE             train an image decoder for a model that generates vectors
    fit-codes-decoder -c RECIPE       train one that generates codes, and decodes these
    generate PROMPT --out DIR         generate images for a prompt
    generate --prompts FILE --out DIR     for every prompt of a file, in batches, resumable
    caption IMAGES...                 caption images, or answer a question about them
    caption IMAGES... --out DIR           likewise for any number, or for codes of shards
    export MODEL OUT_DIR              write a directory for `transformers`, or for engines

Exit codes are those of lavit-tok. Each command imports the packages it needs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lavit_tok.cli.parser import (
    DEVICE,
    DTYPE,
    ENGINE,
    IMAGES,
    LIMITS,
    LOCATION,
    MODE_HELP,
    MODES,
    OVERWRITE_FOLDER,
    SEED,
    Argument,
    Command,
    batch_argument,
    images_argument,
    out_argument,
    positive,
    run_command,
    training,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 bad input."""
    return run_command("lavit-lm", "Language models of text and images.", COMMANDS, argv)


LM_LOCATION = "'default', a directory or a Hub id"
MODEL_ARGUMENTS = (
    Argument("--model", default="default", metavar="M", help=LM_LOCATION),
    Argument("--visual-tokenizer", metavar="T", help="replaces the visual tokenizer of the model"),
    DEVICE,
)
BLOCKS = (
    Argument("--split", default="train", metavar="NAME", help="of shards"),
    Argument(
        "--block-size",
        type=positive,
        default=256,
        metavar="N",
        help="items per file of results; a repeated job skips files that exist",
    ),
)
GENERATE = (
    Argument("prompt", nargs="?", metavar="PROMPT", help="description of the image"),
    Argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='a job of many prompts: JSON lines {"prompt": TEXT, "key": TEXT}, parquet with these '
        "columns, or a folder of shards, whose captions are used; random numbers depend on --seed "
        "and the key only",
    ),
    *BLOCKS,
    batch_argument(" of --prompts", 16),
    *ENGINE,
    Argument(
        "--codes-only",
        action="store_true",
        help="with --prompts: write codes but no images, which `lavit-tok decode` makes of them",
    ),
    out_argument("folder for PNG files and codes"),
    OVERWRITE_FOLDER,
    Argument("-n", type=positive, default=4, help="number of images"),
    Argument(
        "--candidates",
        type=positive,
        default=1,
        help="images generated for each one that is kept: those given which the prompt is most "
        "probable",
    ),
    SEED,
    Argument(
        "--guidance", type=float, default=3.0, help="guidance scale of the language model; 1: none"
    ),
    Argument("--top-k", type=positive, default=50, help="sample from the k most probable codes"),
    Argument(
        "--temperature", type=float, default=1.0, help="sampling temperature; 0: greedy decoding"
    ),
    Argument("--decoder", default="default", metavar="D", help=LOCATION),
    Argument("--mode", choices=MODES, help=f"{MODE_HELP}, if the decoder has it"),
    Argument("--steps", type=positive, default=20, help="denoising steps"),
    Argument(
        "--decoder-guidance",
        type=float,
        default=2.0,
        help="guidance scale of the pixel decoder; 1: none",
    ),
    *MODEL_ARGUMENTS,
)
CAPTION = (
    images_argument("+"),
    Argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for JSON lines instead of stdout; IMAGE may then be a folder of shards",
    ),
    *BLOCKS,
    OVERWRITE_FOLDER,
    Argument("--question", help="answer this question about each image instead"),
    Argument(
        "--max-new-tokens",
        type=positive,
        default=64,
        metavar="N",
        help="most tokens of a caption or answer",
    ),
    *LIMITS,
    batch_argument(size=16),
    *MODEL_ARGUMENTS,
)
EXPORT = (
    Argument("model", metavar="MODEL", help=LM_LOCATION),
    Argument("out", type=Path, metavar="OUT_DIR", help="new folder"),
    Argument(
        "--format",
        choices=("plain", "multimodal"),
        default="plain",
        help="plain: a causal LM, for servers; multimodal: for AutoModelForMultimodalLM",
    ),
    Argument(
        "--decoder",
        default="default",
        metavar="D",
        help=f"pixel decoder that the format multimodal names: {LOCATION}",
    ),
    DTYPE,
)
RUN = "lavit_lm.cli.commands"
LM = (
    "lavit_lm.training.module:LanguageModeling",
    "lavit_lm.training.data_module:LanguageDataModule",
)
COMMANDS: dict[str, Command] = {
    "fit": training("train: fit -c recipe.yaml", "lavit-lm", "fit", "fit", *LM),
    "validate": training(
        "losses on the validation split: validate -c recipe.yaml --ckpt_path last",
        *("lavit-lm", "validate", "validate", *LM),
    ),
    "test": training(
        "losses on the test split: test -c recipe.yaml --ckpt_path last",
        *("lavit-lm", "test", "test", *LM),
    ),
    "fit-tokenizer": training(
        "train VL-GPT's tokenizer: fit-tokenizer -c recipe.yaml",
        *("lavit-lm", "fit-tokenizer", "fit"),
        "lavit_lm.training.vlgpt_tokenizer:VLGPTTokenizerTraining",
        IMAGES,
    ),
    "fit-decoder": training(
        "train an image decoder for a model that generates vectors: fit-decoder -c recipe.yaml",
        *("lavit-lm", "fit-decoder", "fit"),
        "lavit_lm.training.emu_decoder:EmuDecoderTraining",
        IMAGES,
    ),
    "fit-codes-decoder": training(
        "train a decoder of vectors that generates codes: fit-codes-decoder -c recipe.yaml",
        *("lavit-lm", "fit-codes-decoder", "fit"),
        "lavit_lm.training.codes_decoder:CodesDecoderTraining",
        LM[1],
    ),
    "generate": Command("images for a prompt", f"{RUN}:generate", GENERATE),
    "caption": Command("a caption for each image", f"{RUN}:caption", CAPTION),
    "export": Command("a directory for transformers", f"{RUN}:export", EXPORT),
}

if __name__ == "__main__":
    sys.exit(main())
