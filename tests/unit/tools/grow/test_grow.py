"""A model to begin with out of a trained one: what is copied, from where, and what stays the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForMaskedLM, BertModel

from cloze.cli import main
from cloze.cli.commands import grow as command
from cloze.config import GrowConfig, ModelConfig, TokenizerConfig
from cloze.data.tokenizer_training.extend import extend_tokenizer
from cloze.data.tokenizer_training.train import train_tokenizer
from cloze.data.tokenizers.load import load_tokenizer
from cloze.errors import ConfigError, ModelError
from cloze.model.load import build_model, read_config
from cloze.model.overrides import parse_overrides
from cloze.tools.demo.corpus import write_corpus
from cloze.tools.grow.axes import Heads, tiled, width_of
from cloze.tools.grow.exact import shares
from cloze.tools.grow.vocabulary import token_texts, vocabulary_rows
from cloze.tools.grow.warm_start import NOTE, warm_start

BERT = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
BART = "d_model=32,encoder_attention_heads=2,decoder_attention_heads=2,encoder_ffn_dim=64,decoder_ffn_dim=64,"
BART += "encoder_layers=2,decoder_layers=2"
ROTARY = BERT + ",num_key_value_heads=1,head_dim=16"
TINY = {"distilbert": "dim=32,n_layers=2,n_heads=2,hidden_dim=64", "eurobert": ROTARY, "bart": BART}
WIDER = "hidden_size=64,num_attention_heads=4,intermediate_size=96"
WIDER_OF = {
    "distilbert": "dim=64,n_heads=4,hidden_dim=96",
    "eurobert": WIDER + ",num_key_value_heads=2",
    "bart": "d_model=64,encoder_attention_heads=4,decoder_attention_heads=4,encoder_ffn_dim=96,decoder_ffn_dim=64",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers `bpe`, `wordpiece`, `unigram`, and `extended`, bpe with 20 tokens of another domain."""
    folder = tmp_path_factory.mktemp("grow")
    write_corpus(folder / "corpus.jsonl", num_threads=60)
    source = {"dataset_name": str(folder / "corpus.jsonl"), "text_field": "answers.text", "vocab_size": 400}
    for kind in ("bpe", "wordpiece", "unigram"):
        train_tokenizer(TokenizerConfig(**source, kind=kind, output=str(folder / kind)))
    (folder / "domain.txt").write_text("hepatocyte cytopathy neurohepatitis cytometry\n" * 20)
    extend_tokenizer(
        TokenizerConfig(
            dataset_name=str(folder / "domain.txt"),
            output=str(folder / "extended"),
            extend=str(folder / "bpe"),
            new_tokens=20,
        )
    )
    return folder


def model_of(places: Path, model_type: str, folder: Path, tokenizer: str = "bpe", **more: Any) -> Path:
    """A model folder with random weights, none of which is zero or one."""
    tok = load_tokenizer(str(places / tokenizer))
    sizes = parse_overrides(TINY.get(model_type, BERT)) | more
    overrides = ",".join(f"{name}={value}" for name, value in sizes.items())
    config = read_config(ModelConfig(model_type=model_type, config_overrides=overrides), tok, 32)
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def grow(source: Path, output: Path, **more: Any) -> Any:
    warm_start(GrowConfig(source=str(source), output=str(output), **more))
    return load(output)


def load(folder: Path) -> Any:
    return AutoModelForMaskedLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    return model(input_ids=ids, **more).logits


def texts_ids() -> torch.Tensor:
    return torch.randint(5, 390, (3, 21), generator=torch.Generator().manual_seed(7))


