"""Train any causal LM of `transformers` with any objective, on packed text and images.

    batch -> SequenceModel -> the objective's losses -> their weighted sum; the loop is Lightning's

Frozen weights (the visual tokenizer always, the LM's own under LoRA) have no gradient, no optimizer
state, and are not saved in checkpoints. (Under FSDP2 the LM's are, since torch can only load a
sharded checkpoint as a whole.)

Over several processes each loss is a mean over the targets of all of them, so that one process with
all their batches takes the same steps. The batches of an accumulated step have equal weights,
whatever their numbers of targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lavit_lm.checkpoints.native import CONFIG, DEFAULT, load_connectors, save_model
from lavit_lm.models.loading import (
    FILES,
    load_lm,
    open_text_tokenizer,
    sequence_model,
    shard,
    with_lora,
)
from lavit_lm.models.losses import LossSum
from lavit_lm.models.sequence_model import SequenceModel
from lavit_lm.objectives.base import Objective
from lavit_lm.objectives.lavit import LaVIT
from lavit_lm.sequences.packing import PackedBatch
from lavit_lm.vocabulary.embeddings import CodeMap
from lavit_lm.vocabulary.processor import MultimodalProcessor
from lavit_lm.vocabulary.text_tokenizer import saved_text_tokenizer
from lavit_lm.vocabulary.visual_vocabulary import (
    VisualVocabulary,
    VocabularyError,
    stages_for,
)
from lavit_tok import Shards, VisualTokenizer
from lavit_tok.checkpoints.weights import SHIPPED, check_replaceable, find_directory
from lavit_tok.data.shard_manifest import Manifest
from lavit_tok.training.base import TrainingModule
from lavit_tok.training.frozen import Frozen
from lavit_tok.training.optimizers import OptimizerConfig, ScheduleConfig, parameter_groups

NATS_PER_BIT = 0.6931471805599453
CodeEmbeddings = Literal["random", "codebook", "mapped"]


@dataclass(frozen=True)
class LMOptimizerConfig(OptimizerConfig):
    """AdamW, with a learning rate per part of the model; Muon for the LM's hidden matrices."""

    lr: float = 1e-3
    """Peak learning rate of the LM and its regression head."""
    visual_lr: float = 1e-4
    """Peak learning rate of the connector between vision features and the LM; 0 freezes it."""
    encoder_lr: float = 1e-5
    """Peak learning rate of a trained vision encoder, if the objective has one; 0 freezes it."""
    weight_decay: float = 0.1
    """Weight decay of matrices; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the running mean of gradients and of their squares."""
    muon: bool = False
    """Train the matrices of the LM's blocks by Muon in place of AdamW."""


