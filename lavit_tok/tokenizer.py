"""VisualTokenizer: the rooms 1 to 6, wired. No maths here.

images -preprocess-> pixels -features-> [b n d] -score-> [b n 2] -select-> keep [b n] -merge-> [total d]
       -project-> [total c] -quantize-> VisualCodes -lookup-> [total c] -reconstruct-> [b n d]
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from lavit_tok.checkpoints.weights import empty, find_directory, load_weights, save_weights
from lavit_tok.codes import RaggedLayout, VisualCodes
from lavit_tok.config import ConfigError, TokenizerConfig
from lavit_tok.decode.reconstructor import Reconstructor
from lavit_tok.encode import allocation
from lavit_tok.encode.allocation import Budget
from lavit_tok.encode.continuous import ContinuousPath
from lavit_tok.encode.image_processor import VisualImageProcessor
from lavit_tok.encode.merger import Merger
from lavit_tok.encode.quantizer import Quantizer
from lavit_tok.encode.selector import Selector
from lavit_tok.encode.vision_encoder import VisionEncoder


class VisualTokenizer(nn.Module, PyTorchModelHubMixin):
    """Pictures <-> a dynamic number of discrete codes (LaVIT, ICLR 2024).

    Args:
        config: the sizes; the shipped laptop model's by default.
        encoder: a frozen VisionEncoder to use; built with random weights from config.encoder by default.
        image_processor: the preprocessing; by default resizing to the encoder's square, CLIP mean and std.
    """

    reconstructor: Reconstructor
    continuous: ContinuousPath | None

    def __init__(
        self,
        config: TokenizerConfig | None = None,
        encoder: VisionEncoder | None = None,
        image_processor: VisualImageProcessor | None = None,
    ) -> None:
        super().__init__()
        self.config = config or TokenizerConfig()
        c = self.config
        self.encoder = encoder or VisionEncoder.from_config(c.encoder, c.encoder_norm)
        if self.encoder.config.hidden_size != c.width:
            raise ConfigError(
                f"encoder: expected features of width {c.width}, got {self.encoder.config.hidden_size}"
            )
        self.image_processor = image_processor or VisualImageProcessor(c.image_size)
        if self.image_processor.size != c.image_size:
            raise ConfigError(
                f"image_processor: expected size {c.image_size}, the encoder's image_size, "
                f"got {self.image_processor.size}"
            )
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
        self.reconstructor = None  # type: ignore[assignment]  # in a tokenizer that only encodes
        if c.reconstructor_depth:
            self.reconstructor = Reconstructor(
                c.width,
                c.num_patches,
                c.code_dim,
                c.reconstructor_depth,
                c.num_heads,
                c.mlp_width,
                c.layer_norm_eps,
            )
        self.continuous = None
        if c.continuous_width:
            depth, out = c.continuous_depth, c.continuous_width
            self.continuous = ContinuousPath(
                c.width,
                depth,
                c.num_heads,
                c.mlp_width,
                c.layer_norm_eps,
                c.attention,
                out,
                c.positions,
            )
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.quantizer.codebook.embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.quantizer.projection.parameters()).dtype

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the codebook: equal for tokenizers whose codes mean the same rows.

        Taken of the rows rounded to float16, so that a copy saved in half precision has the same.
        """
        rows = self.quantizer.codebook.embeddings.detach().to("cpu", torch.float16)
        return hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]

    @torch.no_grad()
    def encode(
        self,
        images: Any,
        budget: Budget = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> VisualCodes:
        """Codes of one image or of a batch. Deterministic unless sample=True.

        Args:
            images: PIL image, path, bytes, uint8 [h w 3] / [3 h w] array or tensor, or a list or 4-D batch of them.
            budget: None lets the selector decide; an int is the exact number of codes an image; a fraction in (0, 1]
                of the batch's patches is spent where keep scores are highest. At least one code an image.
            sample: Gumbel sampling of the keep decision, as in training.
            generator: its source of randomness.

        Raises:
            ImageError: naming the first picture that cannot be used, and why.
            ValueError: empty batch or impossible budget.
        """
        return self.encode_pixels(self.preprocess(images), budget, sample, generator)

    @torch.no_grad()
    def encode_pixels(
        self,
        pixels: Float[Tensor, "batch 3 h w"],
        budget: Budget = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> VisualCodes:
        """encode, from pixels that preprocess gave."""
        features = self.features(pixels)
        keep = self.select(self.score(features), budget, sample, generator)
        codes = self.quantize(self.project(self.merge(features, keep)), keep.sum(1))
        return VisualCodes(codes.values, codes.lengths, keep, codes.codebook_size)

    def preprocess(self, images: Any) -> Float[Tensor, "batch 3 h w"]:
        """Any image input -> normalized pixels of the model's size, on the model's device and in its dtype."""
        uint8 = self.image_processor.to_uint8(images).to(self.device)
        return self.image_processor.normalize(uint8).to(self.dtype)

    def features(
        self, pixels: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch patches width"]:
        """Patch features of the frozen encoder. Raises ValueError for pixels of another size or with NaN."""
        size = self.config.image_size
        if (
            pixels.ndim != 4
            or tuple(pixels.shape[1:]) != (3, size, size)
            or not pixels.is_floating_point()
        ):
            raise ValueError(
                f"pixels: expected float [batch 3 {size} {size}] from preprocess(), "
                f"got {pixels.dtype} {list(pixels.shape)}"
            )
        if len(pixels) == 0:
            raise ValueError("pixels: expected at least one image, got an empty batch")
        if not bool(pixels.isfinite().all()):
            raise ValueError(
                "pixels hold NaN or infinity: every code of those images would be arbitrary"
            )
        return self.encoder(pixels)

    def score(
        self, features: Float[Tensor, "batch patches width"]
    ) -> Float[Tensor, "batch patches 2"]:
        """Log-probabilities, float32: index 0 keep, index 1 drop; with config.dither its fixed pattern is in them."""
        log_probs = self.selector(features)
        return allocation.dithered(log_probs) if self.config.dither else log_probs

    def select(
        self,
        log_probs: Float[Tensor, "batch patches 2"],
        budget: Budget = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Bool[Tensor, "batch patches"]:
        """Keep mask; see encode for the arguments."""
        return allocation.select(log_probs, budget, sample, generator, self.config.dither)

    def merge(
        self, features: Float[Tensor, "batch patches width"], keep: Bool[Tensor, "batch patches"]
    ) -> Float[Tensor, "total width"]:
        """Kept patches with the dropped ones absorbed: raster order, images one after another."""
        return self.merger(features, keep)

    def project(self, merged: Float[Tensor, "total width"]) -> Float[Tensor, "total code_dim"]:
        """Merged features -> unit-norm vectors of the code space, float32."""
        return self.quantizer.project(merged)

    def quantize(
        self, z: Float[Tensor, "total code_dim"], lengths: Int64[Tensor, " batch"]
    ) -> VisualCodes:
        """Exact nearest codebook rows, in float32."""
        return VisualCodes(
            self.quantizer.codebook.nearest(z), lengths, codebook_size=self.config.codebook_size
        )

    def lookup(self, codes: VisualCodes) -> Float[Tensor, "total code_dim"]:
        """Codebook rows of all codes. Raises CodeError for codes of another codebook."""
        codes.check(self.config.codebook_size)
        return self.quantizer.codebook.lookup(codes.values.to(self.device))

    @torch.no_grad()
    def reconstruct_features(self, codes: VisualCodes) -> Float[Tensor, "batch patches width"]:
        """The encoder's features of every patch, as far as the codes tell. Raises CodeError for codes that misfit."""
        if self.reconstructor is None:
            raise ValueError(
                "this tokenizer has no reconstructor (config.reconstructor_depth is 0): it only encodes"
            )
        codes.check_lengths(self.config.num_patches)
        return self.reconstructor.ragged(
            self.lookup(codes), RaggedLayout(codes.lengths.to(self.device))
        )

    @torch.no_grad()
    def embed(
        self,
        images: Any,
        budget: Budget = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
        keep: Bool[Tensor, "batch patches"] | None = None,
    ) -> Float[Tensor, "total llm_width"]:
        """Continuous vectors for a language model: one for each code that encode gives, in the same order.

        Args:
            images, budget, sample, generator: see encode.
            keep: patches to keep instead, e.g. `codes.keep`, so that codes and vectors share one sampled mask.

        Raises:
            ImageError, ValueError: as encode; or a tokenizer without a continuous path.
        """
        self._continuous()  # before anything is computed
        return self.embed_features(
            self.features(self.preprocess(images)), budget, sample, generator, keep
        )

    @torch.no_grad()
    def embed_features(
        self,
        features: Float[Tensor, "batch patches width"],
        budget: Budget = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
        keep: Bool[Tensor, "batch patches"] | None = None,
    ) -> Float[Tensor, "total llm_width"]:
        """embed, from features."""
        if keep is None:
            keep = self.select(self.score(features), budget, sample, generator)
        return self._continuous()(features, keep.to(features.device))

    def _continuous(self) -> ContinuousPath:
        if self.continuous is None:
            raise ValueError(
                "this tokenizer has no continuous path (config.continuous_width is 0): it gives codes, not vectors for "
                "a language model; released LaVIT weights keep it in language_model/visual_weight.bin"
            )
        return self.continuous

    # Files

    def save_pretrained(
        self, save_directory: Any, *, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """Write config.json, preprocessor_config.json and model.safetensors, floats as `dtype` (e.g. torch.float16 to halve the file)."""
        self._save_dtype = dtype
        return super().save_pretrained(save_directory, **kwargs)

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
        """The shipped model ("default", no network), a directory, or a Hub id.

        Raises:
            ConfigError, WeightsError: with every difference listed; nothing in the directory is executed.
        """
        directory = find_directory(name, "tokenizer", **hub)
        config = TokenizerConfig.from_json(directory / "config.json")
        image_processor = VisualImageProcessor.from_pretrained(directory)
        tokenizer = empty(lambda: cls(config, image_processor=image_processor), dtype)
        load_weights(tokenizer, directory)
        return tokenizer.to(device)