# Vocabulary


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert", "eurobert"])
def test_added_tokens_begin_as_the_mean_of_their_pieces_and_all_others_stay(places, tmp_path, model_type: str):
    old = load(model_of(places, model_type, tmp_path / "old"))
    new = grow(tmp_path / "old", tmp_path / "new", tokenizer=str(places / "extended"))
    before, after = load_tokenizer(str(places / "bpe")), load_tokenizer(str(places / "extended"))
    assert new.config.vocab_size == len(after) == len(before) + 20
    weights = [(old.get_input_embeddings().weight, new.get_input_embeddings().weight)]
    weights += [(old.get_output_embeddings().weight, new.get_output_embeddings().weight)]
    if old.get_output_embeddings().bias is not None:
        weights += [(old.get_output_embeddings().bias, new.get_output_embeddings().bias)]
    assert len(weights) == (2 if model_type == "eurobert" else 3)
    for one, other in weights:
        assert torch.equal(other[: len(before)], one)
        for token in range(len(before), len(after)):
            pieces = before(after.decode([token]), add_special_tokens=False)["input_ids"]
            assert len(pieces) > 1
            torch.testing.assert_close(other[token], one[pieces].mean(0))
    tied = old.get_input_embeddings().weight is old.get_output_embeddings().weight
    assert (new.get_input_embeddings().weight is new.get_output_embeddings().weight) == tied


def test_the_loss_of_old_texts_changes_by_no_more_than_the_probability_of_new_tokens(places, tmp_path):
    old = load(model_of(places, "roberta", tmp_path / "old"))
    new = grow(tmp_path / "old", tmp_path / "new", tokenizer=str(places / "extended"))
    ids = texts_ids()
    assert torch.equal(logits(new, ids)[..., :400], logits(old, ids))
    targets = ids.flip(1).reshape(-1)
    losses = [F.cross_entropy(logits(model, ids).flatten(0, 1), targets, reduction="none") for model in (old, new)]
    share = logits(new, ids).softmax(-1)[..., 400:].sum(-1).reshape(-1)
    torch.testing.assert_close(losses[1] - losses[0], -torch.log1p(-share), rtol=1e-3, atol=1e-5)
    assert share.mean() < 0.1


@pytest.mark.parametrize("target", ["wordpiece", "unigram"])
def test_tokens_are_the_same_whatever_the_kind_of_tokenizer_calls_them(places, tmp_path, target: str):
    """`Ġthe` is `▁the` is `the`; `[MASK]` is `<mask>`; padding has another id, and positions begin after it."""
    old = load(model_of(places, "roberta", tmp_path / "old"))
    new = grow(tmp_path / "old", tmp_path / "new", tokenizer=str(places / target))
    before, after = load_tokenizer(str(places / "bpe")), load_tokenizer(str(places / target))
    there, here = old.get_input_embeddings().weight, new.get_input_embeddings().weight
    for role in ("mask", "pad", "unk", "cls", "sep"):
        names = getattr(after, f"{role}_token_id"), getattr(before, f"{role}_token_id")
        assert torch.equal(here[names[0]], there[names[1]]), role
    assert new.config.pad_token_id == after.pad_token_id
    shared = 0
    for name in ("the", "is", "of", "a"):
        mark = {"wordpiece": name, "unigram": f"▁{name}"}[target]
        if mark in after.get_vocab() and f"Ġ{name}" in before.get_vocab():
            pair = after.convert_tokens_to_ids(mark), before.convert_tokens_to_ids(f"Ġ{name}")
            assert torch.equal(here[pair[0]], there[pair[1]])
            shared += 1
    assert shared >= 3
    # The same sentence of shared tokens, with padding, gets the same answers.
    words = [("the", "Ġthe"), ("is", "Ġis"), ("of", "Ġof")]
    mark = "▁" if target == "unigram" else ""
    ids = [after.convert_tokens_to_ids(mark + one) for one, _ in words] + [after.pad_token_id] * 2
    old_ids = [before.convert_tokens_to_ids(other) for _, other in words] + [before.pad_token_id] * 2
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    answers = logits(new, torch.tensor([ids]), attention_mask=mask)[0, :3, ids[:3]]
    expected = logits(old, torch.tensor([old_ids]), attention_mask=mask)[0, :3, old_ids[:3]]
    torch.testing.assert_close(answers, expected)


def test_tokens_stand_for_bytes(places):
    bpe, wordpiece, unigram = (load_tokenizer(str(places / kind)) for kind in ("bpe", "wordpiece", "unigram"))
    assert token_texts(bpe)[bpe.convert_tokens_to_ids("Ġthe")] == b" the"
    assert token_texts(wordpiece)[wordpiece.convert_tokens_to_ids("the")] == b" the"
    assert token_texts(wordpiece)[wordpiece.convert_tokens_to_ids("##a")] == b"a"
    assert token_texts(unigram)[unigram.convert_tokens_to_ids("▁the")] == b" the"
    assert token_texts(bpe)[bpe.convert_tokens_to_ids("Ã")] == b"\xc3"
    for tokenizer in (bpe, wordpiece, unigram):
        assert token_texts(tokenizer)[tokenizer.mask_token_id] is None


