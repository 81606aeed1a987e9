"""Checkpoints: save a TrainState, find the latest that verifies, go on from it bit for bit. Tensors and JSON, no code.

A checkpoint is built under a hidden name, sealed by a manifest, renamed and read back; only then are old ones pruned.
So a crash at any moment leaves the previous one usable and the new one whole or unseen.
"""

import contextlib
import errno
import math
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import files
from ..errors import CheckpointError, MachineError

if TYPE_CHECKING:
    from .loop import TrainState

_STEP = re.compile(r"step-(\d{6,})")
_INCOMPLETE, _PRUNED = ".incomplete", ".pruned"
# How an optimizer computes, not what: another value rounds otherwise, and is said.
_EXECUTION = ("fused", "foreach", "capturable", "differentiable")


def save(state: "TrainState", folder: str | Path, keep: int = 2, meta: Mapping[str, Any] | None = None) -> Path:
    """The new `folder`/step-NNNNNN, verified; afterwards the last `keep` and that of `state.best` are left.

    Trainable parameters and buffers (tied ones once), optimizer tensors by parameter name, the rest as JSON. meta: of
    the run, which `load` compares. Where the step is there already, whole and with the same meta, it is left as it is.
    Raises MachineError; everything that verified before then still does.
    """
    if keep < 1:
        raise ValueError("keep is at least 1")
    folder, meta = Path(folder), files.strict_json(dict(meta or {}))
    path = folder / f"step-{state.step:06d}"
    if not _there_already(path, folder, meta):
        with files.new_folder(path, {"step": state.step, "meta": meta}) as tmp:
            files.save_tensors(tmp / "model.safetensors", dict(_weights(state)), {"format": "pt"})
            tensors, scalars = _optimizer_state(state)
            files.save_tensors(tmp / "optimizer.safetensors", tensors, {"format": "pt"})
            files.write_json(tmp / "state.json", _facts(state, meta, scalars))
    _prune(folder, keep, state)
    return path


def latest(folder: str | Path) -> tuple[Path | None, list[Path]]:
    """(the checkpoint of the highest step that verifies, None where there is none; damaged ones, where they lie now).

    Half-written folders and checkpoints damaged above the one found move to `.incomplete/`; nothing is deleted that a
    checkpoint was. Only for the run's owner. Raises CheckpointError: where there are checkpoints and all are damaged
    (E501), or the newest was written by a later palate (E311).
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None, []
    _clear(folder)
    damaged: list[CheckpointError] = []
    bad: list[Path] = []
    for path in _steps(folder):
        try:
            files.verify_folder(path)
        except CheckpointError as error:
            if error.code == "E311":
                raise
            damaged.append(error)
        except MachineError as error:
            if error.errno != errno.EIO:
                raise
            damaged.append(CheckpointError(error.what, where=error.where, code="E501"))
        else:
            return path, [files.move_aside(one, folder / _INCOMPLETE) for one in bad]
        bad.append(path)
    if damaged:
        raise CheckpointError(
            f"all {len(damaged)} checkpoints are damaged: " + "; ".join(f"{e.where} {e.what}" for e in damaged[:5]),
            where=str(folder),
            code="E501",
            next="put a copy back, or start anew with another --out",
        )
    return None, []


def load(path: str | Path, state: "TrainState", meta: Mapping[str, Any] | None = None) -> list[str]:
    """Puts the checkpoint into `state`, bit for bit; returns why the run is not bit-exact from here, empty where it is.

    Everything is compared before anything is changed. Raises CheckpointError: E501 where it does not verify, E502
    naming what differs: the run (`meta`), layers, names, shapes or dtypes of weights, the optimizer's settings.
    """
    path = Path(path)
    files.verify_folder(path)
    facts = files.read_json(path / "state.json")
    if meta is not None:
        _refuse_other_run(path, facts["meta"], files.strict_json(dict(meta)))
    weights = files.load_tensors(path / "model.safetensors")
    moments = files.load_tensors(path / "optimizer.safetensors")
    targets = dict(_weights(state))
    _compare_weights(path, weights, targets)
    notes = _compare_optimizers(path, facts["optimizers"], state) + _other_machine(facts["machine"], state)
    if facts["total_steps"] != state.total_steps:
        notes.append(f"the run was to have {facts['total_steps']} steps, now {state.total_steps}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(weights[name])
    for name, optimizer in state.optimizers.items():
        _restore(optimizer, _names(state), moments, facts["optimizers"][name], name)
    state.step, state.cursor, state.best = facts["step"], facts["cursor"], facts["best"]
    return notes


# what is stored


def _weights(state: "TrainState") -> Iterator[tuple[str, Tensor]]:
    """Trainable parameters and persistent buffers by "MODEL.NAME", tied ones under their first name."""
    for model_name, model in state.models.items():
        stored = model.state_dict(keep_vars=True).keys()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield f"{model_name}.{name}", parameter
        for name, buffer in model.named_buffers():
            if name in stored:
                yield f"{model_name}.{name}", buffer


def _names(state: "TrainState") -> dict[nn.Parameter, str]:
    return {
        p: f"{model_name}.{name}" for model_name, model in state.models.items() for name, p in model.named_parameters()
    }


def _optimizer_state(state: "TrainState") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by "OPTIMIZER/PARAMETER/KEY", and the rest as JSON."""
    names = _names(state)
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for optimizer_name, optimizer in state.optimizers.items():
        scalars: dict[str, dict[str, Any]] = {}
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"{optimizer_name}/{names[parameter]}/{key}"] = value
                else:
                    scalars.setdefault(names[parameter], {})[key] = value
        rest[optimizer_name] = {
            "class": type(optimizer).__name__,
            "groups": _groups(optimizer, names),
            "scalars": scalars,
        }
    return tensors, rest


