"""Windows and protocols: every rule on a text of known tokens."""

import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tests.conftest import ROOT, VOCABULARY, pico
from winnow.data.examples import encode_rows, padding_of
from winnow.data.tokens import PAD, PROTOCOLS, calibration_windows, check_length, encode, evaluation_windows, load_tokenizer
from winnow.errors import InputError

DEMO = ROOT / "resources" / "models" / "demo"
IDS = np.arange(100, 153, dtype=np.int32)  # 53 tokens


def scored(ids, first):
    return [int(t) for row, start in zip(ids, first, strict=True) for t in row[start:] if t != PAD]


@pytest.mark.parametrize("protocol", ["p1", "plain"])
def test_p1_drops_the_rest_and_scores_all_but_the_first(protocol):
    ids, first = evaluation_windows(IDS, protocol, 10, None, None, bos=7)
    assert ids.shape == (5, 10)
    assert (ids.ravel() == IDS[:50]).all()
    assert len(scored(ids, first)) == 5 * 9


def test_p1_bos_scores_every_token_of_text():
    ids, first = evaluation_windows(IDS, "p1_bos", 10, None, None, bos=7)
    assert ids.shape == (5, 10)
    assert (ids[:, 0] == 7).all()
    assert scored(ids, first) == IDS[:45].tolist()
    with pytest.raises(InputError, match="tokenizer has none"):
        evaluation_windows(IDS, "p1_bos", 10, None, None, bos=None)


def test_p2_scores_every_token_once():
    ids, first = evaluation_windows(IDS, "p2", 10, 4, None, bos=None)
    assert scored(ids, first) == IDS[1:].tolist()
    assert (ids[0] != PAD).all()
    assert ids.shape[1] == 10
    assert first[1:-1].tolist() == [6] * (len(first) - 2)


def test_only_the_first_windows():
    assert len(evaluation_windows(IDS, "p1", 10, None, 3, bos=None)[0]) == 3


def test_calibration_windows_are_drawn_by_seed():
    a, b, c = (calibration_windows(IDS, 3, 10, seed) for seed in (0, 0, 1))
    assert (a == b).all()
    assert (a != c).any()
    assert len({tuple(row) for row in a}) == 3
    assert all((row[0] - 100) % 10 == 0 for row in a)


def test_short_texts_are_refused():
    with pytest.raises(InputError, match=r"53 tokens: 5 windows of 10, but 6"):
        calibration_windows(IDS, 6, 10, 0)
    with pytest.raises(InputError, match=r"5 windows of 10, but 6"):
        evaluation_windows(IDS, "p1", 10, None, 6, bos=None)
    with pytest.raises(InputError, match="model's 8 positions"):
        check_length(10, 8)


def test_protocols_are_versioned():
    assert all(p.version >= 1 and p.rule for p in PROTOCOLS.values())


@pytest.mark.parametrize("family", ["bert_classifier", "gpt2", "roberta_masked", "gemma2", "gpt_neox"])
def test_a_model_without_tokenizer_files_has_no_vocabulary(family, tmp_path):
    """transformers makes a tokenizer of special tokens for it, which knows no word."""
    pico(family).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"the tokenizer has no vocabulary, only \d special tokens; put the tokenizer files"):
        load_tokenizer(tmp_path)


def with_tokenizer(folder, tokenizer, vocabulary=VOCABULARY):
    """A directory with a tokenizer and the config of a model that embeds so many tokens."""
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=vocabulary).save_pretrained(folder)
    return folder


def test_a_token_without_an_embedding_is_named(tmp_path):
    tokenizer = load_tokenizer(DEMO)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(InputError, match=rf"the tokenizer has the id {VOCABULARY} for '<new>', but the model has embeddings of"):
        load_tokenizer(with_tokenizer(tmp_path / "added", tokenizer))
    assert len(load_tokenizer(with_tokenizer(tmp_path / "padded", tokenizer, 1088))) == VOCABULARY + 1


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"version": "1.0", "model": {"type": "X"}}'])
def test_a_damaged_tokenizer_is_one_line(tmp_path, content):
    folder = with_tokenizer(tmp_path, load_tokenizer(DEMO))
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"no usable tokenizer \(.+\); put the tokenizer files \(tokenizer\.json; or") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def words(folder, unknown="[UNK]", **special):
    """A tokenizer of three words, and as BERT one of special tokens around a row."""
    names = ["[CLS]", "[SEP]", "[PAD]", *([unknown] if unknown else [])]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["the", "cat", "sat", *names])}, unk_token=unknown or "?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    around = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B [SEP]", "special_tokens": [("[CLS]", 3), ("[SEP]", 4)]}
    made.post_processor = processors.TemplateProcessing(**around)
    options = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": unknown, **special}
    return load_tokenizer(with_tokenizer(folder, PreTrainedTokenizerFast(tokenizer_object=made, **options)))