def test_what_has_no_pieces_gets_the_mean_of_all(places):
    bpe, new = load_tokenizer(str(places / "bpe")), load_tokenizer(str(places / "wordpiece"))
    new.add_tokens(["<entity>"], special_tokens=True)
    rows = vocabulary_rows(bpe, new, size=len(new) + 2)
    assert rows.of(len(new) - 1) == rows.of(len(new)) == []
    weight = torch.randn(400, 8)
    made = rows.apply(weight, 0)
    torch.testing.assert_close(made[-3:], weight.mean(0).expand(3, 8))
    assert made.shape == (len(new) + 2, 8)
    assert rows.kinds["without pieces"] >= 1


# Width


def test_tiling_is_that_of_modernbert():
    """The expected values are those of its own tests (AnswerDotAI/ModernBERT, tests/test_init_from_pretrained.py)."""
    assert torch.tensor([1, 2, 3])[tiled(3, 8)].tolist() == [2, 3, 1, 2, 3, 1, 2, 3]
    assert tiled(4, 4).tolist() == [0, 1, 2, 3]


def test_heads_stay_whole_and_keep_to_their_keys_and_values():
    width = width_of(Heads(32, 4, 2, 8), Heads(48, 6, 3, 8))
    assert width.heads.tolist() == [0, 1, 2, 3, 0, 1]  # pairs that share keys and values
    assert width.sizes[16, 24].tolist() == [*range(16), *range(8)]
    assert width.hidden.tolist() == [*range(32), *range(16)]
    wider = width_of(Heads(32, 4, 4, 8), Heads(64, 4, 4, 16)).places.tolist()
    assert [place % 4 for place in wider[:8]] == [place % 4 for place in wider[8:]]
    assert max(wider[:8]) < 4 <= min(wider[8:])  # places i and i + half are turned by one angle


def test_each_part_of_a_fused_matrix_is_tiled_by_itself(places, tmp_path):
    old = load(model_of(places, "modernbert", tmp_path / "old")).state_dict()
    more = "hidden_size=48,num_attention_heads=3,intermediate_size=80"
    new = grow(tmp_path / "old", tmp_path / "new", config_overrides=more).state_dict()
    name = "model.layers.1.attn.Wqkv.weight"
    hidden = torch.cat([torch.arange(32), torch.arange(16)])
    for one, other in zip(old[name].chunk(3), new[name].chunk(3), strict=True):
        assert torch.equal(other, one[hidden][:, hidden])
    name = "model.layers.1.mlp.Wi.weight"
    for one, other in zip(old[name].chunk(2), new[name].chunk(2), strict=True):
        assert torch.equal(other, one[tiled(64, 80)][:, hidden])
    assert torch.equal(
        new["model.layers.1.mlp.Wo.weight"], old["model.layers.1.mlp.Wo.weight"][hidden][:, tiled(64, 80)]
    )
    assert torch.equal(
        new["model.embeddings.tok_embeddings.weight"], old["model.embeddings.tok_embeddings.weight"][:, hidden]
    )
    assert torch.equal(new["decoder.bias"], old["decoder.bias"])


@pytest.mark.parametrize(
    "model_type", ["bert", "roberta", "distilbert", "modernbert", "esm", "deberta", "deberta-v2", "eurobert", "bart"]
)
def test_a_wider_model_can_answer_as_the_old_one(places, tmp_path, model_type: str, figure):
    old = load(model_of(places, model_type, tmp_path / "old"))
    wider = WIDER_OF.get(model_type, WIDER)
    new = grow(tmp_path / "old", tmp_path / "new", config_overrides=wider, method="function_preserving")
    one, other = logits(old, texts_ids()), logits(new, texts_ids())
    difference = float((one - other).abs().max() / one.abs().max())
    assert sum(p.numel() for p in new.parameters()) > 1.5 * sum(p.numel() for p in old.parameters())
    assert difference < 1e-4
    figure("cloze grow, twice as wide, function preserving: largest difference of logits, relative", difference)


