"""VisualImageProcessor for AutoImageProcessor, whatever its backend."""

from __future__ import annotations

from typing import Any

from transformers import AutoImageProcessor

from lavit_lm.auto.configuration_lavit import LavitConfig
from lavit_tok import VisualImageProcessor

CLASSES: Any = {"pil": VisualImageProcessor, "torchvision": VisualImageProcessor}
AutoImageProcessor.register(LavitConfig, image_processor_classes=CLASSES, exist_ok=True)
