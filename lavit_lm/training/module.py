"""Train any causal LM of `transformers` with any objective on packed rows of text and images.

    batch -> SequenceModel -> the objective's losses -> one number to descend; the loop is Lightning's

Frozen parts (the visual tokenizer always, the LM's own weights under LoRA) have no gradient, no optimizer state, and
are not saved in checkpoints. (Under FSDP2 the LM's are, since torch reads a sharded checkpoint whole or not at all.)

On several devices each loss is a mean over the targets of all of them, so that one device with their batches together
takes the same steps. Batches of one accumulated step weigh the same, whatever their targets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from transformers import AutoTokenizer, get_cosine_with_min_lr_schedule_with_warmup

from lavit_lm.checkpoints.native import CONFIG, save_model
from lavit_lm.models.loading import load_lm, sequence_model, shard, with_lora
from lavit_lm.models.losses import LossSum
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives.base import Objective
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.sequences.packing import PackedBatch
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_lm.vocabulary.visual_vocabulary import VisualVocabulary, VocabularyError
from lavit_tok import VisualTokenizer
from lavit_tok.checkpoints.weights import check_replaceable

NATS_PER_BIT = 0.6931471805599453


class LanguageModeling(pl.LightningModule):
    """One language model, one objective.

    Args:
        lm: directory or Hub id of a causal LM, or the JSON of a `transformers` config (with its model_type) for a new
            one with random weights.
        text_tokenizer: directory or Hub id of its tokenizer; by default the LM's own. One without image tokens gets
            them, and the LM their rows.
        visual_tokenizer: "default", directory or Hub id: whose codes the shards hold.
        objective: what is laid out and predicted; LaVIT's by default.
        out: where the finished model is saved; None keeps checkpoints only.
        lora: settings of peft's LoraConfig, e.g. {"r": 16, "lora_alpha": 32}; the new rows are trained beside it.
        lr: peak learning rate of the LM and its regression head.
        visual_lr: peak learning rate of the bridge.
        encoder_lr: peak learning rate of the bridge's own vision encoder, where the objective trains one.
        warmup_steps: linear warm-up, before a cosine.
        min_lr_ratio: at which share of its peak the cosine ends.
        weight_decay: AdamW's, on matrices only.
        betas: AdamW's.
        gradient_checkpointing: recompute the LM's blocks in the backward pass, for less memory.
        compile: torch.compile the LM.
        seed: draws the new rows, the weights of a new LM, of the objective's parts and of LoRA's adapters.
    """

    def __init__(
        self,
        lm: str | dict[str, Any],
        text_tokenizer: str | None = None,
        visual_tokenizer: str = "default",
        objective: Objective | None = None,
        out: str | None = None,
        lora: dict[str, Any] | None = None,
        lr: float = 1e-3,
        visual_lr: float = 1e-4,
        encoder_lr: float = 1e-5,
        warmup_steps: int = 100,
        min_lr_ratio: float = 0.1,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        gradient_checkpointing: bool = False,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["objective"])
        self.settings: Any = self.hparams
        self.objective = objective or LaVIT()
        if out is not None:
            check_replaceable(out, CONFIG)  # before the training, not after it
        source = text_tokenizer or lm
        if not isinstance(source, str):
            raise ValueError(
                "text_tokenizer: a new LM has no tokenizer of its own; name a directory or Hub id"
            )
        tokenizer = AutoTokenizer.from_pretrained(source)
        visual = VisualTokenizer.from_pretrained(visual_tokenizer)
        self.fingerprint, self.codebook_size = visual.fingerprint(), visual.config.codebook_size
        self._visual = [visual]  # in a list: frozen, neither saved nor moved by Lightning
        self.own_tokens = len(tokenizer)
        try:
            self.processor = MultimodalProcessor.from_tokenizer(tokenizer)
            self.new_embeddings = False
        except VocabularyError:
            VisualVocabulary.extend(tokenizer, None, self.codebook_size)
            self.processor = MultimodalProcessor.from_tokenizer(tokenizer)
            self.new_embeddings = True
        if self.processor.vocabulary.codebook_size != self.codebook_size:
            raise VocabularyError(
                f"the text tokenizer has {self.processor.vocabulary.codebook_size} codes, the visual tokenizer "
                f"{visual_tokenizer!r} {self.codebook_size}: ids would stand for other codes"
            )
        self.model: SequenceModel | None = None
        self.held_out: dict[str, list[LossSum]] = {}

    # Lightning's hooks

    @property
    def visual(self) -> VisualTokenizer:
        """The frozen visual tokenizer."""
        return self._visual[0]

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = self._sequence_model()
        if self.settings.compile:
            self.model.causal.base_model.compile(dynamic=False)
        if self._mesh is not None:
            shard(self.model, self._mesh)

    def configure_optimizers(self) -> Any:
        s = self.settings
        assert self.model is not None
        groups = []
        rates = {"lm": s.lr, "visual": s.visual_lr, "encoder": s.encoder_lr}
        for part, trained in self.model.trained_parameters().items():
            for matrices, decay in ((True, s.weight_decay), (False, 0.0)):
                parameters = [p for p in trained if (p.ndim >= 2) == matrices]
                if parameters:
                    groups.append({"params": parameters, "lr": rates[part], "weight_decay": decay})
        optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=s.betas)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, s.warmup_steps, total, min_lr_rate=s.min_lr_ratio
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: PackedBatch, batch_index: int) -> Tensor:
        assert self.model is not None
        losses, means = self._shared(self.objective.losses(self.model(batch), batch))
        loss = self.objective.total(losses)
        shown = self.objective.total(means)
        if not bool(shown.isfinite()):
            keys = ", ".join(key for block in batch.keys for key in block)
            own = "" if self._processes == 1 else f" (of this process's share {float(loss)})"
            raise ValueError(
                f"step {self.global_step}: the loss is {float(shown)}{own}; stopped before it spoils the "
                f"weights. The batch held: {keys}"
            )
        values = {
            "loss": shown,
            "fill": torch.tensor(batch.fill),
            **{k: v.mean for k, v in means.items()},
        }
        self.log_dict(
            {f"train/{k}": v for k, v in values.items()}, prog_bar=True, batch_size=len(batch.ids)
        )
        return loss

    def validation_step(self, batch: PackedBatch, batch_index: int) -> None:
        assert self.model is not None
        for name, loss in self.objective.losses(self.model(batch), batch).items():
            self.held_out.setdefault(name, []).append(loss)

    def on_validation_epoch_end(self) -> None:
        """Exact means over all targets of the split, not means of batch means."""
        self._log_held_out("val")

    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        self._log_held_out("test")

    def transfer_batch_to_device(
        self, batch: PackedBatch, device: torch.device, dataloader_idx: int
    ) -> PackedBatch:
        return batch.to(device)

    def on_after_batch_transfer(self, batch: PackedBatch, dataloader_idx: int) -> PackedBatch:
        return self.objective.connectors.complete_batch(batch, self.visual, self.processor)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Frozen weights are not saved: they are read from where they came from."""
        for name in self._frozen_names() & set(checkpoint["state_dict"]):
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if frozen := self._frozen_names():
            own = self.state_dict()
            checkpoint["state_dict"].update({name: own[name] for name in frozen})

    def on_fit_end(self) -> None:
        if self.settings.out:
            self.save(self.settings.out)

    # The parts

    def save(self, out: str | Path) -> None:
        """A directory for MultimodalLM.from_pretrained, which plain `transformers` can load too.

        Written by the first process; where weights are sharded, all of them must call this.
        """
        assert self.model is not None
        model = self.model
        if self._mesh is not None:
            from torch.distributed.checkpoint.state_dict import (
                StateDictOptions,
                get_model_state_dict,
            )

            whole: dict[str, Any] = get_model_state_dict(
                model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
            )
            if self.global_rank == 0:
                model = self._sequence_model().to(next(iter(whole.values())).dtype)
                model.load_state_dict(whole)
        if self.global_rank == 0:
            save_model(
                out,
                model,
                self.processor,
                self.objective,
                self.settings.visual_tokenizer,
                self.fingerprint,
            )

    @property
    def _processes(self) -> int:
        return 1 if self._trainer is None else self.trainer.world_size

    @property
    def _mesh(self) -> Any | None:
        """The processes that FSDP2 shards over, if it does. Raises ValueError for tensor parallelism."""
        mesh = getattr(self, "_device_mesh", None)
        if mesh is None:
            return None
        if mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"ModelParallelStrategy: only data parallelism is known here, got {mesh}: give "
                "data_parallel_size=<number of processes> and tensor_parallel_size=1"
            )
        return mesh["data_parallel"]

    def _shared(self, losses: dict[str, LossSum]) -> tuple[dict[str, LossSum], dict[str, LossSum]]:
        """(losses that, averaged over processes as gradients are, are means over all targets; sums over all of them).

        two processes          totals 6. and 1., counts 3 and 1
        to descend             6 / 2 and 1 / 2, counts being their mean, 2
        to show                7 / 4 on both
        """
        world = self._processes
        if world == 1:
            return losses, {
                name: LossSum(loss.total.detach(), loss.count) for name, loss in losses.items()
            }
        own = torch.stack(
            [torch.stack([loss.total.detach(), loss.count.float()]) for loss in losses.values()]
        )
        totals, counts = self.all_gather(own).sum(0).unbind(1)
        descend = {
            n: LossSum(loss.total, counts[i] / world) for i, (n, loss) in enumerate(losses.items())
        }
        return descend, {name: LossSum(totals[i], counts[i]) for i, name in enumerate(losses)}

    def _log_held_out(self, split: str) -> None:
        sums = {}
        for name, parts in self.held_out.items():
            own = torch.stack(
                [torch.stack([part.total, part.count.float()]) for part in parts]
            ).sum(0)
            total, count = self.all_gather(own).reshape(-1, 2).sum(0)
            sums[name] = LossSum(total, count)
        self.held_out.clear()
        values = {name: s.mean for name, s in sums.items()}
        if "image" in values:
            values["bits_per_image_token"] = values["image"] / NATS_PER_BIT
        values["loss"] = self.objective.total(sums)
        self.log_dict({f"{split}/{k}": v for k, v in values.items()}, prog_bar=True, sync_dist=True)

    def _frozen_names(self) -> set[str]:
        """Parameters that checkpoints leave out."""
        if self._mesh is not None:
            return set()
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name for name, _ in self.named_parameters()} - trained if trained else set()

    def _sequence_model(self) -> SequenceModel:
        """The LM and its bridge, as they are before training, whole."""
        s = self.settings
        lm = load_lm(s.lm, self.processor, self.own_tokens, self.new_embeddings, s.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            width = lm.config.get_text_config().hidden_size
            connectors = self.objective.connectors.build(self.visual, width)
            if s.gradient_checkpointing:
                lm.gradient_checkpointing_enable({"use_reentrant": False})
                lm.train()
            return sequence_model(
                lm if s.lora is None else with_lora(lm, self.processor.vocabulary, s.lora),
                *connectors,
            )
