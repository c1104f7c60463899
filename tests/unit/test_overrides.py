"""`--config_overrides`: numbers, lists, nested settings; what follows from them; one line for what cannot be read."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from cloze.errors import ConfigError
from cloze.model.load import apply_overrides, parse_overrides


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
    "text", ["hidden_size", "=3", "hiden_size=3", "hidden_size=wide", "text_config.hidden_size=3", "hidden_size=[1,2"]
)
def test_what_cannot_be_read_is_one_line(text: str):
    with pytest.raises(ConfigError, match="--config_overrides: "):
        changed("bert", text)
