from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax.data.tokenizer import BOS, EOS, PAD, SPECIALS, Tokenizer
from transformer_jax.errors import UserError

TEXTS = ["the cat sat on the mat", "고양이가 매트 위에 앉았다", "the dog sat", "개가 앉았다", "größer 🙂"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=300)


TRAINED = Tokenizer.train(TEXTS, vocab_size=300)


@settings(deadline=None)
@given(st.text())
def test_decoding_what_was_encoded_gives_the_text(text: str) -> None:
    (ids,) = TRAINED.encode_batch([text])
    assert TRAINED.decode(ids) == unicodedata.normalize("NFC", text)
    assert not set(ids) & {0, 1, 2, 3}


@pytest.mark.parametrize(
    "text", ["안녕하세요 세계", "👩‍👩‍👧 family, 🇰🇷", "a <eos> b <pad>", "  two  spaces ", "tab\tnew\nline"]
)
def test_awkward_text_survives(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode([BOS, *ids, EOS, *ids, PAD]) == text


def test_training_is_deterministic_and_round_trips(tokenizer: Tokenizer) -> None:
    again = Tokenizer.from_json(tokenizer.to_json(), where="x")
    assert again.fingerprint == tokenizer.fingerprint == TRAINED.fingerprint
    assert again.encode_batch(TEXTS[:5]) == tokenizer.encode_batch(TEXTS[:5])
    assert tokenizer.vocab_size == 300


def test_labels_are_readable(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode_batch(["the the 뷁"])
    labels = tokenizer.tokens([BOS, *ids, EOS, 9999])
    assert labels == ["<bos>", "the", "▁the", "▁", r"\xeb", r"\xb7", r"\x81", "<eos>", "<9999>"]
    larger = Tokenizer.train(TEXTS, vocab_size=400)
    # A piece may end inside a character: what is whole stays readable.
    assert larger.tokens(larger.encode_batch(["매트 앉았다"])[0]) == [r"매\xed", r"\x8a\xb8", "▁앉았다"]


def test_ids_beyond_the_vocabulary_are_skipped(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode_batch(["cat"])
    assert tokenizer.decode([*ids, 9999]) == "cat"


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size = 100 is too small .* at least 260"):
        Tokenizer.train(TEXTS, vocab_size=100)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer: Tokenizer) -> None:
    tokenizer.require(300, "t.json")
    with pytest.raises(UserError, match=r"t\.json has 300 tokens but model\.vocab_size = 280; set .* to 300 or more"):
        tokenizer.require(280, "t.json")


def test_truncation_and_padding_of_a_loaded_tokenizer_are_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    inner.enable_truncation(2)
    inner.enable_padding(length=128)
    inner.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode_batch(["the cat sat", "a"]) == tokenizer.encode_batch(["the cat sat", "a"])


def test_special_tokens_are_required(tmp_path: Path) -> None:
    def word_level(vocabulary: list[str]) -> str:
        model = tokenizers.models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]")
        return tokenizers.Tokenizer(model).to_str()

    assert Tokenizer.from_json(word_level(["[PAD]", "<s>", "</s>", "[UNK]", "a"]), "t").tokens([2, 4]) == ["</s>", "a"]
    with pytest.raises(UserError, match=r"t: the tokenizer has no <bos>, <unk>\. Train it with special_tokens"):
        Tokenizer.from_json(word_level(["<pad>", "a", "<eos>"]), "t")
    with pytest.raises(UserError, match=r"must have the ids 0 to 3, but <pad> = 1, <bos> = 0\."):
        Tokenizer.from_json(word_level(["<bos>", "<pad>", "<eos>", "<unk>"]), "t")


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"t: not JSON"):
        Tokenizer.from_json("{", "t")
    for content in ("{}", '{"model": null}', '{"model": {"type": "BPE"}}', "[]"):
        with pytest.raises(UserError, match=r"t: not a tokenizer\.json .* no vocabulary"):
            Tokenizer.from_json(content, "t")


def test_the_special_tokens_come_first(tokenizer: Tokenizer) -> None:
    assert tokenizer.tokens(range(4)) == list(SPECIALS)
