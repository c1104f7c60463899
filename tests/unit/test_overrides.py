"""`--config_overrides`: numbers, lists, nested settings; what follows from them; one line for what cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, PreTrainedTokenizerFast

from cloze.config import TrainConfig
from cloze.errors import ConfigError
from cloze.model.load import read_config
from cloze.model.overrides import apply_overrides, parse_overrides


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
    with pytest.raises(ConfigError, match="pretrained weights have their own shapes"):
        pretrained(tmp_path, text)
