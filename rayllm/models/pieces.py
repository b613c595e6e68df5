"""What training changes, as pieces of named parameters: checkpoints that any number of ranks can write and read.

Under ZeRO each rank keeps contiguous parts of the flattened parameters in float32, and the optimizer's state of these
parts. A rank writes its pieces under the parameter's name and their place in it; a reader takes what overlaps its own
pieces, whatever the number of ranks or the ZeRO stage on either side. Nothing is gathered.

Frozen parameters are not among them: they come with the model that the run starts from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from rayllm.checkpoints import CheckpointError, Files, write_file

WEIGHT, STEP = "weight", "step"
TENSORS = "tensors"
"""Fact of each file: how many it holds."""

PART_BYTES = 2**28
"""Of one file, about: so much more memory a save takes."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A contiguous part of a flattened parameter, where this rank keeps it in full precision."""

    name: str
    start: int
    """Of its first element in the parameter."""

    numel: int
    master: torch.Tensor
    """Holds it, perhaps beside others; the key of the optimizer's state."""

    offset: int
    """Of its first element in ``master``."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece's part of ``master``, or of a state tensor of its shape."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def pieces_of(module: nn.Module, optimizer: Any, *, zero_stage: int, rank: int) -> list[Piece]:
    """This rank's pieces of all trained parameters, in the order of the parameters.

    Args:
        module: under training.
        optimizer: the engine's: DeepSpeed's around the real one, or with stage 0 and float32 the real one.
        zero_stage: of the engine.
        rank: of this process.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if zero_stage == 0:
        masters = dict(whole_masters(optimizer))
        return [Piece(name, 0, p.numel(), masters.get(p, p), 0) for name, p in trained]
    if zero_stage == 3:
        return [piece for name, p in trained if (piece := _sharded(name, p, optimizer, rank)) is not None]
    pieces = []
    for name, p in trained:
        mapping = p._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:  # this rank has a part of it
            part, place = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            master = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            pieces.append(Piece(name, part.start, part.numel, master, place.start))
    return pieces


def whole_masters(optimizer: Any) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Stage 0: each half-precision parameter and its float32 master; nothing in float32."""
    for low, high in zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True):
        yield from zip(low, high, strict=True)


def _sharded(name: str, parameter: Any, optimizer: Any, rank: int) -> Piece | None:
    """ZeRO-3 cuts each parameter into equal parts, the last one padded."""
    group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = rank * numel
    held = min(numel, parameter.ds_numel - start)
    return Piece(name, start, held, optimizer.fp32_partitioned_groups_flat[group], offset) if held > 0 else None


def trained_sizes(module: nn.Module) -> dict[str, int]:
    """Name -> number of values of every trained parameter, sharded or not."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return {name: int(getattr(p, "ds_numel", p.numel())) for name, p in named}


def make_step(optimizer: Any, device: torch.device, value: float) -> Any:
    """A step counter: DeepSpeed's Adam on the host counts in ints, torch's in tensors, on the device if fused."""
    if type(optimizer).__name__ == "DeepSpeedCPUAdam":
        return int(value)
    fused = any(group.get("fused") for group in optimizer.param_groups)
    return torch.tensor(value, dtype=torch.float32, device=device if fused else "cpu")


@torch.no_grad()
def refresh_weights(optimizer: Any, *, zero_stage: int) -> None:
    """Make the weights from the float32 masters, after these were replaced. Every rank must call it."""
    if zero_stage == 0:
        for low, high in whole_masters(optimizer):
            low.copy_(high)
    elif zero_stage < 3:
        optimizer._hp_optimizer_states_linked = False  # the state is another; linked again at the next step
        optimizer.update_lp_params()
    else:
        flat = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
        for low, high in flat:
            low.copy_(high)
        optimizer.checkpoint_event_epilogue()


def write_pieces(
    pieces: Iterable[Piece],
    state: Mapping[Any, Mapping[str, Any]],
    folder: Path,
    *,
    rank: int,
    facts: Mapping[str, str],
) -> Files:
    """Write a rank's pieces and their optimizer state.

    Args:
        pieces: to write; together the ranks' cover every trained parameter.
        state: of the optimizer, by master.
        folder: gets ``part-RANK-NUMBER.safetensors``.
        rank: of this process.
        facts: short text beside the tensors, for `read_pieces`.
    """
    files: Files = {}
    part: dict[str, torch.Tensor] = {}

    def flush() -> None:
        path = folder / f"part-{rank}-{len(files)}.safetensors"
        files.update(write_file(path, save(part, metadata={**facts, TENSORS: str(len(part))})))
        part.clear()

    folder.mkdir(parents=True, exist_ok=True)
    for piece in pieces:
        for key, tensor in _tensors(piece, state):
            part[f"{key}|{piece.start}|{piece.name}"] = tensor.to("cpu", copy=True)
        if sum(tensor.nbytes for tensor in part.values()) > PART_BYTES:
            flush()
    flush()
    return files


