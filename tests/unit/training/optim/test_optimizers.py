"""Which parameters decay, how fast each layer learns, and which matrices are Muon's."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from cloze.config import TrainConfig
from cloze.errors import ConfigError
from cloze.model.depth import parameter_depths
from cloze.training.engines import deepspeed, fsdp2
from cloze.training.engines.ddp import DDPEngine
from cloze.training.optim.optimizers import _refused, build_optimizer, check_optimizer, check_update, hidden_matrices

SIZES = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
BART = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}


def config(**values) -> TrainConfig:
    return TrainConfig(dataset_name="", output_dir="", **values)


def tiny(model_type: str, **values) -> torch.nn.Module:
    special = {f"{kind}_token_id": 0 for kind in ("pad", "bos", "eos", "cls", "sep")}
    sizes = BART if model_type in ("bart", "mbart") else SIZES
    return AutoModelForMaskedLM.from_config(
        AutoConfig.for_model(model_type, **{"vocab_size": 20, **special, **sizes, **values})
    )


def test_biases_and_norms_do_not_decay():
    model = tiny("bert")
    optimizer, names = build_optimizer(model, config(weight_decay=0.1), offload=False)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(name.endswith(".weight") and "LayerNorm" not in name for name in names[0])
    assert all(name.endswith("bias") or "LayerNorm" in name for name in names[1])
    assert sorted(names[0] + names[1]) == sorted(name for name, _ in model.named_parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert "lr_scale" not in optimizer.param_groups[0]


# Exponents of the decay for L layers: embeddings L + 1, layer l L - l, the head and the last norm 0.
DEPTHS = {
    "bert": {
        "bert.embeddings.word_embeddings.weight": 4,
        "bert.embeddings.LayerNorm.bias": 4,
        "bert.encoder.layer.0.attention.self.query.weight": 3,
        "bert.encoder.layer.2.output.LayerNorm.weight": 1,
        "cls.predictions.transform.dense.weight": 0,
        "cls.predictions.bias": 0,
    },
    "roberta": {
        "roberta.embeddings.position_embeddings.weight": 4,
        "roberta.encoder.layer.1.intermediate.dense.weight": 2,
        "lm_head.dense.weight": 0,
    },
    "modernbert": {
        "model.embeddings.tok_embeddings.weight": 4,
        "model.layers.0.mlp.Wi.weight": 3,
        "model.layers.2.attn.Wo.weight": 1,
        "model.final_norm.weight": 0,
        "head.dense.weight": 0,
    },
    "albert": {  # its layers share their weights, and are one
        "albert.embeddings.word_embeddings.weight": 2,
        "albert.encoder.embedding_hidden_mapping_in.weight": 2,
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": 1,
        "predictions.dense.weight": 0,
    },
    "bart": {  # two layers of the encoder, then one of the decoder
        "model.shared.weight": 4,
        "model.encoder.layernorm_embedding.weight": 4,
        "model.decoder.embed_positions.weight": 4,
        "model.encoder.layers.0.fc1.weight": 3,
        "model.encoder.layers.1.fc1.weight": 2,
        "model.decoder.layers.0.fc1.weight": 1,
    },
    "mbart": {"model.encoder.layer_norm.weight": 2, "model.decoder.layer_norm.weight": 0},
    "deberta": {
        "deberta.embeddings.word_embeddings.weight": 4,
        "deberta.encoder.rel_embeddings.weight": 4,
        "deberta.encoder.layer.1.attention.self.in_proj.weight": 2,
        "cls.predictions.transform.dense.weight": 0,
    },
}


@pytest.mark.parametrize("model_type", DEPTHS)
def test_each_layer_learns_at_a_share_of_the_one_above(model_type: str):
    more = {"relative_attention": True} if model_type == "deberta" else {}
    model = tiny(model_type, **more)
    optimizer, names = build_optimizer(model, config(layerwise_lr_decay=0.9, weight_decay=0.1), offload=False)
    scale = {name: g["lr_scale"] for group, g in zip(names, optimizer.param_groups, strict=True) for name in group}
    assert scale.keys() == dict(model.named_parameters()).keys()
    expected = {name: 0.9**exponent for name, exponent in DEPTHS[model_type].items()}
    assert {name: scale[name] for name in expected} == pytest.approx(expected)
    decays = {
        name: g["weight_decay"] for group, g in zip(names, optimizer.param_groups, strict=True) for name in group
    }
    assert all((decays[name] == 0.1) == (p.ndim >= 2) for name, p in model.named_parameters())


def test_a_tied_decoder_is_as_deep_as_the_embeddings_and_one_of_its_own_as_the_head():
    for tied, depth in ((True, 0), (False, 4)):
        depths, num_layers = parameter_depths(tiny("bert", tie_word_embeddings=tied))
        assert (num_layers, depths["cls.predictions.decoder.weight"]) == (3, depth)


def test_lists_side_by_side_are_parts_of_one_layer():
    """XLM keeps attentions, norms and feed-forward parts in lists of their own."""
    sizes = {"emb_dim": 8, "n_layers": 3, "n_heads": 2, "pad_index": 0}
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("xlm", vocab_size=20, **sizes))
    depths, num_layers = parameter_depths(model)
    assert num_layers == 3
    for part in ("attentions.1.q_lin.weight", "layer_norm1.1.weight", "ffns.1.lin1.weight", "layer_norm2.1.bias"):
        assert depths[f"transformer.{part}"] == 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["bert", "modernbert", "bart", "mobilebert"])
def test_muon_takes_hidden_matrices_only(model_type: str, tied: bool):
    more = {"embedding_size": 4, "true_hidden_size": 8} if model_type == "mobilebert" else {}
    model = tiny(model_type, tie_word_embeddings=tied, **more)
    optimizer, names = build_optimizer(model, config(optim="muon", weight_decay=0.1), offload=False)
    muon = {n for group, g in zip(names, optimizer.param_groups, strict=True) if g["use_muon"] for n in group}
    assert muon == hidden_matrices(model)
    for name, parameter in model.named_parameters():
        words = [word for word in ("embed", "shared", "decoder.weight", "lm_head") if word in name]
        is_hidden = parameter.ndim == 2 and 20 not in parameter.shape
        assert (name in muon) == (is_hidden and (not words or "embedding_transformation" in name)), name
    assert len(muon) >= 13


def test_what_muon_leaves_is_updated_as_by_adamw():
    """And its own update is orthogonal, as large as AdamW's, and decays the weight by lr * weight_decay."""
    torch.manual_seed(0)
    ours, theirs = tiny("bert"), tiny("bert")
    theirs.load_state_dict(ours.state_dict())
    values = {"weight_decay": 0.1, "learning_rate": 1e-2}
    one, names = build_optimizer(ours, config(optim="muon", **values), offload=False)
    other, _ = build_optimizer(theirs, config(**values), offload=False)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        parameter.grad = torch.randn_like(parameter)
        theirs.get_parameter(name).grad = parameter.grad.clone()
    one.step()
    other.step()
    muon = hidden_matrices(ours)
    for name, parameter in ours.named_parameters():
        if name not in muon:
            torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-5, atol=1e-6)
            continue
        update = (before[name] * (1 - 1e-3) - parameter) / 1e-2
        singular = torch.linalg.svdvals(update) / (0.2 * max(update.shape) ** 0.5)
        assert singular.min() > 0.3
        assert singular.max() < 1.3
    assert len(one.param_groups) == 3
    assert [len(group) for group in names] == [len(group["params"]) for group in one.param_groups]


