"""VisualTokenizer: the stages of encode/ and the reconstructor, wired; no computation of its own.

images -preprocess-> pixels -features-> [b n d] -score-> [b n 2] -select-> keep [b n]
       -merge-> [total d] -project-> [total c] -quantize-> VisualCodes
       -lookup-> [total c] -reconstruct_features-> [b n d]

Nested codes have no merge, project, quantize and lookup: [b n d], keep -encode_kept-> VisualCodes.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lavit_tok.checkpoints.files import atomic_files
from lavit_tok.checkpoints.weights import (
    check_layers,
    empty,
    find_directory,
    load_weights,
    save_weights,
)
from lavit_tok.codes import RaggedLayout, VisualCodes, first_ranks
from lavit_tok.config import ConfigError, TokenizerConfig
from lavit_tok.decode.nested_reconstructor import NestedReconstructor
from lavit_tok.decode.reconstructor import Reconstruction, Reconstructor
from lavit_tok.encode import allocation
from lavit_tok.encode.allocation import Budget
from lavit_tok.encode.continuous import ContinuousPath
from lavit_tok.encode.error_head import ErrorHead, rank_log_odds
from lavit_tok.encode.image_files import Images
from lavit_tok.encode.image_processor import VisualImageProcessor
from lavit_tok.encode.merger import Merger
from lavit_tok.encode.nested_quantizer import NestedQuantizer
from lavit_tok.encode.quantizer import Quantizer, fingerprint
from lavit_tok.encode.rate_control import COLOR_ERROR_SCALE, RateControl, Request
from lavit_tok.encode.rate_distortion import Quality
from lavit_tok.encode.selector import Selector
from lavit_tok.encode.vision_encoder import VisionEncoder
from lavit_tok.nn.precision import all_finite, without_autocast


class VisualTokenizer(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="lavit-tok",
    tags=["image-tokenizer", "vector-quantization"],
    paper_url="https://arxiv.org/abs/2309.04669",
):
    """Images <-> a dynamic number of discrete codes (LaVIT, ICLR 2024).

    Args:
        config: sizes and options; by default those of the shipped model.
        encoder: a frozen VisionEncoder; by default one with random weights, from config.encoder.
        image_processor: the preprocessing; by default square resizing to the encoder's image size.

    Raises:
        ConfigError: an encoder or image processor whose size differs from the config's.
    """

    name_or_path: str = ""  # what from_pretrained loaded
    merger: Any
    mean_feature: Tensor
    reconstructor: Any
    continuous: ContinuousPath | None

    def __init__(
        self,
        config: TokenizerConfig | None = None,
        encoder: VisionEncoder | None = None,
        image_processor: VisualImageProcessor | None = None,
    ) -> None:
        super().__init__()
        self.config = c = config or TokenizerConfig()
        self.encoder = encoder or VisionEncoder.from_config(c.encoder, c.encoder_norm)
        self.image_processor = image_processor or VisualImageProcessor(c.image_size)
        width, size = self.encoder.config.hidden_size, self.image_processor.size
        if width != c.width:
            raise ConfigError(f"encoder: expected features of width {c.width}, got {width}")
        if size != c.image_size:
            raise ConfigError(
                f"image_processor: expected size {c.image_size}, the encoder's image_size, "
                f"got {size}"
            )
        self.nested = c.sequence == "nested"
        self.selector: Any = None  # nested codes have a fixed order, and merge nothing
        self.merger = None
        self.quantizer: Any
        if self.nested:
            self.quantizer = NestedQuantizer(
                c.width, c.codebook_size, c.code_dim, c.num_patches, c.patch_dim
            )
        else:
            self.selector = Selector(c.width, c.layer_norm_eps)
            self.merger = Merger(
                c.width,
                c.merger_depth,
                c.num_heads,
                c.mlp_width,
                c.layer_norm_eps,
                c.attention,
                c.positions,
            )
            self.quantizer = Quantizer(c.width, c.codebook_size, c.code_dim)
        self.reconstructor = None  # in a tokenizer that only encodes
        if c.reconstructor_depth:
            sizes = (c.reconstructor_depth, c.num_heads, c.mlp_width, c.layer_norm_eps)
            if self.nested:
                self.reconstructor = NestedReconstructor(
                    c.width, c.num_patches, c.patch_dim, *sizes, 3 * c.color_cells**2
                )
            else:
                self.reconstructor = Reconstructor(c.width, c.num_patches, c.code_dim, *sizes)
        if c.error_hidden:
            kinds = ("cosine", "psnr") if c.color_cells else ("cosine",)
            heads = {kind: ErrorHead(c.width, c.num_patches, c.error_hidden) for kind in kinds}
            self.error_heads = nn.ModuleDict(heads)
            self.register_buffer("mean_feature", torch.zeros(c.width))
        self.continuous = None
        if c.continuous_width:
            self.continuous = ContinuousPath(
                c.width,
                c.continuous_depth,
                c.num_heads,
                c.mlp_width,
                c.layer_norm_eps,
                c.attention,
                c.continuous_width,
                c.positions,
            )
        self.eval()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.quantizer.codebook.embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; selector and codebook are always float32."""
        if self.nested:
            return next(self.encoder.parameters()).dtype
        return next(self.quantizer.projection.parameters()).dtype

    @property
    def stages(self) -> int:
        """Stages of nested codes (nn/nested_order.py), each with a table; 0 for other codes."""
        return len(self.quantizer.codebook.embeddings) if self.nested else 0

    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the codebook, also of a copy in half precision."""
        return fingerprint(self.quantizer.codebook.embeddings)

    @torch.no_grad()
    def encode(
        self,
        images: Images,
        budget: Budget = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
        *,
        quality: Quality | None = None,
        rate: float | None = None,
        verify: bool = False,
        exact: bool = True,
        min_codes: int = 1,
        max_codes: int | None = None,
    ) -> VisualCodes:
        """Encode one image or a batch; deterministic unless sample=True.

        Computed in the dtype of the weights (float32 by default), whatever autocast or default
        dtype surround the call.

        Args:
            images: PIL image, path, bytes, uint8 [h w 3] / [3 h w] array or tensor, or a list or
                4-D batch of them.
            budget: None lets the tokenizer decide; an int is the exact number of codes per image;
                a fraction in (0, 1] of the batch's patches is spent where the predicted gain, or
                else the keep score, is highest. At least one code per image.
            sample: Gumbel sampling of the keep decision, as in training.
            generator: its source of randomness.
            quality: the fewest codes that reach this centered cosine between the encoder's features
                and the reconstructed ones, or ("psnr", dB) of the patches' colors.
            rate: add codes while each reduces the error by more than this: the error that
                config.priced names; config.price by default.
            verify: every image must reach the quality, by measurement; an error where all codes do
                not suffice.
            exact: quality and rate only start from the predicted number of codes, and measure up to
                six others; False takes the prediction.
            min_codes: fewest codes of an image.
            max_codes: most codes of an image; None for all patches.

        Raises:
            ImageError: naming the first image that cannot be used, and why.
            ValueError: empty batch; an impossible budget or quality, or both; a quality that this
                tokenizer cannot predict, or, with verify, cannot reach.
        """
        request = Request(budget, quality, rate, verify, exact, min_codes, max_codes)
        return self.encode_pixels(self.preprocess(images), budget, sample, generator, request)

    @torch.no_grad()
    @without_autocast
    def encode_pixels(
        self,
        pixels: Float[Tensor, "batch 3 h w"],
        budget: Budget = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
        request: Request | None = None,
    ) -> VisualCodes:
        """encode, from the output of preprocess; `request` takes precedence over `budget`."""
        features = self.features(pixels)
        request = Request(budget) if request is None else request
        predicts = self.config.error_hidden > 0 and not sample
        controlled = request.quality is not None or request.rate is not None or request.limited
        if not controlled and not predicts:
            keep = self.select(self.score(features), request.budget, sample, generator)
            return self.encode_kept(features, keep)
        if sample:
            raise ValueError("sample: expected no quality, rate, min_codes or max_codes beside it")
        return RateControl(self, features, pixels).answer(request)

    def encode_kept(
        self,
        features: Float[Tensor, "batch patches width"],
        keep: Bool[Tensor, "batch patches"],
        error: Float[Tensor, " batch"] | None = None,
        nested_codes: Int64[Tensor, "batch most"] | None = None,
    ) -> VisualCodes:
        """The codes of the kept patches.

        Args:
            features: of every patch.
            keep: the patches that codes are made of.
            error: passed on as predicted_error.
            nested_codes: of a tokenizer of nested codes, the first codes if they are known.

        Raises:
            ValueError: patches of nested codes that are not the first ones of the order.
        """
        size, lengths = self.config.codebook_size, keep.sum(1)
        if not self.nested:
            values = self.quantize(self.project(self.merge(features, keep)), lengths).values
            return VisualCodes(values, lengths, keep, size, False, error)
        if not torch.equal(keep, first_ranks(lengths, keep.shape[1])):
            raise ValueError(
                "nested codes are of the first patches of the nested order, "
                "and this mask keeps others"
            )
        layout = RaggedLayout(lengths)
        if nested_codes is None:
            nested_codes = self.quantizer.encode(features, layout.width)[0]
        values = layout.unpad(nested_codes)
        return VisualCodes(values, lengths, keep, size, True, error)

    def predicted_errors(
        self,
        features: Float[Tensor, "batch patches width"],
        kind: str = "cosine",
        left: Float[Tensor, "batch most"] | None = None,
        summary: Float[Tensor, "batch inputs"] | None = None,
    ) -> Float[Tensor, "batch most"]:
        """Predicted error of every image with 1, 2, 3, ... codes.

        Args:
            features: of the encoder.
            kind: "cosine" for 1 - centered cosine, "psnr" for the root mean squared error of
                colors.
            left: residual errors of the first codes, as quantizer.encode returns them; None
                computes all n.
            summary: of the features, as the head's `summary` returns it; None computes it.

        Raises:
            ValueError: a tokenizer without an error head of this kind.
        """
        if not self.config.error_hidden or kind not in self.error_heads:
            raise ValueError(
                f"this tokenizer has no head that predicts the error of kind {kind!r}: quality= "
                "works with verify=True, which measures instead; or give an integer budget"
            )
        if left is None:
            left = self.quantizer.encode(features, features.shape[1])[1]
        predicted = self.error_heads[kind](features, left, summary)
        return predicted / COLOR_ERROR_SCALE if kind == "psnr" else predicted

    def priced_errors(
        self,
        features: Float[Tensor, "batch patches width"],
        left: Float[Tensor, "batch most"] | None = None,
        summary: Float[Tensor, "batch inputs"] | None = None,
    ) -> Float[Tensor, "batch most"]:
        """The predicted error that config.priced names; arguments as in predicted_errors."""
        if self.config.priced == "colors":
            return self.predicted_errors(features, "psnr", left, summary).square()
        return self.predicted_errors(features, "cosine", left, summary)

    def preprocess(self, images: Images) -> Float[Tensor, "batch 3 h w"]:
        """Any images -> normalized pixels, on the model's device and in its dtype."""
        uint8 = self.image_processor.to_uint8(images).to(self.device)
        return self.image_processor.normalize(uint8).to(self.dtype)

    def features(
        self, pixels: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch patches width"]:
        """Patch features of the frozen encoder.

        Raises:
            ValueError: pixels of another size or with NaN or infinity.
        """
        size = self.config.image_size
        if not pixels.is_floating_point() or tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixels: expected float [batch 3 {size} {size}] from preprocess(), "
                f"got {pixels.dtype} {list(pixels.shape)}"
            )
        if len(pixels) == 0:
            raise ValueError("pixels: expected at least one image, got an empty batch")
        if not all_finite(pixels):
            raise ValueError(
                "pixels contain NaN or infinity: every code of those images would be arbitrary"
            )
        return self.encoder(pixels)

    def score(
        self, features: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch patches 2"]:
        """Log-probabilities in float32, keep first; with config.dither plus the fixed pattern."""
        if self.nested:  # log-odds of a rank: its predicted gain over the price of a code
            errors = self.priced_errors(features) if self.config.error_hidden else None
            odds = rank_log_odds(errors, self.config.price, features.shape[:2], features.device)
            return torch.stack([F.logsigmoid(odds), F.logsigmoid(-odds)], -1)
        log_probs = self.selector(features)
        return allocation.dithered(log_probs) if self.config.dither else log_probs

    def select(
        self,
        log_probs: Float[Tensor, "batch patches 2"],
        budget: Budget = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Bool[Tensor, "batch patches"]:
        """The keep mask; see encode for the arguments. Of nested codes the first are kept."""
        dither = self.config.dither and not self.nested
        keep = allocation.select(log_probs, budget, sample, generator, dither)
        return first_ranks(keep.sum(1), keep.shape[1]) if self.nested else keep

    def merge(
        self, features: Float[Tensor, "batch patches width"], keep: Bool[Tensor, "batch patches"]
    ) -> Float[Tensor, "total width"]:
        """Merge other patches into the kept ones, in raster order, images concatenated.

        Raises:
            ValueError: a tokenizer of nested codes, which merges nothing.
        """
        self._require_merged()
        return self.merger(features, keep)

    def project(self, merged: Float[Tensor, "total width"]) -> Float[Tensor, "total code_dim"]:
        """Merged features -> unit-norm vectors of the code space, in float32.

        Raises:
            ValueError: a tokenizer of nested codes, likewise in quantize.
        """
        self._require_merged()
        return self.quantizer.project(merged)

    def quantize(
        self, z: Float[Tensor, "total code_dim"], lengths: Int64[Tensor, " batch"]
    ) -> VisualCodes:
        """The exact nearest codebook entries, in float32; `lengths` gives the codes per image."""
        self._require_merged()
        values = self.quantizer.codebook.nearest(z)
        return VisualCodes(values, lengths, codebook_size=self.config.codebook_size)

    def _require_merged(self) -> None:
        if self.nested:
            raise ValueError(
                "nested codes are made of residuals, not of merged features: use encode_kept"
            )

    def lookup(self, codes: VisualCodes) -> Float[Tensor, "total code_dim"]:
        """Codebook entries of all codes.

        Raises:
            CodeError: codes of another codebook.
            ValueError: a tokenizer of nested codes, whose entries depend on their rank.
        """
        codes.check(self.config.codebook_size)
        if self.nested:
            raise ValueError(
                "an entry of nested codes depends on its rank: use the codebook's decode"
            )
        return self.quantizer.codebook.lookup(codes.values.to(self.device))

    def reconstruct_features(self, codes: VisualCodes) -> Float[Tensor, "batch patches width"]:
        """The encoder's features of every patch, reconstructed from the codes.

        Raises:
            CodeError: codes of another codebook, or none or too many for an image.
            ValueError: a tokenizer without a reconstructor.
        """
        return self.reconstruct_patches(codes).features

    @torch.no_grad()
    @without_autocast
    def reconstruct_patches(self, codes: VisualCodes) -> Reconstruction:
        """Features and colors of every patch; no columns of colors without color_cells."""
        if self.reconstructor is None:
            raise ValueError(
                "this tokenizer only encodes: it has no reconstructor (config.reconstructor_depth "
                "is 0)"
            )
        codes.check(self.config.codebook_size)
        codes.check_lengths(self.config.num_patches)
        found: Reconstruction = self.reconstructor.of_codes(
            codes.to(self.device), self.quantizer.codebook
        )
        return found

    @torch.no_grad()
    @without_autocast
    def embed(
        self,
        images: Images,
        budget: Budget = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
        keep: Bool[Tensor, "batch patches"] | None = None,
    ) -> Float[Tensor, "total llm_width"]:
        """Continuous vectors for a language model, one per code of encode, in the same order.

        Args:
            images: see encode.
            budget: see encode.
            sample: see encode.
            generator: see encode.
            keep: keep mask to use instead, e.g. `codes.keep`, so that codes and vectors share a
                sampled mask.

        Raises:
            ImageError, ValueError: as encode; or a tokenizer without a continuous path.
        """
        self._continuous()  # fail before anything is computed
        features = self.features(self.preprocess(images))
        return self.embed_features(features, budget, sample, generator, keep)

    @torch.no_grad()
    @without_autocast
    def embed_features(
        self,
        features: Float[Tensor, "batch patches width"],
        budget: Budget = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
        keep: Bool[Tensor, "batch patches"] | None = None,
    ) -> Float[Tensor, "total llm_width"]:
        """Continuous vectors from features; see embed."""
        if keep is None:
            keep = self.select(self.score(features), budget, sample, generator)
        return self._continuous()(features, keep.to(features.device))

    def _continuous(self) -> ContinuousPath:
        if self.continuous is None:
            raise ValueError(
                "this tokenizer has no continuous path (config.continuous_width is 0), only codes; "
                "released LaVIT weights store it in language_model/visual_weight.bin"
            )
        return self.continuous

    def save_pretrained(
        self, save_directory: Any, *, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """Write config.json, preprocessor_config.json and model.safetensors.

        Args:
            save_directory: new or existing directory.
            dtype: of the floats in the file, e.g. torch.float16 to halve it.
            kwargs: of huggingface_hub's PyTorchModelHubMixin, e.g. push_to_hub.
        """
        self._save_dtype = dtype
        kwargs.setdefault("repo_id", Path(save_directory).name)  # not that of the temporary folder
        card = Path(save_directory) / "README.md"
        with atomic_files(Path(save_directory)) as folder:
            if card.is_file():  # a model card is written only where there is none
                shutil.copy(card, folder)
            return super().save_pretrained(folder, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        text = json.dumps(self.config.to_dict(), indent=2, sort_keys=True)
        (Path(save_directory) / "config.json").write_text(text + "\n")
        self.image_processor.save_pretrained(save_directory)
        save_weights(self, save_directory, getattr(self, "_save_dtype", None))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | os.PathLike[str] = "default",
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **hub: Any,
    ) -> VisualTokenizer:
        """Load the shipped model ("default", no network), a directory or a Hub id.

        Nothing in the directory is executed.

        Raises:
            ConfigError, WeightsError: listing every difference.
        """
        directory = find_directory(name, "tokenizer", **hub)
        config = TokenizerConfig.from_json(directory / "config.json")
        image_processor = VisualImageProcessor.from_pretrained(directory)
        check_layers(config.to_dict(), directory, label="config.json")
        build = lambda: cls(config, image_processor=image_processor)  # noqa: E731
        tokenizer = empty(build, dtype, directory)
        load_weights(tokenizer, directory)
        tokenizer.name_or_path = str(name)
        return tokenizer.to(device)
