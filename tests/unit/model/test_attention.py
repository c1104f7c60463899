"""What computes attention: how it is chosen, and that flex and flash attention keep documents apart as eager does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flash_stand_in import install
from random_models import make
from torch.nn.attention.flex_attention import create_mask, flex_attention

from cloze.data.batches.make_batch import document_offsets
from cloze.errors import ConfigError, ModelError
from cloze.model.attention import (
    as_usual,
    attention_names,
    attention_order,
    check_attention,
    check_dropout,
    check_half,
)
from cloze.model.packed import (
    document_attention,
    document_block_mask,
    model_inputs,
    positions_in_documents,
    settle_attention,
)
from cloze.utils.foreign.pretrained import load_error

CPU = torch.device("cpu")
FAMILIES = ["bert", "roberta", "modernbert"]
SLOW = pytest.mark.slow
LONG, SHORT = 4096, 512  # tokens of a block
ALL = frozenset({"sdpa", "flash", "flex"})
FLASH_2, FLASH_3, FLEX = "flash_attention_2", "flash_attention_3", "flex_attention"
SEGMENTS = torch.tensor([[0] * 5 + [1] * 40 + [2] * 19, [0] * 64, [0] + [1] + [2] * 50 + [3] * 12])


@pytest.mark.parametrize(
    ("supports", "packed", "on_gpu", "half", "dropout", "installed", "expected"),
    [
        (ALL, LONG, True, True, False, [FLASH_3, FLASH_2], [FLASH_3, FLASH_2, FLEX, "sdpa", "eager"]),
        (ALL, LONG, True, True, False, [FLASH_2], [FLASH_2, FLEX, "sdpa", "eager"]),
        (ALL, LONG, True, True, True, [FLASH_3, FLASH_2], [FLASH_2, "sdpa", "eager"]),  # 3 and flex have no dropout
        (ALL, LONG, True, False, False, [FLASH_2], [FLEX, "sdpa", "eager"]),  # flash has no fp32
        (ALL, LONG, True, True, False, [], [FLEX, "sdpa", "eager"]),
        (ALL, SHORT, True, True, False, [], ["sdpa", FLEX, "eager"]),
        (ALL, SHORT, True, True, False, [FLASH_2], [FLASH_2, "sdpa", FLEX, "eager"]),
        (frozenset({"flex"}), SHORT, True, True, False, [], ["eager", FLEX]),
        (ALL, LONG, True, True, True, [], ["sdpa", "eager"]),
        (ALL, LONG, False, True, False, [FLASH_2], ["sdpa", "eager"]),
        (ALL, 0, True, True, False, [FLASH_2], ["sdpa", "eager"]),
        (frozenset({"sdpa"}), LONG, True, True, False, [FLASH_2], ["sdpa", "eager"]),
        (frozenset({"flash", "sdpa"}), LONG, True, True, False, [FLASH_2], [FLASH_2, "sdpa", "eager"]),
        (frozenset(), LONG, True, True, False, [FLASH_2], ["eager"]),
        (frozenset(), 0, False, False, True, [], ["eager"]),
    ],
)
def test_the_best_attention_that_can_be_used_comes_first(
    supports, packed, on_gpu, half, dropout, installed, expected: list[str]
):
    assert attention_order(supports, packed, on_gpu, half, dropout, installed) == expected


def test_concat_blocks_get_what_transformers_chooses():
    for model_type, expected in (("roberta", "sdpa"), ("deberta-v2", "eager")):
        model = make(model_type, None)
        assert attention_names(model, None, 0, True, True)[0] == model.config._attn_implementation == expected


def test_what_was_asked_for_is_used_and_nothing_else():
    assert attention_names(make("roberta", "eager"), "eager", 512, True, True) == ["eager"]


def block(ids: torch.Tensor, segments: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the loader gives of blocks [B, S]."""
    return {
        "input_ids": ids,
        "segments": segments,
        "document_offsets": torch.from_numpy(document_offsets(segments.numpy())),
    }


