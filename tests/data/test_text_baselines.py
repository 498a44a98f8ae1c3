"""What a language model has to beat, counted by hand and on a text whose entropy is known."""

from __future__ import annotations

import lzma
import math

import numpy as np
import pytest

from transformer_jax.data.packed import PackedText
from transformer_jax.data.text_baselines import text_baselines


def write(path, documents):
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return str(path)


def of_characters(tmp_path, train, test):
    config = PackedText(
        dataset=write(tmp_path / "train.txt", train),
        validation=write(tmp_path / "held.txt", test),
        test=str(tmp_path / "held.txt"),
        boundary="blank_line",
        tokenizer="characters",
        context=7,
        batch_rows=8,
        threads=0,
    )
    return config.open(300)


def test_counts_by_hand(tmp_path):
    data = of_characters(tmp_path, ["aab", "b"], ["ab"])
    scores = text_baselines(data)
    # The stream is | a a b n | b n |, where n ends a line and | the text; the targets of the test are a, b, n, |.
    of_all = 9 + data.tokenizer.vocab_size
    one = {"a": 3 / of_all, "b": 3 / of_all, "n": 3 / of_all, "|": 4 / of_all}
    two = [
        (1 + 2 * one["a"]) / (2 + 2),  # after |: a and b, once each
        (1 + 2 * one["b"]) / (2 + 2),  # after a: a and b, once each
        (2 + 1 * one["n"]) / (2 + 1),  # after b: n both times
        (2 + 1 * one["|"]) / (2 + 1),  # after n: | both times
    ]
    unigram = -sum(map(math.log, one.values())) / 4
    bigram = -sum(map(math.log, two)) / 4
    assert scores["unigram"]["nll"] == pytest.approx(unigram)
    assert scores["bigram"]["nll"] == pytest.approx(bigram)
    assert scores["bigram"]["perplexity"] == pytest.approx(math.exp(bigram))
    assert scores["bigram"]["bits_per_byte"] == pytest.approx(4 * bigram / math.log(2) / 3)
    before, after = (len(lzma.compress(text, preset=9)) for text in (b"aab\nb\n", b"aab\nb\nab\n"))
    assert scores["xz -9"]["bits_per_byte"] == 8 * (after - before) / 3


def test_a_text_where_one_letter_decides_the_next_has_the_entropy_of_its_pairs(tmp_path):
    """After a, b, c, d comes the next of them nine times in ten, or else any: 0.1 log 4 and the entropy of 0.9."""
    rng = np.random.default_rng(0)

    def walk(n):
        letters = [0]
        for _ in range(n):
            letters.append((letters[-1] + 1) % 4 if rng.random() < 0.9 else int(rng.integers(4)))
        return "".join("abcd"[i] for i in letters)

    scores = text_baselines(of_characters(tmp_path, [walk(8000)], [walk(4000)]))
    likely = 0.9 + 0.1 / 4
    entropy = -likely * math.log(likely) - 3 * 0.025 * math.log(0.025)
    assert scores["bigram"]["nll"] == pytest.approx(entropy, rel=0.05)
    assert scores["unigram"]["nll"] == pytest.approx(math.log(4), rel=0.01)
    assert entropy / math.log(2) < scores["xz -9"]["bits_per_byte"] < 2, "of 4 letters it needs 2 at most"


def test_counting_stops(tmp_path):
    data = of_characters(tmp_path, ["aaaa", "bbbb", "cccc"], ["ab"])
    assert text_baselines(data, most=4) != text_baselines(data)
