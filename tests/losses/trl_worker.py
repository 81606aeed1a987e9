"""Runs in a process of its own: TRL's losses and gradients for the jobs in a folder. Usage: trl_worker.py FOLDER.

FOLDER holds `policy/` and `reference/` (models), `rows.json` (token ids) and `jobs.json` (name, trainer, config).
Written: `results.safetensors` with `NAME/loss` and `NAME/gradient/PARAMETER`, and `versions.json`. The rows reach the
trainer as ids, behind its own tokenisation, so that both sides see the same tokens.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", CUDA_VISIBLE_DEVICES="", WANDB_MODE="disabled")

import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PAD = 0


def tokenizer():
    words = {"[PAD]": PAD, "[EOS]": 1, "a": 2, "b": 3, "c": 4}
    made = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", eos_token="[EOS]", bos_token="[EOS]")


def trainer_types(name: str):
    if name == "dpo":
        return trl.DPOTrainer, trl.DPOConfig
    if name == "kto":
        return trl.KTOTrainer, trl.KTOConfig
    if name == "cpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        return CPOTrainer, CPOConfig
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer, ORPOConfig


def labelled(rows: list[dict], side: str) -> dict:
    """The padded columns of one side, as CPO's and ORPO's own collator makes them."""
    whole = [torch.tensor(row["prompt_ids"] + row[f"{side}_ids"]) for row in rows]
    labels = [torch.tensor([-100] * len(row["prompt_ids"]) + row[f"{side}_ids"]) for row in rows]

    def pad(parts, value):
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

    return {
        f"{side}_input_ids": pad(whole, PAD),
        f"{side}_attention_mask": pad([torch.ones_like(ids) for ids in whole], 0),
        f"{side}_labels": pad(labels, -100),
    }


def run(job: dict, folder: Path, rows: dict) -> dict:
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=torch.float64)
    trainer_type, config_type = trainer_types(job["trainer"])
    settings = {"bf16": False, "fp16": False, "report_to": "none", "use_cpu": True, "gradient_checkpointing": False}
    args = config_type(output_dir=str(folder / "out"), per_device_train_batch_size=2, **settings, **job["config"])
    if job["trainer"] == "kto":
        dummy = {"prompt": ["a"] * 2, "completion": [" b", " c"], "label": [True, False]}
    else:
        dummy = {"prompt": ["a"] * 2, "chosen": [" b"] * 2, "rejected": [" c"] * 2}
    more = {"ref_model": reference} if job["trainer"] in ("dpo", "kto") else {}
    trainer = trainer_type(
        model=policy, args=args, train_dataset=Dataset.from_dict(dummy), processing_class=tokenizer(), **more
    )
    model = trainer.model
    model.train()
    if job["trainer"] in ("dpo", "kto"):
        loss = trainer.compute_loss(model, trainer.data_collator(rows[job["trainer"]]))
    else:
        batch = {**labelled(rows["dpo"], "chosen"), **labelled(rows["dpo"], "rejected")}
        loss = trainer.compute_loss(model, batch)
    loss.backward()
    found = {f"{job['name']}/loss": loss.detach().double()}
    for name, parameter in model.named_parameters():
        found[f"{job['name']}/gradient/{name}"] = parameter.grad.double()
    return found


def main(folder: Path) -> None:
    rows, jobs = (json.loads((folder / name).read_text()) for name in ("rows.json", "jobs.json"))
    found = {}
    for job in jobs:
        found |= run(job, folder, rows)
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, folder / "results.safetensors")
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    (folder / "versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