def refused(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises((ConfigError, ModelError)) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_attention_that_cannot_be_is_refused_in_one_line():
    roberta = make("roberta").config
    assert "no attention called flash; use one of eager, sdpa" in refused(check_attention, "flash", True)
    assert "flash attention needs a GPU; use sdpa" in refused(check_attention, "kernels-community/flash-attn2", False)
    assert "no backward pass on a CPU; use sdpa" in refused(check_attention, FLEX, False)
    assert "drops 10% of attention weights" in refused(check_dropout, FLEX, roberta)
    assert "attention_probs_dropout_prob=0.0" in refused(check_dropout, "kernels-community/vllm-flash-attn3", roberta)
    assert "half precision only; add --bf16" in refused(check_half, FLASH_2, "no")
    for name in (None, "eager", "sdpa", FLASH_2, FLEX, "kernels-community/flash-attn2"):
        check_attention(name, on_gpu=True)
    check_dropout(FLASH_2, roberta)
    check_dropout(FLEX, make("modernbert").config)
    check_half(FLASH_2, "bf16")
    check_half("sdpa", "no")
    with pytest.raises(ValueError, match="does not support") as theirs:
        make("deberta", "sdpa")
    assert "choose another --attn_implementation" in str(load_error(theirs.value, "deberta"))


def test_attention_that_fails_here_gives_way_to_the_next(capsys):
    model = make("roberta", "eager")
    assert settle_attention(model, ["no_such_attention", "sdpa", "eager"], 64, True).form == "boolean"
    assert model.config._attn_implementation == "sdpa"
    output = capsys.readouterr()
    assert "warning: no_such_attention attention is not used" in output.err
    assert "sdpa attention inside documents (boolean)" in output.out
    with pytest.raises(ModelError, match="cannot keep attention inside documents"):
        settle_attention(make("fnet", "eager"), ["eager"], 64, True)


def test_offsets_have_a_fixed_length_and_lose_no_document():
    offsets = document_offsets(SEGMENTS.numpy())
    assert offsets.dtype == np.int32
    assert offsets.tolist() == [0, 5, 45, 64, 128, 129, 130, 180, *[192] * 5]  # 3 * 64 / 16 documents fit
    assert len(document_offsets(np.zeros((3, 64), np.int32))) == len(offsets)
    many = document_offsets(np.tile(np.arange(32), (2, 1)))
    assert many.tolist() == list(range(65))


@pytest.mark.parametrize("window", [None, 8])
def test_a_block_mask_is_the_dense_mask(window: int | None):
    found = document_block_mask(SEGMENTS, window)
    assert found.shape == (3, 1, 64, 64)
    places = torch.arange(64)
    expected = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
    if window is not None:
        expected &= (places[:, None] - places[None, :]).abs() <= window
    assert (create_mask(found.mask_mod, 3, None, 64, 64, device="cpu")[:, 0] == expected).all()


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an attention that is all of transformers' flash attention but for the kernels, which stand in."""
    return install(monkeypatch)


@pytest.fixture
def unfused_flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flex attention as plain torch operations: the C++ kernels take up to a minute to build, and have no backward."""
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda query, key, value, training=False, **more: flex_attention(query, key, value, **more),
    )
    yield
    torch._dynamo.reset()


def pair(model_type: str, attention: str) -> tuple[Any, Any]:
    """The same model with eager and with another attention."""
    more = {"local_attention": 16} if model_type == "modernbert" else {}
    return make(model_type, "eager", **more), make(model_type, attention, **more)


def answer(model: Any, gradients: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The logits of three blocks of documents, and the gradients of their mean square."""
    rule = document_attention(model, 64, 300)
    ids = torch.randint(5, 300, (3, 64), generator=torch.Generator().manual_seed(3))
    with torch.set_grad_enabled(gradients):
        logits = model(**model_inputs(block(ids, SEGMENTS), CPU, rule)).logits
    if not gradients:
        return logits, []
    logits.square().mean().backward()
    return logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def compare(eager: Any, other: Any, gradients: bool) -> tuple[float, float]:
    """Largest difference of logits over the largest logit; norm of the difference of gradients over their norm."""
    here, there = answer(other, gradients), answer(eager, gradients)
    assert len(here[1]) == len(there[1])
    squares = [((a - b).square().sum(), b.square().sum()) for a, b in zip(here[1], there[1], strict=True)]
    norm = float(sum(d for d, _ in squares) / sum(b for _, b in squares)) ** 0.5 if squares else 0.0
    return float((here[0] - there[0]).abs().max() / there[0].abs().max()), norm


@pytest.mark.parametrize(
    "model_type", [pytest.param("bert", marks=SLOW), pytest.param("roberta", marks=SLOW), "modernbert"]
)
def test_sdpa_gives_the_logits_and_gradients_of_eager(model_type: str, figure):
    logits, gradients = compare(*pair(model_type, "sdpa"), gradients=True)
    figure("best_fit, sdpa against eager: logits", logits)
    figure("best_fit, sdpa against eager: gradient", gradients)
    assert max(logits, gradients) < 1e-5


@pytest.mark.parametrize("model_type", FAMILIES)
def test_flash_attention_gets_what_it_needs_to_give_the_logits_and_gradients_of_eager(model_type: str, flash, figure):
    eager, other = pair(model_type, flash)
    assert settle_attention(other, [flash], 64, True).form == "varlen"
    logits, gradients = compare(eager, other, gradients=True)
    figure("best_fit, offsets for flash attention (stand-in) against eager: logits", logits)
    figure("best_fit, offsets for flash attention (stand-in) against eager: gradient", gradients)
    assert max(logits, gradients) < 1e-5


@pytest.mark.parametrize("model_type", ["bert", pytest.param("roberta", marks=SLOW), "modernbert"])
def test_flex_attention_gives_the_logits_and_gradients_of_eager(model_type: str, unfused_flex, monkeypatch, figure):
    eager, other = pair(model_type, FLEX)
    assert document_attention(other, 64, 300).form == "flex"
    # PyTorch refuses the backward pass on a CPU before it looks further; unfused, it has one.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    logits, gradients = compare(eager, other, gradients=True)
    figure("best_fit, flex (unfused) against eager: logits", logits)
    figure("best_fit, flex (unfused) against eager: gradient", gradients)
    assert max(logits, gradients) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_compiled_flex_attention_gives_the_logits_of_eager(model_type: str, figure):
    logits, _ = compare(*pair(model_type, FLEX), gradients=False)
    torch._dynamo.reset()
    figure("best_fit, flex (compiled for the CPU) against eager: logits", logits)
    assert logits < 1e-5


def test_flex_attention_has_no_backward_pass_on_a_cpu():
    """Why it is refused there. Where this fails, torch has one now: let `check_attention` take it."""
    query = torch.zeros(1, 1, 16, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex_attention(query, query, query)


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2"])
def test_a_model_that_is_to_use_flex_attention_is_tried_out_on_the_cpu(model_type: str, flash):
    for name in (FLEX, flash, "eager") if model_type == "bert" else ("eager",):
        model = make(model_type, name)
        with as_usual(model):
            model(input_ids=torch.zeros(1, 64, dtype=torch.int64)).logits.sum().backward()
            assert model.config._attn_implementation == ("eager" if name == "eager" else "sdpa")
        assert model.config._attn_implementation == name


class Forgetful(torch.nn.Module):
    """An attention layer that hands its inputs on, but not the offsets of documents."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any, cu_seq_lens_q: Any = None, cu_seq_lens_k: Any = None, **more: Any) -> Any:
        return self.inner(*inputs, **more)


def test_an_architecture_that_does_not_hand_offsets_on_is_refused(flash):
    model = make("bert", flash)
    model.bert.encoder.layer[1].attention.self = Forgetful(model.bert.encoder.layer[1].attention.self)
    with pytest.raises(ModelError, match="stand_in_flash"):
        document_attention(model, 64, 300)
    assert model.config._attn_implementation == flash


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [FLEX, FLASH_2])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_on_a_gpu_documents_get_the_logits_of_eager(model_type: str, name: str):
    """In bf16, whose rounding is 1/256 of a value; attention that leaked would differ by half of the largest logit."""
    pytest.importorskip("flash_attn" if name == FLASH_2 else "triton")
    rules, found = {}, {}
    ids = torch.randint(5, 300, (3, 64), generator=torch.Generator().manual_seed(3))
    for one in ("eager", name):
        model = make(model_type, one, **({"local_attention": 16} if model_type == "modernbert" else {}))
        rules[one] = document_attention(model, 64, 300)
        model.cuda()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            inputs = model_inputs(block(ids, SEGMENTS), torch.device("cuda"), rules[one])
            found[one] = model(**inputs).logits.float()
    assert (found["eager"] - found[name]).abs().max() / found["eager"].abs().max() < 5e-2


def test_positions_and_offsets_speak_of_the_same_documents():
    starts = (positions_in_documents(SEGMENTS).flatten() == 0).nonzero().flatten().tolist()
    assert np.unique(document_offsets(SEGMENTS.numpy())).tolist() == [*starts, SEGMENTS.numel()]
