"softnce.text: words and definitions against loops over them, and the experiments at a small size."
import random
from collections import Counter, defaultdict

import pytest
import torch

from softnce.text import (Contexts, ContextModel, NgramClassifier, continuation_targets, corpus_of, draw_votes,
                          language_of_words, ngram_ids)


def random_frequencies(seed):
    r = random.Random(seed)
    words = [''.join(r.choices('abcé', k=r.randint(1, 4))) for _ in range(60)]
    return {k: {w: r.random() for w in r.sample(words, 25)} for k in ('xx', 'yy', 'zz')}


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('least', [1, 2, 3])
def test_the_truth_by_bayes_rule(seed, least):
    frequencies = random_frequencies(seed)
    got = language_of_words(frequencies, least)
    words = set().union(*frequencies.values())
    expected = sorted(w for w in words if sum(w in f for f in frequencies.values()) >= least)
    assert got.words == expected and got.languages == ['xx', 'yy', 'zz']
    for word, row in zip(got.words, got.probs.tolist()):
        joint = [frequencies[k].get(word, 0.) for k in got.languages]
        assert row == pytest.approx([v/sum(joint) for v in joint], rel=1e-14)


def test_a_negative_frequency_is_refused():
    with pytest.raises(ValueError, match='frequencies must not be negative'):
        language_of_words({'a': {'w': -1.}, 'b': {'w': 1.}})


def test_votes_follow_their_row():
    probs = torch.tensor([[1., 0., 0.], [.2, .3, .5]], dtype=torch.float64)
    counts = draw_votes(probs, 20_000, torch.Generator().manual_seed(0))
    assert counts.sum(1).tolist() == [20_000]*2 and counts[0].tolist() == [20_000, 0, 0]
    chi2 = ((counts[1] - 20_000*probs[1])**2/(20_000*probs[1])).sum()
    assert chi2 < 13.8  # the 99.9 % quantile with two degrees of freedom


def test_ngrams_of_a_word_are_its_own():
    "Equal words have equal ids; a word of one letter has five n-grams; what does not fit is cut."
    ids = ngram_ids(['word', 'a', 'word', 'w'*100], buckets=500, max_ngrams=16)
    assert ids[0].equal(ids[2]) and not ids[0].equal(ids[1])
    assert ids.shape == (4, 16) and ids.max() < 500
    for row in ids[:3]:
        used = row[row > 0]
        assert len(set(used.tolist())) == len(used) and (row[len(used):] == 0).all()


def test_the_last_bucket_is_used_and_within_the_model():
    ids = ngram_ids([f'word{i}' for i in range(500)], buckets=7)
    assert set(ids.unique().tolist()) == set(range(7))
    assert NgramClassifier(3, buckets=7, hidden=4)(ids).isfinite().all()


def random_texts(seed):
    r = random.Random(seed)
    return [' '.join(r.choices('abcdef', k=r.randint(1, 6))) for _ in range(40)]


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('width', [1, 2, 3])
def test_gaps_by_a_loop(seed, width):
    texts = random_texts(seed)
    corpus = corpus_of(texts)
    gaps, at = Contexts.of(corpus, width), 0
    for t, text in enumerate(texts):
        words = text.split()
        for i, word in enumerate(words):
            around = [words[i+j] if 0 <= i+j < len(words) else None for j in (*range(-width, 0), *range(1, width+1))]
            found = [corpus.vocabulary[k] if k < len(corpus.vocabulary) else None for k in gaps.neighbours[at].tolist()]
            assert found == around and corpus.vocabulary[gaps.words[at]] == word and gaps.text[at] == t
            at += 1
    assert at == len(gaps.words)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('top', [1, 2, 6])
def test_continuations_by_counting(seed, top):
    corpus = corpus_of(random_texts(seed))
    gaps, K = Contexts.of(corpus, 2), len(corpus.vocabulary)
    counted = defaultdict(Counter)
    for (_, left, right, _), word in zip(gaps.neighbours.tolist(), gaps.words.tolist()): counted[left, right][word] += 1
    got = continuation_targets(gaps, K, top).dense()
    for row, (_, left, right, _) in zip(got.tolist(), gaps.neighbours.tolist()):
        most = sorted(counted[left, right].items(), key=lambda c: (-c[1], c[0]))[:top]
        expected = [0.]*K
        for word, n in most: expected[word] = n/sum(c for _, c in most)
        assert row == pytest.approx(expected, abs=1e-6)


def test_parts_by_text_share_no_gap():
    corpus = corpus_of(random_texts(0))
    gaps, order = Contexts.of(corpus), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    parts = [gaps.rows_of_texts(t) for t in order.split(13)]
    assert torch.cat(parts).sort().values.equal(torch.arange(len(gaps.words)))


def test_gradients_of_the_context_model_touch_what_the_batch_holds():
    model = ContextModel(50, dim=4, width=1)
    model(torch.tensor([[1, 2], [2, 50]])).sum().backward()
    assert model.neighbours.weight.grad.is_sparse
    assert set(model.neighbours.weight.grad.coalesce().indices()[0].tolist()) == {1, 2, 50}