def _tensors(piece: Piece, state: Mapping[Any, Mapping[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    yield WEIGHT, piece.of(piece.master)
    for key, value in state.get(piece.master, {}).items():
        if key == STEP:
            yield STEP, torch.as_tensor(value, dtype=torch.float64).view(1)
        else:
            yield key, piece.of(value)


def read_pieces(
    pieces: Sequence[Piece],
    trained: Mapping[str, int],
    state: dict[Any, dict[str, Any]],
    folder: Path,
    *,
    make_step: Callable[[float], Any],
) -> dict[str, str]:
    """Fill this rank's pieces and the optimizer's state; returns the facts of `write_pieces`.

    Args:
        pieces: this rank's.
        trained: names and sizes of all trained parameters.
        state: of the optimizer, by master; what it has of these masters is replaced.
        folder: with all ranks' parts.
        make_step: the optimizer's own kind of step counter.

    Raises:
        CheckpointError: the files are of other parameters, or a part is missing.
    """
    with ExitStack() as stack:
        saved = _Saved(folder, stack)
        saved.check_names(trained)
        made: dict[Any, dict[str, Any]] = {piece.master: {} for piece in pieces}
        for piece in pieces:
            for key in saved.keys(piece.name):
                if key == WEIGHT:
                    saved.read(key, piece, piece.of(piece.master))
                elif key == STEP:
                    made[piece.master][STEP] = make_step(saved.scalar(key, piece.name))
                else:
                    whole = made[piece.master].setdefault(key, torch.zeros_like(piece.master).detach())
                    saved.read(key, piece, piece.of(whole))
        for master, values in made.items():
            state.pop(master, None)
            if values:
                state[master] = values
        return saved.facts


class _Saved:
    """The parts of all ranks, by key and parameter."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.facts: dict[str, str] = {}
        # parameter -> key -> (start, end, file, name in the file)
        self._places: dict[str, dict[str, list[tuple[int, int, Any, str]]]] = defaultdict(lambda: defaultdict(list))
        for path in sorted(folder.glob("part-*.safetensors")):
            file = stack.enter_context(safe_open(path, "pt"))
            self.facts = file.metadata() or {}
            entries = list(file.keys())
            if self.facts.get(TENSORS) != str(len(entries)):
                raise CheckpointError(f"{path} has {len(entries)} tensors, {self.facts.get(TENSORS)} were written")
            for entry in entries:
                key, start, name = entry.split("|", 2)
                end = int(start) + file.get_slice(entry).get_shape()[0]
                self._places[name][key].append((int(start), end, file, entry))
        if not self._places:
            raise CheckpointError(f"no complete checkpoint in {folder}: no part-*.safetensors")

    def check_names(self, trained: Mapping[str, int]) -> None:
        sizes = {name: max((end for _, end, *_ in keys[WEIGHT]), default=0) for name, keys in self._places.items()}
        if sizes != dict(trained):
            missing, extra = sorted(trained.keys() - sizes.keys()), sorted(sizes.keys() - trained.keys())
            other = sorted(name for name in sizes.keys() & trained.keys() if sizes[name] != trained[name])
            raise CheckpointError(
                f"{self.folder} is of another model, or a part is gone: missing {missing[:3]}, unknown {extra[:3]}, "
                f"of another size {other[:3]}"
            )

    def keys(self, name: str) -> Iterable[str]:
        return self._places[name]

    def scalar(self, key: str, name: str) -> float:
        _, _, file, entry = self._places[name][key][0]
        return float(file.get_tensor(entry))

    def read(self, key: str, piece: Piece, into: torch.Tensor) -> None:
        """Copy what overlaps ``piece``."""
        found = 0
        first, last = piece.start, piece.start + piece.numel
        for start, end, file, entry in self._places[piece.name][key]:
            a, b = max(start, first), min(end, last)
            if a < b:
                into[a - first : b - first].copy_(file.get_slice(entry)[a - start : b - start])
                found += b - a
        if found != piece.numel:
            raise CheckpointError(
                f"{self.folder}: {found} of {piece.numel} values of {piece.name} ({key}) from {piece.start} are there"
            )
