"""Every architecture of transformers that has a masked language model, and overrides that make it tiny."""

from __future__ import annotations

from transformers import MODEL_FOR_MASKED_LM_MAPPING

ARCHITECTURES = sorted(config.model_type for config in MODEL_FOR_MASKED_LM_MAPPING)
BERT = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
_ROTARY = BERT + ",num_key_value_heads=2,head_dim=16"
_BART = "d_model=32,encoder_layers=2,decoder_layers=2,encoder_ffn_dim=64,decoder_ffn_dim=64,"
_BART += "encoder_attention_heads=2,decoder_attention_heads=2"
_XLM = "emb_dim=32,n_layers=2,n_heads=2"
_TEXT = ",".join(f"text_config.{part}" for part in BERT.split(","))
_VISION = "vision_config.hidden_size=32,vision_config.num_hidden_layers=1,vision_config.intermediate_size=64,"
_VISION += "vision_config.num_attention_heads=2"
TINY = {
    "albert": BERT + ",embedding_size=16",
    "bart": _BART,
    "big_bird": BERT,
    "convbert": BERT + ",embedding_size=32",
    "distilbert": "dim=32,n_layers=2,n_heads=2,hidden_dim=64",
    "electra": BERT + ",embedding_size=32",
    "esmc": _ROTARY,
    "eurobert": _ROTARY,
    "flaubert": _XLM,
    "fnet": "hidden_size=32,num_hidden_layers=2,intermediate_size=64",
    "funnel": "d_model=32,n_head=2,d_head=16,d_inner=64,block_sizes=[1,1],block_repeats=[1,1],num_decoder_layers=1",
    "longformer": BERT + ",attention_window=16",
    "luke": BERT + ",entity_vocab_size=10,entity_emb_size=16",
    "mbart": _BART,
    "mobilebert": BERT + ",embedding_size=16,true_hidden_size=16,intra_bottleneck_size=16",
    "modernvbert": f"{_TEXT},{_VISION}",
    "mvp": _BART + ",prompt_mid_dim=16",
    "neomme": _ROTARY + ",embedding_rank=16,embedding_dim=16,per_layer_config={}",
    "perceiver": "d_model=32,d_latents=32,num_latents=8,num_self_attends_per_block=1,num_self_attention_heads=2,"
    "num_cross_attention_heads=2",
    "reformer": "hidden_size=32,num_hidden_layers=2,attn_layers=[local,lsh],axial_pos_embds_dim=[16,16],"
    "num_attention_heads=2,attention_head_size=16,feed_forward_size=64,local_attn_chunk_length=16,lsh_attn_chunk_length=16,num_buckets=2,"
    "hidden_dropout_prob=0.0,local_attention_probs_dropout_prob=0.0",
    "rembert": BERT + ",input_embedding_size=16,output_embedding_size=32",
    "roc_bert": BERT
    + ",pronunciation_vocab_size=10,shape_vocab_size=10,pronunciation_embed_dim=16,shape_embed_dim=16",
    "roformer": BERT + ",embedding_size=32",
    "squeezebert": BERT + ",embedding_size=32,q_groups=1,k_groups=1,v_groups=1,intermediate_groups=1,output_groups=1",
    "ultrabert": _ROTARY + ",prediction_head_size=32",
    "ultravbert": ",".join(f"text_config.{part}" for part in (_ROTARY + ",prediction_head_size=32").split(","))
    + f",{_VISION}",
    "xlm": _XLM,
}
# In every run of the tests: the families that differ most; all others with `pytest -m slow`.
ALWAYS = {"bart", "deberta-v2", "modernvbert", "perceiver", "reformer", "xlm"}