def test_copies_of_a_place_learn_different_things(places, tmp_path):
    model_of(places, "bert", tmp_path / "old", hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    new = grow(tmp_path / "old", tmp_path / "new", config_overrides=WIDER, method="function_preserving")
    F.cross_entropy(new(input_ids=texts_ids()).logits.flatten(0, 1), texts_ids().reshape(-1)).backward()
    gradient = new.bert.encoder.layer[0].intermediate.dense.weight.grad
    copies = tiled(64, 96)
    twice = [place for place in range(64) if int((copies == place).sum()) == 2]
    assert len(twice) == 32
    for place in twice:
        first, second = (copies == place).nonzero().reshape(-1).tolist()
        assert not torch.allclose(gradient[first], gradient[second], rtol=1e-2)


def test_shares_of_copies_add_up_to_one_and_none_are_equal():
    copies = tiled(3, 8)
    of = shares(copies)
    for place in range(3):
        mine = of[copies == place]
        assert mine.sum() == pytest.approx(1)
        assert len(set(mine.tolist())) == len(mine)
    assert shares(torch.arange(5)).tolist() == [1.0] * 5


# Depth


@pytest.mark.parametrize(("layers", "expected"), [(4, [0, 0, 1, 1]), (5, [0, 0, 0, 1, 1]), (1, [0])])
def test_layers_are_copied_in_their_order(places, tmp_path, layers: int, expected: list[int]):
    old = load(model_of(places, "bert", tmp_path / "old")).bert.encoder.layer
    new = grow(tmp_path / "old", tmp_path / "new", config_overrides=f"num_hidden_layers={layers}").bert.encoder.layer
    assert len(new) == layers
    for layer, source in zip(new, expected, strict=True):
        for one, other in zip(layer.parameters(), old[source].parameters(), strict=True):
            assert torch.equal(one, other)


def test_distilbert_begins_with_every_second_layer(places, tmp_path):
    model_of(places, "bert", tmp_path / "old", num_hidden_layers=12)
    grow(tmp_path / "old", tmp_path / "new", config_overrides="num_hidden_layers=6")
    moved = json.loads((tmp_path / "new" / NOTE).read_text())["layers"]
    assert moved == {f"bert.encoder.layer.{place}": f"bert.encoder.layer.{2 * place}" for place in range(1, 6)}


def test_a_layer_comes_from_one_with_the_same_attention(places, tmp_path):
    """ModernBERT: every third layer looks at everything, the others at what is near; the first has no norm."""
    old = load(model_of(places, "modernbert", tmp_path / "old", num_hidden_layers=6))
    new = grow(tmp_path / "old", tmp_path / "new", config_overrides="num_hidden_layers=9")
    moved = json.loads((tmp_path / "new" / NOTE).read_text())["layers"]
    source = [int(moved.get(f"model.layers.{place}", f".{place}").split(".")[-1]) for place in range(9)]
    assert [old.config.layer_types[place] for place in source] == new.config.layer_types
    assert source[0] == 0 not in source[1:]
    assert len(set(source)) == 6


@pytest.mark.parametrize("model_type", ["modernbert", "esm", "eurobert"])
def test_a_deeper_model_can_answer_as_the_old_one_where_norms_come_first(places, tmp_path, model_type: str, figure):
    old = load(model_of(places, model_type, tmp_path / "old"))
    both = "num_hidden_layers=5," + WIDER_OF.get(model_type, WIDER)
    new = grow(tmp_path / "old", tmp_path / "new", config_overrides=both, method="function_preserving")
    one, other = logits(old, texts_ids()), logits(new, texts_ids())
    difference = float((one - other).abs().max() / one.abs().max())
    assert difference < 1e-4
    figure("cloze grow, wider and deeper, function preserving: largest difference of logits, relative", difference)


# Everything else


def test_a_grown_model_says_what_it_was_made_of_and_is_one_for_training(places, tmp_path, capsys):
    model_of(places, "roberta", tmp_path / "old")
    config = GrowConfig(
        source=str(tmp_path / "old"),
        output=str(tmp_path / "new"),
        tokenizer=str(places / "extended"),
        config_overrides="num_hidden_layers=3",
        max_shard_size="50KB",
    )
    command.run(config)
    said = capsys.readouterr().out
    assert "vocab_size: 400 -> 420" in said
    assert "tokens: 400 kept, 20 made of pieces" in said
    text = (tmp_path / "new" / NOTE).read_text()
    note = json.loads(text)
    assert (note["source"], note["tokenizer"], note["changed"]["num_hidden_layers"]) == ("old", "extended", [2, 3])
    assert str(tmp_path) not in text
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    model, tokenizer = build_model(ModelConfig(model_name_or_path=config.output), tmp_path / "new", 32, 0)
    assert len(tokenizer) == model.config.vocab_size == 420


def test_weights_stay_in_their_type(places, tmp_path):
    model_of(places, "bert", tmp_path / "fp32")
    AutoModelForMaskedLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16).save_pretrained(tmp_path / "old")
    load_tokenizer(str(places / "bpe")).save_pretrained(tmp_path / "old")
    grow(
        tmp_path / "old", tmp_path / "new", tokenizer=str(places / "extended"), config_overrides="num_hidden_layers=3"
    )
    new = AutoModelForMaskedLM.from_pretrained(tmp_path / "new", dtype="auto")
    assert new.dtype == torch.bfloat16
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_tokenizer_that_is_too_large_is_told_what_to_do(places, tmp_path):
    model_of(places, "roberta", tmp_path / "old")
    with pytest.raises(ModelError, match=r"420 tokens, but the model has embeddings for 400; .* `cloze grow"):
        build_model(ModelConfig(model_name_or_path=str(tmp_path / "old")), places / "extended", 32, 0)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], "cloze grow: what is to be changed"),
        (["--config_overrides", "hidden_size=16"], "would go from 32 to 16; a model can .* not narrower"),
        (["--config_overrides", "max_position_embeddings=4000"], "keeps its positions"),
        (["--config_overrides", "vocab_size=500"], "vocab_size: follows the tokenizer"),
        (["--config_overrides", "is_decoder=true"], "is_decoder=True is not for masked language modelling"),
        (["--config_overrides", "pad_token_id=7"], "pad_token_id=7, but the tokenizer's is"),
        (["--config_overrides", "hidden_size=51"], "no masked language model can be made from the configuration"),
        (["--config_name", "DISTILBERT"], "--config_name: distilbert cannot be made from bert"),
        (["--tokenizer", "nowhere/at/all"], "cannot load the tokenizer"),
        (["--method", "function_preserving", "--config_overrides", "num_hidden_layers=4"], "would not stay the same"),
        (
            ["--method", "function_preserving", "--config_overrides", "hidden_size=48,num_attention_heads=3"],
            "multiple",
        ),
        (["--method", "function_preserving", "--config_overrides", "hidden_size=64"], "give num_attention_heads=4"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_what_cannot_be_made_is_one_line_and_nothing_is_written(places, tmp_path, capsys, flags: list[str], line: str):
    model_of(places, "bert", tmp_path / "old")
    config = AutoConfig.for_model("distilbert")
    config.save_pretrained(tmp_path / "distilbert")
    flags = [str(tmp_path / "distilbert") if flag == "DISTILBERT" else flag for flag in flags]
    with pytest.raises(SystemExit) as left:
        main(["grow", str(tmp_path / "old"), "--output", str(tmp_path / "new"), *flags])
    said = capsys.readouterr().err
    assert left.value.code == 2, said
    assert len(said.splitlines()) == 1
    assert re.search(line, said), said
    assert {path.name for path in tmp_path.iterdir()} == {"old", "distilbert"}


def test_a_source_without_a_head_is_refused(places, tmp_path):
    model_of(places, "bert", tmp_path / "whole")
    BertModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "old")
    load_tokenizer(str(places / "bpe")).save_pretrained(tmp_path / "old")
    with pytest.raises(ModelError, match=r"it has no cls\.predictions\..*saved without its head"):
        grow(tmp_path / "old", tmp_path / "new", config_overrides="num_hidden_layers=3")
    with pytest.raises(ConfigError, match="exists already"):
        grow(tmp_path / "whole", tmp_path / "old", config_overrides="num_hidden_layers=3")
