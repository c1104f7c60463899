"""What is compiled by us and what is not, and that attention stays the fused one."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from ranks import run_ranks, succeed
from transformers import AutoConfig, AutoModelForMaskedLM, masking_utils
from transformers.utils import import_utils

from cloze.model.compiled import compile_backbone, eagerly
from cloze.training.determinism import use_same_bits


def tiny():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model("roberta", vocab_size=101, **sizes)
    return AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa")


class Graphs:
    """A backend of torch.compile that keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        self.seen.append(graph)
        return graph.forward


def test_inside_eagerly_our_backbone_is_not_compiled_and_what_libraries_compile_is():
    torch._dynamo.reset()
    ours, theirs = Graphs(), Graphs()
    model, kernel = tiny(), torch.compile(lambda x: x + 1, backend=theirs)
    compile_backbone(model, "default", backend=ours)  # type: ignore[arg-type]
    ids = torch.full((1, 8), 7)
    with torch.no_grad(), eagerly():
        model(input_ids=ids)
        assert kernel(torch.zeros(3)).tolist() == [1.0] * 3
    assert (len(ours.seen), len(theirs.seen)) == (0, 1)
    with torch.no_grad():
        model(input_ids=ids)
    assert len(ours.seen) == 1


def test_blocks_without_padding_get_no_mask_when_they_are_compiled():
    """With one, sdpa cannot reach the flash kernels."""
    torch._dynamo.reset()
    graphs, model = Graphs(), tiny()
    compile_backbone(model, "default", backend=graphs)  # type: ignore[arg-type]
    model(input_ids=torch.full((2, 8), 7))
    calls = [node for node in graphs.seen[0].graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert len(calls) == 1
    assert calls[0].kwargs.get("attn_mask") is None
    assert len(calls[0].args) == 3


def test_what_is_changed_for_that_is_as_before_when_the_forward_is_done():
    torch._dynamo.reset()
    model = tiny()
    compile_backbone(model, "default", backend=Graphs())  # type: ignore[arg-type]
    model(input_ids=torch.full((2, 8), 7))
    assert masking_utils.is_torchdynamo_exporting is import_utils.is_torchdynamo_exporting


def check_determinism(strict: bool) -> None:
    use_same_bits(strict=strict)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() is not strict
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.backends.cudnn.deterministic


def test_full_determinism_sets_what_pytorch_names_for_it(tmp_path: Path):
    for strict in (True, False):
        succeed(run_ranks(check_determinism, 1, tmp_path, strict=strict))
