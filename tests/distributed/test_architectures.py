"""Every masked language model of transformers goes the whole way: train, checkpoint, consolidate, evaluate, fill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from ranks import cloze_ranks, succeed
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from cloze.errors import ConfigError
from cloze.evaluation.fill_mask import fill

ARCHITECTURES = sorted(config.model_type for config in MODEL_FOR_MASKED_LM_MAPPING)
_BERT = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
_ROTARY = _BERT + ",num_key_value_heads=2,head_dim=16"
_BART = "d_model=32,encoder_layers=2,decoder_layers=2,encoder_ffn_dim=64,decoder_ffn_dim=64,"
_BART += "encoder_attention_heads=2,decoder_attention_heads=2"
_XLM = "emb_dim=32,n_layers=2,n_heads=2"
_TEXT = ",".join(f"text_config.{part}" for part in _BERT.split(","))
_VISION = "vision_config.hidden_size=32,vision_config.num_hidden_layers=1,vision_config.intermediate_size=64,"
_VISION += "vision_config.num_attention_heads=2"
TINY = {
    "albert": _BERT + ",embedding_size=16",
    "bart": _BART,
    "big_bird": _BERT,
    "convbert": _BERT + ",embedding_size=32",
    "distilbert": "dim=32,n_layers=2,n_heads=2,hidden_dim=64",
    "electra": _BERT + ",embedding_size=32",
    "esmc": _ROTARY,
    "eurobert": _ROTARY,
    "flaubert": _XLM,
    "fnet": "hidden_size=32,num_hidden_layers=2,intermediate_size=64",
    "funnel": "d_model=32,n_head=2,d_head=16,d_inner=64,block_sizes=[1,1],block_repeats=[1,1],num_decoder_layers=1",
    "longformer": _BERT + ",attention_window=16",
    "luke": _BERT + ",entity_vocab_size=10,entity_emb_size=16",
    "mbart": _BART,
    "mobilebert": _BERT + ",embedding_size=16,true_hidden_size=16,intra_bottleneck_size=16",
    "modernvbert": f"{_TEXT},{_VISION}",
    "mvp": _BART + ",prompt_mid_dim=16",
    "neomme": _ROTARY + ",embedding_rank=16,embedding_dim=16,per_layer_config={}",
    "perceiver": "d_model=32,d_latents=32,num_latents=8,num_self_attends_per_block=1,num_self_attention_heads=2,"
    "num_cross_attention_heads=2",
    "reformer": "hidden_size=32,num_hidden_layers=2,attn_layers=[local,lsh],axial_pos_embds_dim=[16,16],"
    "num_attention_heads=2,attention_head_size=16,feed_forward_size=64,local_attn_chunk_length=16,lsh_attn_chunk_length=16,num_buckets=2,"
    "hidden_dropout_prob=0.0,local_attention_probs_dropout_prob=0.0",
    "rembert": _BERT + ",input_embedding_size=16,output_embedding_size=32",
    "roc_bert": _BERT
    + ",pronunciation_vocab_size=10,shape_vocab_size=10,pronunciation_embed_dim=16,shape_embed_dim=16",
    "roformer": _BERT + ",embedding_size=32",
    "squeezebert": _BERT + ",embedding_size=32,q_groups=1,k_groups=1,v_groups=1,intermediate_groups=1,output_groups=1",
    "ultrabert": _ROTARY + ",prediction_head_size=32",
    "ultravbert": ",".join(f"text_config.{part}" for part in (_ROTARY + ",prediction_head_size=32").split(","))
    + f",{_VISION}",
    "xlm": _XLM,
}
FLAGS = ["--max_steps", "3", "--logging_steps", "1", "--save_steps", "3", "--learning_rate", "1e-3"]
FLAGS += ["--eval_strategy", "steps", "--eval_steps", "3", "--per_device_train_batch_size", "4"]
# In every run of the tests: the families that differ most; all others with `pytest -m slow`.
ALWAYS = {"bart", "deberta-v2", "modernvbert", "perceiver", "reformer", "xlm"}


def go_all_the_way(model_type: str, prepared: Path, folder: Path, engine: str, world_size: int) -> list[str]:
    """Its output; every part is asserted to have worked."""
    run = folder / "run"
    argv = ["train", "--model_type", model_type, "--config_overrides", TINY.get(model_type, _BERT), *FLAGS]
    argv += ["--dataset_name", str(prepared), "--output_dir", str(run)]
    trained = cloze_ranks(argv, world_size, engine, folder / "a")
    succeed(trained)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3
    assert all(4 < loss < 40 for loss in losses)  # ln(600) = 6.4; some begin with large weights
    succeed(cloze_ranks(["consolidate", str(run)], 1, "single", folder / "b"))
    succeed(cloze_ranks(["evaluate", str(run), "--data", str(prepared)], 1, "single", folder / "c"))
    during = next(line["eval_perplexity"] for line in lines if "eval_perplexity" in line)
    after = json.loads((run / "eval.json").read_text())["perplexity"]
    assert math.isclose(during, after, rel_tol=1e-5)
    ((_, probability),) = fill(str(run), "The Milky Way is a <mask> galaxy.", top_k=1)[0]
    assert 0 < probability < 1
    return trained[0].output.splitlines()


@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=() if t in ALWAYS else pytest.mark.slow) for t in ARCHITECTURES]
)
def test_an_architecture_goes_all_the_way(prepared: Path, tmp_path: Path, model_type: str):
    output = go_all_the_way(model_type, prepared, tmp_path, "ddp", 2)
    assert not [line for line in output if "all positions go through the head" in line]


def test_what_transformers_no_longer_has_names_a_substitute(prepared: Path, tmp_path: Path):
    from cloze.config import TrainConfig
    from cloze.model.archs import GONE
    from cloze.model.load import build_model

    for name in GONE:
        config = TrainConfig(output_dir=str(tmp_path), model_type=name)
        with pytest.raises(ConfigError, match=f"no masked language model of type {name}; {GONE[name]}"):
            build_model(config, prepared / "tokenizer", 32, 0)
