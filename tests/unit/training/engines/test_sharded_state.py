"""The parts of a parameter that ranks hold and write make up exactly the whole, for any shape and number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plain_engine import plain_engine
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from cloze.checkpoint.format import WEIGHT
from cloze.checkpoint.reader import PieceReader
from cloze.errors import CheckpointError
from cloze.training.checkpointing.snapshot import share_to_write
from cloze.training.engines.fsdp2 import FSDP2Engine, own_rows
from cloze.training.engines.sharded_state import create_state, scalars, tensor_keys

FEW = settings(max_examples=15, deadline=None, derandomize=True, database=None)
SHAPES = {"one": (1,), "row": (1, 3), "column": (3, 1), "matrix": (4, 2), "cube": (5, 1, 2), "empty": (0, 3)}
ONES = {"scalar": (), "one": (1,), "row": (1, 1), "matrix": (2, 2)}


class Shaped(torch.nn.Module):
    """A module with the given parameters."""

    def __init__(self, parameters: dict[str, torch.Tensor]):
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, torch.nn.Parameter(value))


@contextmanager
def rank_of(world_size: int, rank: int) -> Iterator[DeviceMesh]:
    """Act as one of several ranks, in torch's fake process group, which does not communicate."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield init_device_mesh("cpu", (world_size,))
    finally:
        dist.destroy_process_group()


def rows_of(whole: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """Return the rank's rows of a tensor, as FSDP2 holds them."""
    parts = torch.chunk(whole, mesh.size())
    rank = mesh.get_local_rank()
    own = parts[rank].clone() if rank < len(parts) else whole[:0].clone()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_the_rows_of_all_ranks_make_up_the_parameter(world_size: int):
    """Some ranks have fewer rows than others, or none."""
    wholes = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    covered: dict[str, list[int]] = {name: [] for name in SHAPES}
    for rank in range(world_size):
        with rank_of(world_size, rank) as mesh:
            module = Shaped({name: rows_of(torch.zeros_like(whole), mesh) for name, whole in wholes.items()})
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            engine = FSDP2Engine(Accelerator(cpu=True))
            engine.attach(module, optimizer)
            engine.set_weights(wholes)
            held = {fragment.name: fragment for fragment in engine.fragments()}
            for name, parameter in module.named_parameters():
                assert torch.equal(parameter.to_local(), rows_of(wholes[name], mesh).to_local()), name
                offset, length = own_rows(parameter)
                covered[name] += range(offset, offset + length)
                assert (name in held) == (length > 0)
                if length:
                    assert (held[name].offset, held[name].length, held[name].shape) == (offset, length, SHAPES[name])
                    expected = wholes[name].reshape(-1)[offset : offset + length]
                    assert torch.equal(held[name].view(WEIGHT, optimizer.state), expected)
    assert covered == {name: list(range(whole.numel())) for name, whole in wholes.items()}


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_each_parameter_that_all_ranks_hold_is_written_by_one_rank_and_the_load_is_even(world_size: int):
    module = Shaped({f"{name}{n}": torch.zeros(shape) for n in (1, 2) for name, shape in SHAPES.items()})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    engine = plain_engine(module, optimizer)
    engine.world_size, held, shares = world_size, engine.fragments(), []
    assert all((f.offset, f.start, f.length) == (0, 0, f.owner.numel()) for f in held)
    for engine.rank in range(world_size):
        shares.append(share_to_write(held, engine))
    written = [fragment.name for share in shares for fragment in share]
    assert sorted(written) == sorted(name for name, p in module.named_parameters() if p.numel())
    loads = [sum(fragment.length for fragment in share) for share in shares]
    assert max(loads) - min(loads) <= max(fragment.length for fragment in held)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_a_number_in_optimizer_state_is_not_taken_for_a_tensor_whatever_the_parameter_shape(optimizer_class):
    module = Shaped({name: torch.ones(shape) for name, shape in ONES.items()})
    more = {"momentum": 0.9} if optimizer_class is not torch.optim.AdamW else {}
    optimizer = optimizer_class(module.parameters(), lr=0.1, **more)
    for _ in range(2):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    keys = {
        "AdamW": ["exp_avg", "exp_avg_sq"],
        "SGD": ["momentum_buffer"],
        "RMSprop": ["momentum_buffer", "square_avg"],
    }
    numbers = {} if optimizer_class is torch.optim.SGD else {"step": 2.0}
    held = plain_engine(module, optimizer).fragments()
    assert [fragment.name for fragment in held] == list(ONES)
    other = optimizer_class(
        Shaped({name: torch.ones(shape) for name, shape in ONES.items()}).parameters(), **more, lr=1
    )
    for fragment in held:
        assert tensor_keys(fragment, optimizer.state) == keys[optimizer_class.__name__]
        more = {"other": torch.ones(7, 7), "text": "value", **optimizer.state[fragment.owner]}
        assert tensor_keys(fragment, {fragment.owner: more}) == keys[optimizer_class.__name__]
        assert scalars(fragment.owner, optimizer.state) == numbers
        create_state(other, fragment, tensor_keys(fragment, optimizer.state), numbers)
        made = other.state[fragment.owner]
        assert {key: value.shape for key, value in made.items() if key != "step"} == dict.fromkeys(
            keys[optimizer_class.__name__], fragment.owner.shape
        )
        assert not any(value.any() for key, value in made.items() if key != "step")
        assert [float(made[key]) for key in numbers] == list(numbers.values())


@FEW
@given(st.integers(1, 8), st.lists(st.integers(0, 8), max_size=4), st.randoms(use_true_random=False))
@example(size=1, cuts=[], random=None)
@example(size=2, cuts=[1], random=None)
@example(size=8, cuts=list(range(9)), random=None)  # pieces of one element
def test_any_range_of_elements_is_read_from_pieces_of_any_length(tmp_path_factory, size: int, cuts: list[int], random):
    folder = tmp_path_factory.mktemp("pieces")
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    pieces = []
    for number, (begin, end) in enumerate(pairwise(edges)):
        save_file({"x:weight": torch.arange(begin, end, dtype=torch.float32)}, folder / f"{number}.safetensors")
        piece = {"offset": begin, "length": end - begin, "file": f"{number}.safetensors", "sum": number}
        pieces.append({"name": "x", "key": "weight", **piece})
    if random is not None:
        random.shuffle(pieces)
    manifest = {"parameters": {"x": {"shape": [size], "trained": True, "scalars": {}}}, "pieces": pieces}
    with PieceReader(folder, manifest) as reader:
        assert reader.read("x", "weight").tolist() == list(range(size))
        for begin in range(size):
            for end in range(begin, size + 1):
                assert reader.read("x", "weight", begin, end - begin).tolist() == list(range(begin, end))
        with pytest.raises(CheckpointError, match=f"1 of 2 elements of x:{WEIGHT} are there"):
            reader.read("x", "weight", size - 1, 2)
        assert reader.sums() == {("x", "weight"): sum(range(len(pieces)))}
        assert sorted(offset for offset, _ in reader.pieces("x", "weight")) == edges[:-1]
        assert sorted(value for _, part in reader.pieces("x", "weight") for value in part.tolist()) == [*range(size)]