def table(*texts, **pair):
    return pd.DataFrame({"text": texts, "label": [i % 2 for i in range(len(texts))], **pair})


def test_a_text_that_is_mostly_unknown_is_refused(tmp_path):
    tokenizer = words(tmp_path)
    assert len(encode(tokenizer, "the cat xx yy", True)) == 6, "half is not most"
    message = r"{} of {} tokens of the text are unknown to the tokenizer \(\[UNK\]\); it is for another language"
    with pytest.raises(InputError, match=message.format(3, 5)):
        encode(tokenizer, "the xx yy cat zz", True)
    with pytest.raises(InputError, match=message.format(3, 4)):
        encode_rows(tokenizer, table("xx", "cat", "yy", "zz"), 8)
    with pytest.raises(InputError, match=message.format(4, 6)):
        encode_rows(tokenizer, table("the", "xx", "yy", pair=["cat", "yy", "zz"]), 8)
    encode_rows(tokenizer, table("xx", "cat", pair=["the", "yy"]), 8)


def test_special_tokens_that_are_called_unknown_do_not_count(tmp_path):
    """GPT-2 and OPT call the end of a text unknown, too; short rows hold more of them than words."""
    tokenizer = words(tmp_path, "[UNK]", cls_token="[UNK]", sep_token="[UNK]")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="[UNK] $A [UNK]", pair="[UNK] $A [UNK] $B [UNK]", special_tokens=[("[UNK]", 6)]
    )
    assert encode_rows(tokenizer, table("the", "cat"), 8).ids == [[6, 0, 6], [6, 1, 6]]
    with pytest.raises(InputError, match="2 of 3 tokens of the text are unknown"):
        encode_rows(tokenizer, table("the", "xx", "yy"), 8)
    assert load_tokenizer(DEMO).unk_token is None, "as of a tokenizer of bytes"
    assert encode(load_tokenizer(DEMO), "Ωμέγα " * 9, False).size


def test_a_text_without_a_token_is_no_short_one(tmp_path):
    made = Tokenizer(models.BPE({"a": 0, "[CLS]": 1}, []))
    tokenizer = load_tokenizer(with_tokenizer(tmp_path, PreTrainedTokenizerFast(tokenizer_object=made, cls_token="[CLS]")))
    with pytest.raises(InputError, match="the tokenizer outputs no token for the text that begins 'Ωμέγα'"):
        encode(tokenizer, "Ωμέγα", True)
    assert encode(tokenizer, " ", True).size == 0


def test_windows_that_are_all_alike_are_refused(tmp_path):
    alike = np.tile(np.arange(10, dtype=np.int32), 5)
    with pytest.raises(InputError, match="all 3 calibration windows have the same tokens; check the text and the tokenizer"):
        calibration_windows(alike, 3, 10, 0)
    for protocol, stride in (("p1", None), ("p1_bos", None), ("p2", 10)):
        of = np.tile(np.arange(10 - (protocol == "p1_bos"), dtype=np.int32), 5)
        with pytest.raises(InputError, match="all 5 evaluation windows have the same tokens"):
            evaluation_windows(of, protocol, 10, stride, None, bos=7)
    with pytest.raises(InputError, match="all 3 rows have the same tokens"):
        encode_rows(words(tmp_path), table("the cat", " the cat ", "the  cat"), 8)
    assert len(calibration_windows(alike, 1, 10, 0)) == 1, "one window is like itself"
    alike[-1] = 77
    assert len(calibration_windows(alike, 5, 10, 0)) == 5


def test_padding_is_a_token_that_the_model_has():
    for token in (-1, 1024):
        with pytest.raises(InputError, match=f"pad_token_id in config.json is {token}, which is not a token id"):
            padding_of(LlamaConfig(vocab_size=1024, pad_token_id=token))
    assert padding_of(LlamaConfig(vocab_size=1024, pad_token_id=1023)) == 1023