class LanguageModeling(TrainingModule):
    """Trains a language model with an objective.

    Args:
        lm: "default", directory or Hub id of a causal LM or encoder-decoder, or the JSON of a
            `transformers` config (with its model_type) for a new one with random weights. Of a
            model that was trained with this objective, bridge and regression head are loaded too.
        text_tokenizer: directory or Hub id of its tokenizer; by default the LM's own, and on the
            command line, for a new LM, one trained on the captions of the shards. If it has no
            image tokens they are added, with new embeddings in the LM.
        visual_tokenizer: "default", directory or Hub id: the tokenizer of the codes in the shards;
            by default, on the command line, the one that the shards name.
        objective: sequence layout and loss; LaVIT's by default.
        lora: arguments of peft's LoraConfig, e.g. {"r": 16, "lora_alpha": 32}; new embeddings are
            trained beside it.
        optimizer: AdamW.
        schedule: learning-rate schedule.
        gradient_checkpointing: recompute the LM's layers in the backward pass, to save memory.
        compile: torch.compile the LM.
        out: where the trained model is saved; None keeps checkpoints only.
        seed: seed of all initial weights.
        max_codes: nested codes of an image at most, at the end of a stage: later codes get no ids,
            and images are cut. None for all codes, or one if the objective uses none. Codes that
            are not nested are not cut.
        code_embeddings: new embeddings of codes are drawn like those of text ("random"), made from
            their codebook entries in the beginning ("codebook"), or computed from them by a learned
            network as long as the model is trained ("mapped"); see vocabulary/embeddings.py. An LM
            that has embeddings of codes keeps these.
    """

    def __init__(
        self,
        lm: str | dict[str, Any],
        text_tokenizer: str | None = None,
        visual_tokenizer: str | None = None,
        objective: Objective | None = None,
        lora: dict[str, Any] | None = None,
        optimizer: LMOptimizerConfig = LMOptimizerConfig(),
        schedule: ScheduleConfig = ScheduleConfig(min_lr_ratio=0.1),
        gradient_checkpointing: bool = False,
        compile: bool = False,
        out: str | None = None,
        seed: int = 0,
        max_codes: int | None = None,
        code_embeddings: CodeEmbeddings = "random",
    ) -> None:
        super().__init__()
        self.save_arguments("objective")
        kinds = get_args(CodeEmbeddings)
        if code_embeddings not in kinds:
            raise ValueError(
                f"code_embeddings: expected one of {', '.join(kinds)}, got {code_embeddings!r}"
            )
        if code_embeddings == "mapped" and lora is not None:
            raise ValueError(
                "code_embeddings: 'mapped' trains new embeddings; with lora they are "
                "trained one by one: use 'codebook'"
            )
        if lm == "default":
            lm = str(DEFAULT)
        visual_tokenizer = visual_tokenizer or "default"
        self.kind, self.batched = "language model", "blocks"
        self.lm, self.lora, self.out, self.seed = lm, lora, out, seed
        self.optimizer_config, self.schedule_config = optimizer, schedule
        self.gradient_checkpointing, self.compile_lm = gradient_checkpointing, compile
        self.visual_tokenizer = visual_tokenizer
        self.objective = objective or LaVIT()
        if out is not None:
            check_replaceable(out, CONFIG)  # before the training, not after it
        source = text_tokenizer or lm
        if not isinstance(source, str):
            raise ValueError(
                "text_tokenizer: expected a directory or Hub id, since a new LM has no tokenizer"
            )
        tokenizer = open_text_tokenizer(find_directory(source, None, FILES))
        self.frozen_visual = Frozen(VisualTokenizer.from_pretrained(visual_tokenizer))
        self.fingerprint = self.visual.fingerprint()
        self.codebook_size = self.visual.config.codebook_size
        self.pretrained_tokens, self.code_embeddings = len(tokenizer), code_embeddings
        try:
            self.processor = MultimodalProcessor.from_tokenizer(tokenizer)
            self.new_embeddings = False
        except VocabularyError:
            unused = self.objective.connectors.codes == "none"
            least = 1 if self.visual.stages and unused else None
            stages = stages_for(least if max_codes is None else max_codes, self.visual.stages)
            VisualVocabulary.extend(tokenizer, None, self.codebook_size, stages=stages)
            self.processor = MultimodalProcessor.from_tokenizer(tokenizer)
            self.new_embeddings = True
        if self.processor.vocabulary.codebook_size != self.codebook_size:
            raise VocabularyError(
                f"the text tokenizer has {self.processor.vocabulary.codebook_size} codes, the "
                f"visual tokenizer {visual_tokenizer!r} {self.codebook_size}: ids would map to "
                "other codes"
            )
        self.processor.vocabulary.require_stages(self.visual.stages)
        vocabulary = self.processor.vocabulary
        if max_codes and stages_for(max_codes, self.visual.stages) != vocabulary.stages:
            raise VocabularyError(
                f"max_codes: the text tokenizer has ids of {vocabulary.max_codes} codes, got "
                f"{max_codes}"
            )
        self.model: SequenceModel | None = None
        self.held_out: dict[int, dict[str, list[LossSum]]] = {}

    @staticmethod
    def complete_arguments(model: Any, data: Any, root: Path) -> None:
        """Fill in what the command line leaves out, from the shards.

        Args:
            model: arguments of this class, changed in place: the visual tokenizer becomes that of
                the shards, and a new LM's text tokenizer one that is trained on their captions.
            data: arguments of LanguageDataModule; of several sources, the first with shards names
                the visual tokenizer.
            root: folder of the run, where the text tokenizer is saved.

        Raises:
            ShardError: shards that cannot be read.
        """
        folders = [source.shards for source in data.sources or [data] if source.shards]
        if not isinstance(model.lm, str) and model.text_tokenizer is None:
            captions = [
                caption
                for folder in folders
                for caption in Shards.open(folder, data.splits[0]).dataset()["caption"]
            ]
            model.text_tokenizer = str(saved_text_tokenizer(captions, root))
        if model.visual_tokenizer is None and folders:
            model.visual_tokenizer = Manifest.read(Path(folders[0])).config.tokenizer

    def next_command(self) -> str:
        """Images are generated next."""
        beside = Path(self.visual_tokenizer).parent / "decoder"
        decoder = "default" if self.visual_tokenizer in SHIPPED else "DECODER"
        if beside.is_dir():
            decoder = str(beside)
        return f"lavit-lm generate PROMPT --model {self.out} --decoder {decoder} --out images"

    @property
    def visual(self) -> VisualTokenizer:
        """The frozen visual tokenizer."""
        return self.frozen_visual.module

    # Lightning hooks

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = self._sequence_model()
        for part, parameters in self.model.trained_parameters().items():
            if self._rates[part] == 0:  # no gradient is computed either
                for parameter in parameters:
                    parameter.requires_grad_(False)
        if self.compile_lm:
            self.model.causal.base_model.compile(dynamic=False)
        if self._mesh is not None:
            if self.model.code_map is not None:
                raise ValueError("code_embeddings: 'mapped' is not possible under FSDP2")
            shard(self.model, self._mesh)

    @property
    def _rates(self) -> dict[str, float]:
        """Peak learning rate of each group of SequenceModel.trained_parameters."""
        o = self.optimizer_config
        assert isinstance(o, LMOptimizerConfig)
        return {"lm": o.lr, "visual": o.visual_lr, "encoder": o.encoder_lr}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those of the LM, the connector and the vision encoder, each with its learning rate."""
        o, rates = self.optimizer_config, self._rates
        assert self.model is not None and isinstance(o, LMOptimizerConfig)
        trained = self.model.trained_parameters()
        muon: list[nn.Parameter] = []
        if o.muon:
            layers = self.model.causal.base_model.modules()
            hidden = {id(m.weight) for m in layers if isinstance(m, nn.Linear)}
            muon = [p for p in trained["lm"] if id(p) in hidden]
            trained["lm"] = [p for p in trained["lm"] if id(p) not in hidden]
        groups = [
            group
            for part, parameters in trained.items()
            for group in parameter_groups(parameters, o.weight_decay, lr=rates[part])
        ]
        if not muon:
            return groups
        return [{"params": muon, "weight_decay": o.weight_decay, "lr": o.lr, "muon": True}, *groups]

    def training_step(self, batch: PackedBatch, batch_index: int) -> Tensor:
        assert self.model is not None
        losses, means = self._across_processes(self.objective.losses(self.model(batch), batch))
        loss = self.objective.total(losses)
        logged = self.objective.total(means)
        if not bool(logged.isfinite()):
            keys = ", ".join(key for block in batch.keys for key in block)
            local = "" if self.num_processes == 1 else f" ({float(loss)} of this process)"
            raise ValueError(
                f"step {self.global_step}: expected a finite loss, got {float(logged)}{local}; "
                f"stopped before the weights are updated. The batch held: {keys}"
            )
        metrics = {
            "loss": logged,
            "fill": torch.tensor(batch.fill),
            **{k: v.mean for k, v in means.items()},
        }
        self.log_dict(
            {f"train/{k}": v for k, v in metrics.items()}, prog_bar=True, batch_size=len(batch.ids)
        )
        return loss

    def validation_step(
        self, batch: PackedBatch, batch_index: int, dataloader_idx: int = 0
    ) -> None:
        assert self.model is not None
        sums = self.held_out.setdefault(dataloader_idx, {})
        for name, loss in self.objective.losses(self.model(batch), batch).items():
            sums.setdefault(name, []).append(loss)

    def on_validation_epoch_end(self) -> None:
        """Exact means over all targets of the split, not means of batch means.

        Of several sources those of each, and those over all of them.
        """
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

    def frozen_names(self) -> set[str]:
        """Parameters without gradient; none under FSDP2, whose checkpoints are read as a whole."""
        if self._mesh is not None:
            return set()
        named = list(self.named_parameters())
        frozen = {name for name, p in named if not p.requires_grad}
        return frozen if len(frozen) < len(named) else set()

    def on_fit_end(self) -> None:
        if self.out:
            self.save(self.out)

    # The trained model

    def save(self, out: str | Path) -> None:
        """Save for MultimodalLM.from_pretrained; plain `transformers` can load the directory too.

        The first process writes; with sharded weights all processes must call this.
        """
        assert self.model is not None
        model = self.model
        if self._mesh is not None:
            from torch.distributed.checkpoint.state_dict import (
                StateDictOptions,
                get_model_state_dict,
            )

            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights: dict[str, Any] = get_model_state_dict(model, options=options)
            if self.global_rank == 0:
                model = self._sequence_model().to(next(iter(weights.values())).dtype)
                model.load_state_dict(weights)
        model.write_code_embeddings()
        if self.global_rank == 0:
            names = self.visual_tokenizer, self.fingerprint
            save_model(out, model, self.processor, self.objective, *names)

    @property
    def _mesh(self) -> Any | None:
        """The processes that FSDP2 shards over, if any; ValueError for tensor parallelism."""
        mesh = getattr(self, "_device_mesh", None)
        if mesh is None:
            return None
        if mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"ModelParallelStrategy: expected data parallelism only, got {mesh}: set "
                "data_parallel_size=<number of processes> and tensor_parallel_size=1"
            )
        return mesh["data_parallel"]

    def _across_processes(
        self, losses: dict[str, LossSum]
    ) -> tuple[dict[str, LossSum], dict[str, LossSum]]:
        """(losses to optimize, losses to log).

        Gradients are averaged over processes; of the first, that average is the gradient of the
        mean over all targets. The second are sums over all processes.

            two processes       totals 6. and 1., counts 3 and 1
            to optimize         6 / 2 and 1 / 2 (2 is the mean count)
            to log              7 / 4 on both
        """
        world = self.num_processes
        if world == 1:
            return losses, {
                n: LossSum(loss.total.detach(), loss.count) for n, loss in losses.items()
            }
        local = torch.stack([_as_pair(loss) for loss in losses.values()])
        totals, counts = self.all_gather(local).sum(0).unbind(1)
        optimized = {
            name: LossSum(loss.total, counts[i] / world)
            for i, (name, loss) in enumerate(losses.items())
        }
        return optimized, {name: LossSum(totals[i], counts[i]) for i, name in enumerate(losses)}

    def _log_held_out(self, split: str) -> None:
        sums: dict[int, dict[str, Tensor]] = {}
        together: dict[str, Tensor] = {}
        for source, collected in self.held_out.items():
            for name, losses in collected.items():
                local = torch.stack([_as_pair(loss) for loss in losses]).sum(0)
                pair = self.all_gather(local).reshape(-1, 2).sum(0)
                sums.setdefault(source, {})[name] = pair
                together[name] = together.get(name, torch.zeros_like(pair)) + pair
        self.held_out.clear()
        metrics = self._metrics(together)
        if len(sums) > 1:
            trainer: Any = self.trainer
            names = list(trainer.datamodule.held_out)
            for source, pairs in sums.items():
                of_source = self._metrics(pairs).items()
                metrics |= {f"{names[source]}/{name}": value for name, value in of_source}
        self.log_dict(
            {f"{split}/{k}": v for k, v in metrics.items()}, prog_bar=True, sync_dist=True
        )

    def _metrics(self, pairs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means from the (total, count) of each loss."""
        sums = {name: LossSum(*pair) for name, pair in pairs.items()}
        metrics = {name: s.mean for name, s in sums.items()}
        if "image" in metrics:
            metrics["bits_per_image_token"] = metrics["image"] / NATS_PER_BIT
        metrics["loss"] = self.objective.total(sums)
        return metrics

    def _sequence_model(self) -> SequenceModel:
        """The LM and its connector before training, not sharded."""
        shared = self.pretrained_tokens, self.new_embeddings, self.seed
        codebook = self._codebook() if self.code_embeddings == "codebook" else None
        lm = load_lm(self.lm, self.processor, *shared, codebook)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            hidden_size = lm.config.get_text_config().hidden_size
            connectors = self.objective.connectors.build(self.visual, hidden_size)
            if isinstance(self.lm, str):
                directory = find_directory(self.lm, None, FILES)
                load_connectors(directory, self.objective, *connectors)
            if self.gradient_checkpointing:
                lm.gradient_checkpointing_enable({"use_reentrant": False})
                lm.train()
            if self.lora is not None:
                lm = with_lora(lm, self.processor.vocabulary, self.lora)
            restricted = self.objective.restricted_softmax
            vocabulary = self.processor.vocabulary if restricted else None
            noise = self.objective.vector_noise
            return sequence_model(lm, *connectors, vocabulary, self._code_map(lm), noise)

    def _code_map(self, lm: Any) -> CodeMap | None:
        """The network that computes new embeddings of codes, if one does."""
        new = self.new_embeddings or not isinstance(self.lm, str)
        if self.code_embeddings != "mapped" or not new:
            return None
        weight = lm.get_input_embeddings().weight
        deviation = float(weight[: self.processor.vocabulary.begin].std())
        generator = torch.Generator().manual_seed(self.seed)
        first = self.processor.vocabulary.first
        return CodeMap(self._codebook(), first, weight.shape[1], deviation, generator=generator)

    def _codebook(self) -> Tensor:
        """The entries of all codes that have ids."""
        entries: Tensor = self.visual.quantizer.codebook.embeddings
        return entries[: self.processor.vocabulary.stages] if self.visual.nested else entries[None]


def _as_pair(loss: LossSum) -> Tensor:
    return torch.stack([loss.total.detach(), loss.count.float()])
