"""The sides of a benchmark: palate, TRL's own trainer, and the loop of the DPO reference code; a step at a time."""

import copy
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace

from workload import BATCH, BETA, BETAS, CLIP, EPS, RATE, Cell, Row

# what a step of ours can do without
SHARED, PACKED, SCORED, KEPT = "shared prompt", "packing", "head on completions", "kept reference"


class Ours:
    """palate: collation, forward, backward, clipping, update. The reference is scored before the first step.

    without: of SHARED (a prompt stands before each of its completions), PACKED (a pair a micro-batch), SCORED (the head
    runs on every position) and KEPT (the reference, a copy of the first weights, is run in every step).
    """

    def __init__(self, cell: Cell, rows: list[Row], model, *, without: Collection[str] = ()):
        import torch

        from palate.data.stream import StepBatch, pack
        from palate.reference import annotate
        from palate.scoring import Numerics, logps
        from palate.train.loop import TrainState, steps
        from palate.train.objectives import pairwise
        from palate.train.optim import OptimConfig

        optim = OptimConfig(lr=RATE, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, clip_norm=CLIP, warmup_steps=0)
        state = TrainState.fresh(model, optim)
        numerics = Numerics.of(model, cell.dtype, cell.tokens)
        objective = pairwise("dpo", numerics, beta=BETA)
        groups = groups_of(rows)
        started = time.perf_counter()
        first_model = copy.deepcopy(model) if KEPT in without else None
        if first_model is None:
            groups = annotate(groups, model, numerics=numerics, tokens=cell.tokens)
        self.reference_seconds = time.perf_counter() - started
        self.seconds, self.losses, self.norms, self.data_seconds = [], [], [], []

        def batches():
            for first in range(0, len(groups), BATCH):
                started = time.perf_counter()
                mine = groups[first : first + BATCH]
                lengths = [row_length(group, without) for group in mine]
                parts = [[i] for i in range(len(mine))] if PACKED in without else pack(lengths, cell.tokens)
                micro = tuple(batch_of([mine[i] for i in part], without) for part in parts)
                if first_model is not None:
                    with torch.no_grad():
                        micro = tuple(
                            replace(part, reference=logps(first_model, part.batch, numerics=numerics).total)
                            for part in micro
                        )
                self.data_seconds.append(time.perf_counter() - started)
                yield StepBatch(micro, BATCH, tuple(range(first, first + BATCH)), {"step": first // BATCH})

        self.steps = steps(state, batches(), objective)

    def step(self) -> None:
        started = time.perf_counter()
        done = next(self.steps)
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(done.loss)
        self.norms.append(done.grad_norm)

    def shares(self) -> dict[str, float]:
        """Shares of one more step's time: attention, head, optimizer, data; by torch's profiler."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as trace:
            self.step()
        spent = {event.key: event.cpu_time_total / 1e6 for event in trace.key_averages()}

        def of(*names: str) -> float:
            return sum(seconds for key, seconds in spent.items() if key in names) / self.seconds[-1]

        return {
            "attention": of(
                "aten::scaled_dot_product_attention", *(key for key in spent if key in _ATTENTION_BACKWARD)
            ),
            "head": of("_TargetLogps", "_TargetLogpsBackward"),
            "optimizer": of("Optimizer.step#AdamW.step"),
            "data": self.data_seconds[-1] / self.seconds[-1],
        }


_ATTENTION_BACKWARD = ("aten::_scaled_dot_product_flash_attention_for_cpu_backward",)


def groups_of(rows: Sequence[Row]) -> list:
    """The rows as palate holds them: a prompt once, chosen and rejected after it."""
    from palate.data.tokens import TokenGroup

    return [
        TokenGroup(prompt, (chosen, rejected), (((0, len(chosen)),), ((0, len(rejected)),)), ((0, 1),))
        for prompt, chosen, rejected in rows
    ]


def row_length(group, without: Collection[str] = ()) -> int:
    """Stream tokens of a pair."""
    from palate.data.batch import stream_length

    again = (len(group.completions) - 1) * len(group.prompt)
    return stream_length(group) + (again if SHARED in without else 0)


def batch_of(groups: list, without: Collection[str] = ()):
    """The pairs as palate collates them, or without its savings; losses and gradients are the same."""
    import torch

    from palate.data.batch import PairBatch, collate, collate_pairs

    batch = collate_pairs(groups)
    if SHARED in without:
        alone = [
            replace(group, completions=(ids,), spans=(spans,), preferences=(), reference=None)
            for group in groups
            for ids, spans in zip(group.completions, group.spans, strict=True)
        ]
        batch = PairBatch(collate(alone), batch.chosen, batch.rejected, batch.reference)
    if SCORED in without:  # the other positions are one more completion, which no pair names
        stream = batch.batch
        free = torch.ones(len(stream.tokens), dtype=torch.bool)
        free[stream.predictors] = False
        others = free.nonzero()[:, 0]
        stream = replace(
            stream,
            predictors=torch.cat((stream.predictors, others)),
            targets=torch.cat((stream.targets, stream.tokens[others])),
            sequence=torch.cat((stream.sequence, torch.full_like(others, len(stream.length)))),
            length=torch.cat((stream.length, torch.tensor([len(others)]))),
        )
        reference = batch.reference
        if reference is not None:
            reference = torch.cat((reference, reference.new_zeros(1)))
        batch = replace(batch, batch=stream, reference=reference)
    return batch


class Reference:
    """The loop of the DPO reference code over transformers' own forward, in float32 or under bfloat16 autocast.

    Chosen and rejected rows of a batch stand padded in one forward; the full logits become log-probs by log_softmax;
    the reference model runs in every step ("default") or has been scored before ("best", a pair a forward with 4
    accumulated, so that no pair is padded to another's length).
    """

    def __init__(self, cell: Cell, rows: list[Row], model):
        import torch

        self.cell, self.rows, self.model, self.at = cell, rows, model, 0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trained = trained
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0)
        self.best = cell.setting == "best"
        self.seconds, self.losses, self.norms = [], [], []
        self.reference, self.reference_seconds, self.stored = None, 0.0, []
        if self.best:
            started = time.perf_counter()
            with torch.no_grad(), self._reference_mode():
                self.stored = [self._logps(model, [row]) for row in rows]
            self.reference_seconds = time.perf_counter() - started
        elif not cell.lora:
            self.reference = copy.deepcopy(model).requires_grad_(False)

    def step(self) -> None:
        import torch
        from torch.nn.functional import logsigmoid

        started = time.perf_counter()
        rows = self.rows[self.at : self.at + BATCH]
        loss = 0.0
        for first in range(0, BATCH, 1 if self.best else BATCH):
            part = rows[first : first + (1 if self.best else BATCH)]
            if self.best:
                before = self.stored[self.at + first]
            else:
                with torch.no_grad(), self._reference_mode():
                    before = self._logps(self.reference or self.model, part)
            ratio = self._logps(self.model, part) - before
            chosen, rejected = ratio.split(len(part))
            share = -logsigmoid(BETA * (chosen - rejected)).sum() / BATCH
            share.backward()
            loss += float(share.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, CLIP))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.at += BATCH
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(loss)
        self.norms.append(norm)

    def _reference_mode(self):
        return self.model.disable_adapter() if self.cell.lora else nullcontext()

    def _logps(self, model, rows: list[Row]):
        """(2P,) summed log-probs, chosen rows first."""
        import torch

        texts = [(prompt, row[side]) for side in (1, 2) for row in rows for prompt in row[:1]]
        width = max(len(prompt) + len(completion) for prompt, completion in texts)
        ids = torch.zeros(len(texts), width, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (prompt, completion) in enumerate(texts):
            end = len(prompt) + len(completion)
            ids[i, :end] = torch.cat((torch.from_numpy(prompt), torch.from_numpy(completion)))
            mask[i, :end] = 1
            labels[i, len(prompt) : end] = ids[i, len(prompt) : end]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.cell.dtype == "bfloat16"):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        labels = labels[:, 1:]
        scored = labels != -100
        each = logits[:, :-1].log_softmax(-1).gather(2, labels.masked_fill(~scored, 0)[..., None])[..., 0]
        return (each * scored).sum(-1)


def run_trl(cell: Cell, rows: list[Row], model, between: Callable[[], None]) -> dict:
    """TRL's own `train()` over the rows; `between` is called after each of its steps, off its clock."""
    import torch
    import trl
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

    disable_progress_bars()
    # the ids are given: this tokenizer only says which id pads
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1, "a": 2}, unk_token="[PAD]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")
    best = cell.setting == "best"
    found = {"seconds": [], "losses": [], "norms": [], "reference_seconds": 0.0}

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _precompute_ref_logps(self, *args, **kwargs):
            started = time.perf_counter()
            made = super()._precompute_ref_logps(*args, **kwargs)
            found["reference_seconds"] += time.perf_counter() - started
            return made

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            found["seconds"].append(time.perf_counter() - self.started)
            between()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "grad_norm" in logs:
                found["losses"].append(float(logs["loss"]))
                found["norms"].append(float(logs["grad_norm"]))
            self.started = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        args = trl.DPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=cell.dtype == "bfloat16",
            beta=BETA,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            weight_decay=0.0,
            max_grad_norm=CLIP,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **(
                dict(
                    per_device_train_batch_size=1,
                    gradient_accumulation_steps=BATCH,
                    precompute_ref_log_probs=True,
                    gradient_checkpointing=False,
                )
                if best
                else dict(per_device_train_batch_size=BATCH)
            ),
        )
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        data = Dataset.from_list([{n: ids.tolist() for n, ids in zip(names, row, strict=True)} for row in rows])
        trainer = Trainer(
            model=model,
            ref_model=None if best or cell.lora else copy.deepcopy(model),
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    assert len(found["losses"]) == len(rows) // BATCH, "TRL logged another number of steps"
    assert next(model.parameters()).dtype == torch.float32
    return found
