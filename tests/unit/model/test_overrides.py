"""`--config_overrides`: numbers, lists, nested settings; what follows from them; one line for what cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from cloze.config import TrainConfig
from cloze.errors import ConfigError, ModelError
from cloze.model.load import read_config
from cloze.model.overrides import apply_overrides, first_forward, overrides_named, parse_overrides
from cloze.model.trained import freeze_unused
from cloze.model.weights import load_weights
from cloze.utils.foreign.pretrained import from_pretrained


def changed(model_type: str, text: str):
    config = AutoConfig.for_model(model_type)
    apply_overrides(config, parse_overrides(text))
    return config


def test_values_take_the_type_they_have():
    config = changed("bert", "hidden_size=64,hidden_dropout_prob=0,tie_word_embeddings=false,hidden_act=relu")
    assert (config.hidden_size, config.hidden_dropout_prob) == (64, 0.0)
    assert isinstance(config.hidden_dropout_prob, float)
    assert config.tie_word_embeddings is False
    assert config.hidden_act == "relu"


def test_lists_and_nested_settings():
    config = changed("funnel", "block_sizes=[1,2],block_repeats=[1,1],d_model=32")
    assert (list(config.block_sizes), list(config.block_repeats), config.d_model) == ([1, 2], [1, 1], 32)
    config = changed("modernvbert", "text_config.hidden_size=32,text_config.num_hidden_layers=2")
    assert (config.text_config.hidden_size, config.vision_config.hidden_size) == (32, 768)


def test_the_types_of_layers_follow_their_number(tmp_path):
    """Else the configuration could be saved, but not loaded again."""
    config = changed("modernbert", "num_hidden_layers=4")
    assert config.layer_types == AutoConfig.for_model("modernbert", num_hidden_layers=4).layer_types
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).layer_types == config.layer_types
    config = changed("modernvbert", "text_config.num_hidden_layers=2")
    assert len(config.text_config.layer_types) == 2


@pytest.mark.parametrize(
    "text",
    [
        "hidden_size",
        "=3",
        "hiden_size=3",
        "position_buckets=8",
        "hidden_size=wide",
        "text_config.hidden_size=3",
        "hidden_size=[1,2",
    ],
)
def test_what_cannot_be_read_is_one_line(text: str):
    with pytest.raises(ConfigError, match="--config_overrides: "):
        changed("bert", text)


def test_what_the_model_asks_for_though_its_configuration_does_not_have_it():
    config = changed(
        "deberta-v2", "position_buckets=256,norm_rel_ebd=layer_norm,share_att_key=true,pos_att_type=[p2c]"
    )
    assert (config.position_buckets, config.norm_rel_ebd, config.share_att_key) == (256, "layer_norm", True)
    assert config.pos_att_type == ["p2c"]
    with pytest.raises(ConfigError, match="position_bukets"):
        changed("deberta-v2", "position_bukets=256")


def test_settings_in_a_table():
    config = changed("modernbert", "rope_parameters.full_attention.rope_theta=10000")
    assert config.rope_parameters["full_attention"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10000.0
    for text in ("rope_parameters.full_attention.rope_teta=1", "rope_parameters.full.rope_theta=1"):
        with pytest.raises(ConfigError, match="--config_overrides: "):
            changed("modernbert", text)


def pretrained(folder: Path, text: str):
    """The configuration that `cloze train --model_name_or_path` uses, of a small stored model."""
    small = (
        "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,vocab_size=300,pad_token_id=0"
    )
    changed("modernbert", small).save_pretrained(folder)
    config = TrainConfig(output_dir="run", model_name_or_path=str(folder), config_overrides=text)
    return read_config(config, PreTrainedTokenizerFast, 16)  # which is not looked at here


def test_pretrained_weights_take_what_needs_no_other_weights(tmp_path: Path):
    config = pretrained(tmp_path, "attention_dropout=0.2,rope_parameters.full_attention.rope_theta=50000")
    assert (config.attention_dropout, config.num_hidden_layers) == (0.2, 2)
    assert config.rope_parameters["full_attention"]["rope_theta"] == 50000.0


@pytest.mark.parametrize(
    "text", ["attention_dropout=nan", "norm_eps=inf", "rope_parameters.full_attention.rope_theta=.inf"]
)
def test_numbers_that_are_not_finite_are_refused(text: str):
    with pytest.raises(ConfigError, match="must be a finite number"):
        changed("modernbert", text)


def test_a_type_that_is_not_that_of_the_weights_is_refused(tmp_path: Path):
    pretrained(tmp_path, "attention_dropout=0.2")
    config = TrainConfig(output_dir="run", model_name_or_path=str(tmp_path), model_type="bert")
    with pytest.raises(ConfigError, match=r"--model_type bert: \S+ is of type modernbert; leave --model_type out"):
        read_config(config, PreTrainedTokenizerFast, 16)


@pytest.mark.parametrize("text", ["num_hidden_layers=1", "num_hidden_layers=3", "hidden_size=64", "vocab_size=301"])
def test_pretrained_weights_are_never_dropped_or_made_up(tmp_path: Path, text: str):
    with pytest.raises(ConfigError, match="own shapes"):
        pretrained(tmp_path, text)


TINY = "hidden_size=8,num_hidden_layers=1,num_attention_heads=2,intermediate_size=8"


def from_scratch(model_type: str, text: str):
    """The configuration that `cloze train --model_type` uses, of a vocabulary of 40."""
    ids = {f"{role}_token": token for token, role in enumerate(("cls", "pad", "sep", "unk", "mask"))}
    names = {f"<{n}>": n for n in range(40)}
    backend = Tokenizer(WordLevel(names, unk_token="<3>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{role: f"<{n}>" for role, n in ids.items()})
    return read_config(TrainConfig(output_dir="run", model_type=model_type, config_overrides=text), tokenizer, 16)


@pytest.mark.parametrize(
    ("model_type", "text", "message"),
    [
        ("roberta", "pad_token_id=29", "pad_token_id=29, but the tokenizer's is 1; leave it out"),
        ("roberta", "eos_token_id=2", "eos_token_id=2, but the tokenizer's is None"),
        ("xlm", "pad_index=29", "pad_index=29, but the tokenizer's is 1"),
        ("xlm", "mask_index=29", "mask_index=29, but the tokenizer's is 4"),
        ("bart", "decoder_start_token_id=29", "is no special token of the tokenizer"),
        ("modernbert", "cls_token_id=29", "cls_token_id=29, but the tokenizer's is 0"),
        ("roberta", "is_decoder=true", "is_decoder=True"),
        ("roberta", "add_cross_attention=true", "add_cross_attention=True is not for masked"),
        ("xlm", "causal=true", "causal=True is not for masked"),
        ("roberta", "is_encoder_decoder=true", "is_encoder_decoder is how results are returned"),
        ("roberta", "chunk_size_feed_forward=7", "chunk_size_feed_forward is how results"),
        ("roberta", "output_hidden_states=true", "output_hidden_states is how results"),
        ("roberta", "output_attentions=true", "output_attentions is how results"),
        ("roberta", "return_dict=false", "return_dict is how results"),
        ("roberta", "dtype=float16", "dtype is how results"),
        ("roberta", "torch_dtype=float16", "torch_dtype is how results"),
        ("modernvbert", "text_config.dtype=float16", "text_config.dtype is how results"),
        ("roberta", "torchscript=true", "torchscript"),
        ("roberta", "_attn_implementation=eager", "_attn_implementation is how results"),
        ("roberta", "to_dict=3", "to_dict is how results"),
        ("roberta", "hidden_size=8,hidden_size=16", "hidden_size is given twice"),
        ("bart", "hidden_size=8,d_model=16", "d_model is given twice"),
        ("roberta", "type_vocab_size=0", "must be at least 1"),
        ("roberta", "num_hidden_layers=0", "must be at least 1"),
        ("roberta", "hidden_size=-8", "must be at least 1"),
        ("funnel", "block_sizes=[2,-1]", "must be at least 0"),
        ("roberta", "initializer_range=-1", "must be above 0"),
        ("roberta", "initializer_range=0", "must be above 0"),
        ("roberta", "layer_norm_eps=0", "must be at least 1e-30"),
        ("modernbert", "norm_eps=-1", "must be at least 1e-30"),
        ("modernbert", "rope_parameters.full_attention.rope_theta=0", "must be above 0"),
        ("roberta", "hidden_dropout_prob=1.5", "must be at least 0 and below 1"),
        ("bart", "encoder_layerdrop=-0.1", "must be at least 0 and below 1"),
    ],
)
def test_what_no_masked_language_model_can_be_trained_with_is_one_line(model_type: str, text: str, message: str):
    with pytest.raises(ConfigError, match=f"--config_overrides: .*{message}"):
        from_scratch(model_type, text)


@pytest.mark.parametrize(
    ("model_type", "text"),
    [
        ("roberta", "pad_token_id=1,vocab_size=16000,tie_word_embeddings=false"),
        ("xlm", "pad_index=1,mask_index=4"),
        ("bart", "decoder_start_token_id=2"),
        ("deberta-v2", "position_buckets=8,relative_attention=true,max_relative_positions=-1,type_vocab_size=0"),
    ],
)
def test_values_that_agree_with_the_tokenizer_are_taken(model_type: str, text: str):
    from_scratch(model_type, text)


def test_a_pretrained_model_that_reads_one_way_is_refused(tmp_path: Path):
    small = dict(pair.split("=") for pair in TINY.split(","))
    sizes = {name: int(value) for name, value in small.items()}
    BertForMaskedLM(BertConfig(vocab_size=40, is_decoder=True, **sizes)).save_pretrained(tmp_path)
    config = TrainConfig(output_dir="run", model_name_or_path=str(tmp_path))
    for load in (lambda: read_config(config, PreTrainedTokenizerFast, 16), lambda: load_weights(tmp_path)):
        with pytest.raises(ModelError, match="is_decoder=True"):
            load()


def test_errors_of_a_model_that_cannot_be_made_or_run_name_the_overrides():
    config = TrainConfig(output_dir="run", model_type="bert", config_overrides="hidden_act=foo")
    error = ModelError("cannot load the model (it has no 'foo')", where="bert")
    line = r"^--config_overrides: no model can be made with them"
    with pytest.raises(ModelError, match=line), overrides_named(config.config_overrides):
        raise error
    model = BertForMaskedLM(changed("bert", f"{TINY},vocab_size=40"))
    model.config.return_dict = False
    line = r"^--config_overrides: the model cannot read a text \(AttributeError: 'tuple'"
    with pytest.raises(ModelError, match=line), first_forward(config):
        freeze_unused(model, np.ones((1, 8), np.int32))


def test_a_model_whose_first_logits_are_not_finite_is_refused():
    model = BertForMaskedLM(changed("bert", f"{TINY},vocab_size=40,initializer_range=1e30"))
    with pytest.raises(ModelError, match="its logits are not finite"):
        freeze_unused(model, np.ones((1, 8), np.int32))


def test_a_reformer_configuration_can_be_read_again(tmp_path: Path):
    """Its chunk_size_lm_head, which is no number of heads, is 0."""
    AutoConfig.for_model("reformer").save_pretrained(tmp_path)
    assert from_pretrained(AutoConfig, tmp_path).chunk_size_lm_head == 0