def _groups(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> list[dict[str, Any]]:
    return [
        {key: _number(value) for key, value in group.items() if key != "params"}
        | {"params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # strict JSON has no infinity
    return [_number(item) for item in value] if isinstance(value, list | tuple) else value


def _facts(state: "TrainState", meta: Mapping[str, Any], optimizers: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": state.step,
        "cursor": state.cursor,
        "best": state.best,
        "total_steps": state.total_steps,
        "meta": meta,
        "machine": _machine(state),
        "optimizers": optimizers,
    }


def _machine(state: "TrainState") -> dict[str, Any]:
    """What the same bits depend on, besides the checkpoint."""
    devices = sorted({p.device.type for model in state.models.values() for p in model.parameters()})
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": devices,
        "gpu": torch.cuda.get_device_name() if "cuda" in devices else None,
        "cpu": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


# what is compared


def _refuse_other_run(path: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    differing = [
        f"{key}: {stored.get(key)!r} there, {value!r} here" for key, value in given.items() if stored.get(key) != value
    ]
    if differing:
        raise _other(path, f"belongs to another run ({'; '.join(differing)})")


def _compare_weights(path: Path, stored: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    there, here = _layers(stored), _layers(targets)
    if there != here:
        raise _other(path, f"holds {there} layers, the model has {here}")
    missing, foreign = sorted(targets.keys() - stored.keys()), sorted(stored.keys() - targets.keys())
    if missing or foreign:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"holds {_some(foreign)} besides"] * bool(foreign)
        raise _other(path, " and ".join(parts) + ", so other weights were trained")
    for name, target in targets.items():
        one, two = stored[name], target
        if one.shape != two.shape or one.dtype != two.dtype:
            raise _other(
                path,
                f"holds {name} as {_shape(one)}, the model has {_shape(two)}",
            )


def _compare_optimizers(path: Path, stored: dict[str, Any], state: "TrainState") -> list[str]:
    notes = []
    names = _names(state)
    if stored.keys() != state.optimizers.keys():
        raise _other(path, f"has optimizers {sorted(stored)}, the run has {sorted(state.optimizers)}")
    for name, optimizer in state.optimizers.items():
        if stored[name]["class"] != type(optimizer).__name__:
            raise _other(path, f"was made with {stored[name]['class']}, the run uses {type(optimizer).__name__}")
        there, here = stored[name]["groups"], files.strict_json(_groups(optimizer, names))
        if [sorted(group["params"]) for group in there] != [sorted(group["params"]) for group in here]:
            raise _other(path, "has its parameters in other optimizer groups")
        for one, two in zip(there, here, strict=True):
            for key in sorted((one.keys() | two.keys()) - {"lr", "params"}):
                if one.get(key) == two.get(key):
                    continue
                if key not in _EXECUTION:
                    raise _other(path, f"was made with {key} {one.get(key)}, the run has {two.get(key)}")
                notes.append(f"optimizer option {key} was {one.get(key)}, now {two.get(key)}")
    return notes


def _other_machine(stored: Mapping[str, Any], state: "TrainState") -> list[str]:
    here = files.strict_json(_machine(state))
    return [f"{key} was {stored.get(key)}, now {value}" for key, value in here.items() if stored.get(key) != value]


def _layers(weights: Mapping[str, Any]) -> int:
    """Blocks of the deepest stack: one more than the highest first number in a name."""
    numbers = [int(match[1]) for name in weights if (match := re.search(r"\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _other(path: Path, what: str) -> CheckpointError:
    beside = path.parent.parent / "config.yaml"
    return CheckpointError(what, where=str(path), code="E502", next=f"resume with the config saved beside it, {beside}")


def _restore(
    optimizer: torch.optim.Optimizer,
    names: dict[nn.Parameter, str],
    moments: dict[str, Tensor],
    facts: dict[str, Any],
    optimizer_name: str,
) -> None:
    """Fills the optimizer's state by parameter name, dtypes as stored: load_state_dict would cast them."""
    by_name: dict[str, dict[str, Any]] = {name: dict(values) for name, values in facts["scalars"].items()}
    for full, tensor in moments.items():
        owner, rest = full.split("/", 1)
        if owner == optimizer_name:
            name, key = rest.rsplit("/", 1)
            by_name.setdefault(name, {})[key] = tensor
    optimizer.state.clear()
    for group, stored in zip(optimizer.param_groups, facts["groups"], strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(stored["lr"])
        else:
            group["lr"] = stored["lr"]
        on_device = bool(group.get("fused") or group.get("capturable"))  # where torch keeps its step counters
        for parameter in group["params"]:
            if names[parameter] in by_name:
                optimizer.state[parameter] = {
                    key: value.to(parameter.device if key != "step" or on_device else "cpu", copy=True)
                    if isinstance(value, Tensor)
                    else value
                    for key, value in by_name[names[parameter]].items()
                }


# what is kept


def _steps(folder: Path) -> list[Path]:
    """Folders named as checkpoints, highest step first: by number, not by clock."""
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _there_already(path: Path, folder: Path, meta: Mapping[str, Any]) -> bool:
    """Whether this step is saved already, as when a save that was renamed to its place could not be synced.

    One that is damaged moves aside. Raises CheckpointError for another run's.
    """
    if not path.exists():
        return False
    try:
        manifest = files.verify_folder(path)
    except CheckpointError as error:
        if error.code == "E311":
            raise
        files.move_aside(path, folder / _INCOMPLETE)
        return False
    if manifest.get("meta") != meta:
        raise CheckpointError("belongs to another run", where=str(path), code="E502", next="take another folder")
    return True


def _prune(folder: Path, keep: int, state: "TrainState") -> None:
    """Removes all but the last `keep` and the best; hidden first, so that what is half removed is no checkpoint."""
    best = state.best.get("step") if state.best else None
    with files.machine_errors(folder, "pruned"):
        older = [path for path in _steps(folder) if int(path.name[5:]) <= state.step]
        for path in older[keep:]:
            if int(path.name[5:]) != best:
                hidden = folder / f".{path.name}{_PRUNED}"
                files.remove_tree(hidden)
                files.operations.rename(path, hidden)
                files.remove_tree(hidden)


def _clear(folder: Path) -> None:
    """Moves what a save left half-written to `.incomplete/`, removes what pruning left half-removed."""
    with files.machine_errors(folder, "read"):
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".step-") and path.name.endswith(".tmp"):
                files.move_aside(path, folder / _INCOMPLETE)
            elif path.name.startswith(".step-") and path.name.endswith(_PRUNED):
                with contextlib.suppress(OSError):
                    files.remove_tree(path)