def test_stable_adamw_is_adamw_until_a_gradient_is_larger_than_those_before():
    """Then the step is divided by the root mean square of gradient / sqrt(second moment) (Wortsman et al. 2023)."""
    steps = {}
    for optim in ("stable_adamw", "adamw_torch"):
        model = BertForMaskedLM(BertConfig(**{**SIZES, "num_hidden_layers": 1}, vocab_size=20))
        values = {"adam_beta2": 0.9, "learning_rate": 1e-2, "adam_epsilon": 1e-12}
        optimizer, _ = build_optimizer(model, config(optim=optim, **values), offload=False)
        steps[optim] = []
        for size in (1.0, 1.0, 100.0):
            before = model.cls.predictions.bias.detach().clone()
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, size)
            optimizer.step()
            steps[optim].append(float((before - model.cls.predictions.bias.detach()).mean()))
    assert steps["stable_adamw"][:2] == pytest.approx(steps["adamw_torch"][:2], rel=1e-4)
    second = (0.9**2 * 0.1 + 0.9 * 0.1 + 0.1 * 100**2) / (1 - 0.9**3)
    assert steps["stable_adamw"][2] == pytest.approx(steps["adamw_torch"][2] / (100 / second**0.5), rel=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": "muon", "optim_args": "momentun=0.9"}, "muon takes no momentun here; it has adamw_eps"),
        ({"optim": "stable_adamw", "optim_args": "lr=1"}, "takes no lr here; it is the flag --learning_rate"),
        (
            {"optim": "sgd", "optim_args": "weight_decay=1"},
            "sgd takes no weight_decay here",
        ),
        ({"optim": "muon", "optim_args": "momentum=2"}, "momentum must be at least 0 and below 1, not 2"),
        (
            {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=yes"},
            "yes in line 1 differs between YAML 1.1 and 1.2",
        ),
        ({"optim": "muon", "optim_args": "adamw_lr=-1"}, "adamw_lr=-1 is not a learning rate"),
        ({"optim": "muon", "optim_args": "adamw_lr=1", "learning_rate": 0.0}, "adamw_lr=1 is not a learning rate"),
        ({"optim": "muon", "optim_args": "adamw_lr=fast"}, "adamw_lr must be a finite number, not 'fast'"),
        ({"optim": "sgd", "optim_args": "momentum=nan"}, "momentum must be at least 0 and below 1, not nan"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,nesterov=maybe"}, "nesterov must be true or false, not 'maybe'"),
        ({"optim": "rmsprop", "optim_args": "eps=0"}, "eps must be at least 1e-30 and at most 1, not 0"),
        ({"optim": "sgd", "optim_args": "momentum"}, "cannot read 'momentum'"),
        ({"optim": "sgd", "optim_args": "0=1"}, "cannot read '0=1'"),
        ({"optim": "sgd", "optim_args": "momentum=["}, "--optim_args: not YAML"),
        ({"optim": "sgd", "optim_args": "momentum=!!python/name:os.system"}, "uses the tag"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "momentum must be at least 0 and below 1, not -1"),
        ({"optim_args": "betas=[0.9]"}, "takes no betas here; it is the flag --adam_beta1"),
        ({"optim": "sgd", "optim_args": "foreach=true,fused=true"}, "--optim_args: .*foreach"),
        ({"optim": "adamw_torch_fused", "optim_args": "foreach=true"}, "--optim_args: .*foreach"),
        ({"optim": "sgd", "optim_args": "maximize=true"}, "sgd takes no maximize here"),
        ({"optim_args": "differentiable=true"}, "takes no differentiable here"),
        ({"optim": "rmsprop", "optim_args": "capturable=true"}, "takes no capturable here"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,momentum=0.8"}, "momentum is given twice"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,dampening=3"}, "dampening must be at least 0 and below 1"),
        ({"optim": "rmsprop", "optim_args": "foreach=maybe"}, "foreach must be true or false"),
        ({"optim": "muon", "optim_args": "ns_steps=2.5"}, "cannot be interpreted as an integer"),
        ({"optim": "muon", "optim_args": "ns_coeffs=fastest"}, "--optim_args: "),
        ({"optim": "muon", "optim_args": "ns_method=newton"}, "--optim_args: "),
    ],
)
def test_arguments_that_an_optimizer_does_not_have_are_one_line(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        check_optimizer(config(**values))


def test_small_numbers_may_be_written_without_a_point():
    optimizer, _ = build_optimizer(tiny("bert"), config(optim_args="eps=1e-7,amsgrad=true"), offload=False)
    assert (optimizer.defaults["eps"], optimizer.defaults["amsgrad"]) == (1e-7, True)


def test_muons_two_learning_rates_follow_one_schedule():
    """Keller Jordan's scale: 0.02 for matrices, 3e-4 for the rest; `Engine.step` multiplies by lr_scale."""
    values = {"optim": "muon", "learning_rate": 0.02, "optim_args": "use_adjusted_lr=false,adamw_lr=3e-4"}
    optimizer, _ = build_optimizer(tiny("bert"), config(**values), offload=False)
    for group in optimizer.param_groups:
        assert 0.02 * group.get("lr_scale", 1.0) == pytest.approx(0.02 if group["use_muon"] else 3e-4)
        assert group["use_muon"] is False or group["use_adjusted_lr"] is False


@pytest.mark.parametrize("optim", ["stable_adamw", "muon"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, optim: str):
    check_optimizer(config(optim=optim))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "pytorch_optimizer" else found(name, *more)
    )
    check_optimizer(config())
    with pytest.raises(ConfigError) as caught:
        check_optimizer(config(optim=optim))
    assert str(caught.value) == f"--optim: {optim} is not installed; `pip install cloze[optimizers]` for it"


@pytest.mark.parametrize("optim", ["stable_adamw", "muon", "adamw_torch"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3, "FSDP2"])
def test_an_optimizer_that_needs_whole_tensors_gets_them_or_is_refused(stage, precision: str, optim: str):
    """DDP and DeepSpeed's plain optimizer (stage 0 in fp32) have one tensor for each parameter."""
    support = DDPEngine.requested_support(None, precision)
    if stage is not None:
        support = fsdp2.SUPPORT if stage == "FSDP2" else deepspeed._support(stage, precision)
    arguments = config(optim=optim), support, precision
    if optim == "adamw_torch" or stage is None or (stage == 0 and precision == "no"):
        check_update(*arguments)
        return
    pattern = f"{optim} needs whole parameters, which {support.name} in (fp32|bf16) "
    with pytest.raises(ConfigError, match=pattern) as caught:
        check_update(*arguments)
    assert "\n" not in str(caught.value)


def test_an_error_of_an_optimizer_without_arguments_is_raised_as_it_is():
    config = TrainConfig(output_dir="out", optim="sgd")
    with pytest.raises(ValueError, match=r"^no good$"):
        raise _refused(ValueError("no good"), config)
    with pytest.raises(ConfigError, match=r"--optim_args: no good; .*sgd"):
        raise _refused(ValueError("no good\nat all"), replace(config, optim_args="momentum=0.9"))


def test_a_decay_above_one_is_refused():
    for decay in (0.0, -0.9, 1.1):
        with pytest.raises(ConfigError, match="must be above 0 and at most 1"):
            check_optimizer(config(layerwise_lr_decay=decay))


@pytest.mark.parametrize(
    ("optim", "key"), [("adamw_torch_fused", "eps"), ("stable_adamw", "eps"), ("muon", "adamw_eps")]
)
def test_the_epsilon_of_the_flag_is_that_of_the_optimizer(optim: str, key: str):
    if optim != "adamw_torch_fused":
        pytest.importorskip("pytorch_optimizer")
    optimizer, _ = build_optimizer(tiny("bert"), config(optim=optim, adam_epsilon=0.5), offload=False)
    groups = [group for group in optimizer.param_groups if not group.get("use_muon")]
    assert groups
    assert {group["eps"] for group in groups} == {0.5}


def test_the_first_step_of_adamw_is_the_gradient_over_its_size_and_epsilon():
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer, _ = build_optimizer(model, config(adam_epsilon=1.0, weight_decay=0.0, learning_rate=0.1), offload=False)
    before = model.weight.item()
    model.weight.grad = torch.full_like(model.weight, 2.0)
    optimizer.step()
    assert before - model.weight.item() == pytest.approx(0.1 * 2 / (2 + 1), rel=1e-5)


def test_muons_other_learning_rate_multiplies_that_of_each_layer():
    pytest.importorskip("pytorch_optimizer")
    values = {"optim": "muon", "learning_rate": 0.1, "layerwise_lr_decay": 0.5}
    plain, names = build_optimizer(tiny("bert"), config(**values), offload=False)
    slower, again = build_optimizer(tiny("bert"), config(optim_args="adamw_lr=0.02", **values), offload=False)
    assert names == again
    scales = [
        (one["use_muon"], one["lr_scale"], other["lr_scale"])
        for one, other in zip(plain.param_groups, slower.param_groups, strict=True)
    ]
    assert len({scale for _, scale, _ in scales}) > 3
    for use_muon, scale, other in scales:
        assert other == pytest.approx(scale * (1 if use_muon else 0.02 / 0.1))
