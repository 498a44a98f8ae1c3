from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax.data.tokenizer import SPECIALS, Tokenizer
from transformer_jax.errors import UserError

Write = Callable[[str, str | bytes], Path]
TEXTS = ["the cat sat on the mat", "고양이가 매트 위에 앉았다", "the dog sat", "개가 앉았다", "größer 🙂"] * 20
BOS, EOS, PAD = 1, 2, 0
TRAINED = Tokenizer.train(TEXTS, vocab_size=300)
WORDPIECE = Tokenizer.train_wordpiece(TEXTS, 300, lowercase=True)
AWKWARD = ["안녕하세요 세계", "👩‍👩‍👧 family, 🇰🇷", "a <eos> b <pad> <|endoftext|>", "  two  spaces ", "tab\tnew\nline"]


@settings(deadline=None)
@given(st.text())
def test_decoding_what_was_encoded_gives_the_text(text: str) -> None:
    (ids,) = TRAINED.encode_batch([text])
    assert TRAINED.decode(ids) == unicodedata.normalize("NFC", text)
    assert not set(ids) & TRAINED.specials
    assert TRAINED.token_bytes()[ids].sum() == len(unicodedata.normalize("NFC", text).encode())


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_survives(text: str) -> None:
    (ids,) = TRAINED.encode_batch([text])
    assert TRAINED.decode([BOS, *ids, EOS, *ids, PAD]) == text
    assert TRAINED.decode([BOS, *ids, EOS, *ids, PAD, -1], stop=False) == text + text


def test_training_is_deterministic_and_round_trips() -> None:
    again = Tokenizer.from_json(TRAINED.to_json(), where="x")
    assert again.fingerprint == TRAINED.fingerprint == Tokenizer.train(TEXTS, 300).fingerprint
    assert again.encode_batch(TEXTS[:5]) == TRAINED.encode_batch(TEXTS[:5])
    assert TRAINED.vocab_size == 300
    assert TRAINED.tokens(range(4)) == list(SPECIALS)


@pytest.mark.parametrize("tokenizer", [TRAINED, WORDPIECE], ids=["bytes", "wordpiece"])
@pytest.mark.parametrize("word", ["cat", "고양이", "🙂", "👩‍👩‍👧", "caf\u0065\u0301", "\u1112\u1161\u11ab국", "größer"])
def test_the_tokens_that_overlap_a_word_cover_exactly_its_characters(tokenizer: Tokenizer, word: str) -> None:
    text = f"The {word}, 가 {word}  x"
    ((ids, offsets),) = tokenizer.encode_with_offsets([text])
    assert ids == tokenizer.encode_batch([text])[0]
    for begin in (4, text.rindex(word)):
        end = begin + len(word)
        inside = [(a, b) for a, b in offsets if a < end and b > begin]
        assert (min(inside)[0], max(b for _, b in inside)) == (begin, end)
    covered = {i for a, b in offsets for i in range(a, b)}
    assert all(character.isspace() or i in covered for i, character in enumerate(text))


def test_wordpiece_keeps_hangul_and_accents_and_marks_its_specials() -> None:
    assert WORDPIECE.tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    roles = (WORDPIECE.pad, WORDPIECE.unk, WORDPIECE.cls, WORDPIECE.sep, WORDPIECE.mask, WORDPIECE.bos, WORDPIECE.eos)
    assert roles == (0, 1, 2, 3, 4, 2, 3)
    assert WORDPIECE.vocab_size <= 300
    (ids,) = WORDPIECE.encode_batch(["The 고양이가 GRÖßER"])
    assert WORDPIECE.decode([2, *ids, 3, *ids, 0]) == "the 고양이가 größer"
    (cased,) = Tokenizer.train_wordpiece(["The Cat"] * 9, 300, lowercase=False).encode_batch(["Cat cat"])
    assert len(cased) > 1
    marked = WORDPIECE.encode_marked("the [MASK] sat")
    assert marked == [*WORDPIECE.encode_batch(["the"])[0], 4, *WORDPIECE.encode_batch(["sat"])[0]]
    assert 4 not in WORDPIECE.encode_batch(["the [MASK] sat"])[0]
    pieces = WORDPIECE.encode_batch(["the xyzzy"])[0]
    assert [WORDPIECE.continuations()[i] for i in pieces] == [t.startswith("##") for t in WORDPIECE.tokens(pieces)]


