"""lmms-eval's interface to MultimodalLM: captions and answers on public data sets.

    python -m lmms_eval --model lavit_lm --model_args pretrained=default --tasks coco_karpathy_test

lmms-eval finds `manifest` by the entry point "lmms_eval.models". Nothing else imports this module,
so that lmms-eval need not be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms

from lavit_lm.multimodal import MultimodalLM


def manifest() -> Any:
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("lavit_lm", simple_class_path=f"{__name__}.LavitLM")


class LavitLM(lmms):
    """A MultimodalLM as lmms-eval calls it: images first, then the task's text.

    Args:
        pretrained: "default", a directory or a Hub id.
        visual_tokenizer: by default the one that the model names.
        device: torch device.
        batch_size: requests that are generated together.
    """

    def __init__(
        self,
        pretrained: str = "default",
        visual_tokenizer: str | None = None,
        device: str = "cpu",
        batch_size: int | str = 1,
        **_: Any,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"visual_tokenizer": visual_tokenizer, "device": device}
        self.lm = MultimodalLM.from_pretrained(pretrained, decoder=None, **options)
        self.batch_size = int(batch_size)

    def prompt(
        self, context: str, doc_to_visual: Any, doc_id: Any, task: str, split: str
    ) -> list[Any]:
        """The images of a document and the text; no text segment for blank text."""
        images = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else []
        text = context.replace("<image>", "").strip()
        return [*images, *([text] if text else [])]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """A text for each request, cut before its first stop string. Greedy, or by beams."""
        texts: dict[int, str] = {}
        groups: dict[tuple[int, int], list[int]] = {}
        for i, request in enumerate(requests):
            options = request.args[1]
            key = int(options.get("max_new_tokens", 64)), int(options.get("num_beams") or 1)
            groups.setdefault(key, []).append(i)
        for (max_tokens, beams), members in groups.items():
            how: dict[str, Any] = {"num_beams": beams} if beams > 1 else {}
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                args = [requests[i].args for i in batch]
                prompts = [self.prompt(a[0], *a[2:]) for a in args]
                outputs = self.lm.generate_text_batch(prompts, max_tokens, **how)
                texts |= {
                    i: cut(t, a[1].get("until"))
                    for i, a, t in zip(batch, args, outputs, strict=True)
                }
        return [texts[i] for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log p of the target in nats, whether greedy decoding generates it) for each request."""
        results = []
        for context, target, *where in (request.args for request in requests):
            prompt = self.prompt(context, *where)
            if callable(target):
                document, task, split = where[1:]
                target = target(self.task_dict[task][split][document])
            (greedy,) = self.lm.generate_text_batch([prompt], 2 + len(target))
            results.append((float(self.lm.rank(prompt, [target])[0]), greedy == target.strip()))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported: the models are not trained on dialogs."""
        raise NotImplementedError("lavit_lm: tasks of several rounds are not supported")


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first stop string."""
    for stop in [until] if isinstance(until, str) else until or ():
        text = text.split(stop)[0] if stop else text
    return text.strip()