def test_a_vocabulary_of_wordpiece_has_no_more_letters_than_fit() -> None:
    letters = "".join(chr(0xAC00 + i) for i in range(1000))
    assert Tokenizer.train_wordpiece([letters, "the cat"] * 3, 400, lowercase=True).vocab_size <= 400


@settings(deadline=None)
@given(st.text())
def test_characters_are_one_token_each(text: str) -> None:
    tokenizer = Tokenizer.from_json(Tokenizer.characters([text, "<eos>"]).to_json(), "t")
    normal = unicodedata.normalize("NFC", text)
    (ids,) = tokenizer.encode_batch([text])
    assert len(ids) == len(normal)
    assert tokenizer.decode(ids) == normal
    assert tokenizer.vocab_size == 4 + len(set(normal) | set("<eos>"))
    assert tokenizer.token_bytes()[ids].sum() == len(normal.encode())


def test_an_unseen_character_is_unknown() -> None:
    tokenizer = Tokenizer.characters(["abc\n"])
    assert tokenizer.encode_batch(["a€b\n"]) == [[5, 3, 6, 4]]


def test_labels_are_readable() -> None:
    (ids,) = TRAINED.encode_batch(["the the 뷁"])
    labels = TRAINED.tokens([BOS, *ids, EOS, 9999])
    assert labels == ["<bos>", "the", "▁the", "▁", r"\xeb", r"\xb7", r"\x81", "<eos>", "<9999>"]
    larger = Tokenizer.train(TEXTS, vocab_size=400)
    # A piece may end inside a character: what is whole stays readable.
    assert larger.tokens(larger.encode_batch(["매트 앉았다"])[0]) == [r"매\xed", r"\x8a\xb8", "▁앉았다"]


def test_ids_beyond_the_vocabulary_are_skipped() -> None:
    (ids,) = TRAINED.encode_batch(["cat"])
    assert TRAINED.decode([*ids, 9999]) == "cat"


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size = 100 is too small .* at least 260"):
        Tokenizer.train(TEXTS, vocab_size=100)
    with pytest.raises(UserError, match=r"model\.vocab_size = 100 is too small for WordPiece; give 260"):
        Tokenizer.train_wordpiece(TEXTS, 100, lowercase=True)


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    TRAINED.require(300, "t.json")
    with pytest.raises(UserError, match=r"t\.json has 300 tokens but model\.vocab_size = 280; set .* to 300 or more"):
        TRAINED.require(280, "t.json")


def test_truncation_and_padding_of_a_loaded_tokenizer_are_off(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_str(TRAINED.to_json())
    inner.enable_truncation(2)
    inner.enable_padding(length=128)
    inner.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode_batch(["the cat sat", "a"]) == TRAINED.encode_batch(["the cat sat", "a"])


def test_roles_are_found_wherever_they_are_and_missing_ones_named() -> None:
    def word_level(vocabulary: list[str], special: list[str]) -> Tokenizer:
        model = tokenizers.models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]")
        inner = tokenizers.Tokenizer(model)
        inner.add_special_tokens(special)
        return Tokenizer.from_json(inner.to_str(), "t")

    llama = word_level(["a", "<unk>", "<s>", "</s>", "[PAD]", "b"], [])
    assert (llama.pad, llama.bos, llama.eos, llama.unk, llama.mask) == (4, 2, 3, 1, None)
    assert llama.require_roles(("eos", "pad"), "t") == (3, 4)
    assert llama.decode([2, 0, 5, 3, 0]) == "a b"
    with pytest.raises(
        UserError, match=r"t\.json has no special token for mask \(it would be written mask: \[MASK\], <m"
    ):
        llama.require_roles(("pad", "mask"), "t.json")
    # What merely looks like a special token is none where others are marked.
    assert word_level(["<s>", "<mask>", "[UNK]", "</s>"], ["</s>"]).mask is None


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"no tokenizer in this folder; known are tokenizer\.json, vocab\.txt"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match=r"t: not JSON"):
        Tokenizer.from_json("{", "t")
    for content in ("{}", '{"model": null}', '{"model": {"type": "BPE"}}', "[]"):
        with pytest.raises(UserError, match=r"t: not a tokenizer\.json .* no vocabulary"):
            Tokenizer.from_json(content, "t")


BERT = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "e", "고", "##양"]


def test_a_bert_vocabulary_is_read_as_hugging_face_reads_it(write: Write) -> None:
    path = write("vocab.txt", "\n".join(BERT) + "\n")
    tokenizer = Tokenizer.load(path)
    (ids,) = tokenizer.encode_batch(["The CATS é 고양"])
    assert tokenizer.tokens(ids) == ["the", "cat", "##s", "e", "[UNK]"]  # BERT strips accents, and Hangul with them
    assert tokenizer.decode([3, *ids, 4, 6]) == "the cats e"
    assert (tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask, tokenizer.unk) == (0, 3, 4, 5, 2)
    write("tokenizer_config.json", json.dumps({"do_lower_case": False}))
    assert Tokenizer.load(path.parent).tokens(Tokenizer.load(path).encode_batch(["The cats 고양"])[0]) == [
        *("[UNK]", "cat", "##s", "고", "##양")
    ]
    again = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert again.encode("the cat").tokens == ["[CLS]", "the", "cat", "[SEP]"]


def test_a_cased_vocabulary_without_a_config_is_not_lower_cased(write: Write) -> None:
    tokenizer = Tokenizer.load(write("vocab.txt", "\n".join([*BERT, "The"])))
    assert tokenizer.tokens(tokenizer.encode_batch(["The the"])[0]) == ["The", "the"]


@pytest.mark.parametrize(("vocab", "merges"), [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_the_two_files_of_gpt2_are_read(write: Write, vocab: str, merges: str) -> None:
    content = json.loads(TRAINED.to_json())["model"]
    vocabulary = {token: i for token, i in content["vocab"].items() if token not in SPECIALS}
    vocabulary["<|endoftext|>"] = 300
    path = write(vocab, json.dumps(vocabulary))
    write(merges, "#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in content["merges"]))
    tokenizer = Tokenizer.load(path.parent)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (300, 300, None)
    assert (
        tokenizer.encode_batch(AWKWARD) == TRAINED.encode_batch(AWKWARD) == Tokenizer.load(path).encode_batch(AWKWARD)
    )
    (ids,) = tokenizer.encode_batch(["the cat"])
    assert tokenizer.decode([300, *ids, 300, *ids]) == "the cat"
    assert tokenizer.encode_marked("the<|endoftext|>")[-1] == 300
    assert tokenizer.token_bytes()[[300, *ids]].tolist() == [0, *[len(t) for t in tokenizer.tokens(ids)]]
    write(merges, "#version: 0.2\n" + " ".join(content["merges"][0]) + "\nno merge\n")
    with pytest.raises(UserError, match=rf"{merges}:3: 'no merge' does not merge two tokens of"):
        Tokenizer.load(path)


def test_a_vocabulary_that_is_none_is_refused(write: Write) -> None:
    with pytest.raises(UserError, match=r"words\.txt: no \[UNK\] in it"):
        Tokenizer.load(write("words.txt", "a\nb\n"))
    path = write("vocab.json", "[1]")
    with pytest.raises(UserError, match=r"vocab\.json: not a vocabulary"):
        Tokenizer.load(path)
    path.write_text('{"a": 0}')
    with pytest.raises(UserError, match=r"merges\.txt: cannot read the tokenizer .* known are"):
        Tokenizer.load(path)
