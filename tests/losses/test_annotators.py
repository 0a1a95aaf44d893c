"softnce.annotators against literal loops, the example of Dawid and Skene's paper, and tables as people have them."
import math
import subprocess
import sys

import pytest, torch

from softnce.annotators import Votes, dawid_skene, vote_targets

CK = 1e-10  # crowd-kit adds this to what would be zero


def random_table(items, annotators, classes, per_item, seed):
    "Rows (item, annotator, label) of a crowd of various skill, in random order; some vote twice on an item."
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: int(torch.randint(n, (1,), generator=g))
    rows = []
    for i in range(items):
        truth = draw(classes)
        for _ in range(1 + draw(per_item)):
            who = draw(annotators)
            rows.append((i, who, truth if draw(annotators + 2) > who else draw(classes)))
    return [rows[j] for j in torch.randperm(len(rows), generator=g).tolist()]


def em_literal(rows, items, annotators, classes, steps, smoothing=0.):
    "Dawid and Skene (1979), equations 2.3 to 2.5, with the counts n[k][i][l] of the paper and a loop for every index."
    I, A, K = range(items), range(annotators), range(classes)
    n = [[[sum(r == (i, k, l) for r in rows) for l in K] for i in I] for k in A]
    T = [[sum(n[k][i][j] for k in A)/sum(n[k][i][l] for k in A for l in K) for j in K] for i in I]
    for _ in range(steps):
        said = [[[smoothing + sum(T[i][j]*n[k][i][l] for i in I) for l in K] for j in K] for k in A]
        pi = [[[s/sum(row) if sum(row) else 0. for s in row] for row in said[k]] for k in A]
        p = [sum(T[i][j] for i in I)/items for j in K]
        joint = [[p[j]*math.prod(pi[k][j][l]**n[k][i][l] for k in A for l in K) for j in K] for i in I]
        T = [[x/sum(row) for x in row] for row in joint]
    return T, p, pi, sum(math.log(sum(row)) for row in joint)


def close(got, want, atol=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=torch.float64), rtol=0, atol=atol)


@pytest.mark.parametrize('items, annotators, classes, per_item', [(6, 3, 2, 4), (12, 4, 3, 5), (8, 6, 4, 2)])
@pytest.mark.parametrize('steps', [1, 2, 9])
@pytest.mark.parametrize('smoothing', [0., .5])
def test_dawid_skene_matches_loops(items, annotators, classes, per_item, steps, smoothing):
    rows = random_table(items, annotators, classes, per_item, items + steps)
    votes = Votes.from_arrays(*zip(*rows), classes=classes)
    with pytest.warns(UserWarning, match=f'after {steps} steps'):
        found = dawid_skene(votes, smoothing, tolerance=-1., max_steps=steps)
    order, who = votes.rows(range(items)), [votes.annotators.index(k) for k in sorted(votes.annotators)]
    named = [(i, sorted(votes.annotators).index(k), l) for i, k, l in rows]  # those who vote
    T, p, pi, log_likelihood = em_literal(named, items, len(who), classes, steps, smoothing)
    close(found.targets[order], T)
    close(found.prior, p)
    close(found.confusion[who], pi)
    assert found.log_likelihood == pytest.approx(log_likelihood, abs=1e-10) and found.steps == steps


ANAESTHETISTS = """1111111 3334334 1122122 2223121 2223222 2223322 1222111 3333433 2222223 2322223 4444444 2223343
1111111 2223212 1211111 1112111 1111111 1111111 2222221 2221322 2222222 2222221 2223222 2212222 1111111 1111111 2322222
1111111 1111111 1121121 1111111 3333233 1111111 2222222 2223232 4334343 2212232 2323233 3333432 1111111 1111111 1212111
2322222 1211111 2222222""".split()  # Table 1 of the paper: three answers of the first, one of each other, by patient


def paper():
    rows = [(i, k, int(a)) for i, word in enumerate(ANAESTHETISTS, 1) for k, a in zip((1, 1, 1, 2, 3, 4, 5), word)]
    return Votes.from_arrays(*zip(*rows), classes=[1, 2, 3, 4])


def test_the_papers_example():
    found = dawid_skene(paper(), tolerance=1e-13)
    assert [round(v, 2) for v in found.prior.tolist()] == [.40, .42, .11, .07]
    # crowd-kit 1.4.2 on the same table, 300 steps: patients 3, 7, 12, 38
    crowd_kit = [[CK, 1, CK, CK], [.981020295, .018979705, CK, CK], [CK, CK, 1, CK], [CK, .0212004842, .9787995158, CK]]
    close(found.targets[[2, 6, 11, 37]], crowd_kit, atol=1e-8)
    rows = list(zip(*(t.tolist() for t in (paper().item, paper().annotator, paper().label))))
    T, p, pi, _ = em_literal(rows, 45, 5, 4, found.steps)
    close(found.targets, T)
    close(found.confusion, pi)
    close(found.prior, p)


def test_every_step_raises_the_likelihood_and_the_end_is_a_fixed_point():
    votes = Votes.from_arrays(*zip(*random_table(60, 8, 3, 5, 1)), classes=3)
    values = []
    for steps in range(1, 15):
        with pytest.warns(UserWarning): found = dawid_skene(votes, tolerance=-1., max_steps=steps)
        values.append(found.log_likelihood)
    assert all(a <= b + 1e-12 for a, b in zip(values, values[1:]))
    end = dawid_skene(votes, smoothing=.1, tolerance=1e-12)
    with pytest.warns(UserWarning): more = dawid_skene(votes, .1, tolerance=-1., max_steps=end.steps + 3)
    close(more.targets, end.targets, 1e-10)
    close(end.targets.sum(1), torch.ones(60))
    close(end.confusion.sum(2), torch.ones(8, 3))


def test_dawid_skene_finds_who_errs():
    "Three reliable annotators, two who always say the next class: a majority errs where both of them vote."
    g = torch.Generator().manual_seed(0)
    truth, rows = torch.randint(3, (300,), generator=g).tolist(), []
    for i, t in enumerate(truth):
        for k in torch.randperm(5, generator=g)[:3].tolist(): rows.append((i, k, t if k < 3 else (t + 1) % 3))
    votes = Votes.from_arrays(*zip(*rows))
    found, order, truth = dawid_skene(votes, smoothing=.1), votes.rows(range(300)), torch.tensor(truth)
    right = lambda targets: (targets[order].argmax(1) == truth).float().mean()
    assert right(found.targets) > .99 > .9 > right(vote_targets(votes.counts()))
    assert found.confusion[votes.annotators.index(4), 0].argmax() == 1


@pytest.mark.parametrize('c', [0., .5, 3.])
@pytest.mark.parametrize('prior', [None, [.5, .3, .2]])
def test_vote_targets_match_loops(c, prior):
    counts = [[3, 0, 1], [0, 5, 0], [1, 1, 1]]
    pi = prior or [1/3]*3
    want = [[(n + c*p)/(sum(row) + c) for n, p in zip(row, pi)] for row in counts]
    given = None if prior is None else torch.tensor(prior, dtype=torch.float64)
    close(vote_targets(torch.tensor(counts, dtype=torch.float64), c, given), want)
    got = vote_targets(torch.tensor(counts), c, given)
    assert got.dtype == torch.float32
    close(got.double(), want, 1e-7)


def test_a_row_without_votes_is_the_prior():
    counts, prior = torch.tensor([[0, 0, 0], [1, 0, 0]]), torch.tensor([.5, .3, .2])
    torch.testing.assert_close(vote_targets(counts, 2., prior)[0], prior)
    torch.testing.assert_close(vote_targets(counts, 2.)[0], torch.full((3,), 1/3))


def test_tables_as_people_have_them():
    pd, np = pytest.importorskip('pandas'), pytest.importorskip('numpy')
    items, who, labels = ['b', 'a', 'b', 'c'], [7, 7, 9, 9], ['dog', 'cat', 'cat', 'dog']
    counts = [[1, 1], [1, 0], [0, 1]]  # items in order of appearance, classes sorted
    frame = pd.DataFrame({'task': items, 'worker': who, 'label': labels})
    tables = [Votes.from_arrays(items, who, labels),
              Votes.from_arrays(np.array(items), torch.tensor(who), pd.Series(labels, index=[5, 6, 7, 8])),
              Votes.from_frame(frame, item='task', annotator='worker'),
              Votes.from_frame(frame.sample(frac=1, random_state=0).sort_index(), item='task', annotator='worker'),
              Votes.from_frame(frame.astype({'label': 'string', 'task': 'category'}), item='task', annotator='worker')]
    for votes in tables:
        assert (votes.items, votes.annotators, votes.classes) == (['b', 'a', 'c'], [7, 9], ['cat', 'dog'])
        assert votes.counts().tolist() == counts and votes.annotator.tolist() == [0, 0, 1, 1]
        assert votes.rows(['c', 'b', 'c']).tolist() == [2, 0, 2]


def test_classes_without_votes_keep_their_place():
    pd = pytest.importorskip('pandas')
    ids = Votes.from_arrays([0, 0, 1], [0, 1, 0], [3, 0, 3])
    assert ids.classes == [0, 1, 2, 3] and ids.counts().tolist() == [[1, 0, 0, 1], [0, 0, 0, 1]]
    assert Votes.from_arrays([0], [0], [1], classes=3).counts().tolist() == [[0, 1, 0]]
    assert Votes.from_arrays([0], [0], [1.]).classes == [0, 1]  # pandas made a float of it
    assert Votes.from_arrays([0], [0], ['x'], classes=['y', 'x']).counts().tolist() == [[0, 1]]
    assert Votes.from_arrays([0, 0], [0, 1], [True, False]).classes == [False, True]
    column = pd.Categorical(['lo', 'hi'], categories=['lo', 'mid', 'hi'])
    assert Votes.from_frame(pd.DataFrame({'item': [0, 0], 'annotator': [0, 1], 'label': column})).classes == [
        'lo', 'mid', 'hi']


A = Votes.from_arrays


@pytest.mark.parametrize('call, message', [
    (lambda: A([0, 1], [0], [0, 1]), '^annotators must have 2 values like items, got 1'),
    (lambda: A([0, 1], [0, 1], [0]), '^labels must have 2 values like items, got 1'),
    (lambda: A([0, None], [0, 1], [0, 1]), '^items must not be missing, got None in row 1'),
    (lambda: A([0, 1, 2], [0, 1, 1], [0, 1, math.nan]), '^labels must not be missing, got nan in row 2'),
    (lambda: A([0, 1], [0, 1], [0, -1]), '^labels must be among the classes, .* got -1 in row 1'),
    (lambda: A([0, 1], [0, 1], [0, 7], classes=3), r'^labels must be among the classes, \[0, 1, 2\], got 7 in row 1'),
    (lambda: A([0], [0], ['owl'], classes=['cat', 'dog']), "got 'owl' in row 0"),
    (lambda: A([0], [0], [5000], classes=1000), '^labels must be among the classes, 1000 from 0 to 999, got 5000'),
    (lambda: A(torch.zeros(2, 2), [0, 1], [0, 1]), '^items must have one dimension, got 2'),
    (lambda: A(['a'], [0], [0]).rows(['a', 'b']), "^items must have votes, got none for 'b' in row 1"),
    (lambda: vote_targets([[1, 2]]), r'^counts must be a tensor of shape \(N, K\)'),
    (lambda: vote_targets(torch.ones(3)), r'^counts must be a tensor of shape \(N, K\), got \(3,\)'),
    (lambda: vote_targets(torch.tensor([[1, 1], [2, -1]])), r'^counts must be .* not negative, got \[2, -1\] in row 1'),
    (lambda: vote_targets(torch.tensor([[1., math.nan]])), '^counts must be finite'),
    (lambda: vote_targets(torch.tensor([[1, 0], [0, 0]])), '^counts must have a vote in every row .* none in row 1'),
    (lambda: vote_targets(torch.ones(1, 2), -1.), '^concentration must be >= 0 and finite, got -1'),
    (lambda: vote_targets(torch.ones(1, 2), 1., torch.ones(2)), '^prior must sum to 1'),
    (lambda: vote_targets(torch.ones(1, 2), 1., torch.full((4,), .25)), r'^prior must have shape \(2,\)'),
    (lambda: dawid_skene(A([], [], [])), '^votes must hold at least one vote'),
    (lambda: dawid_skene(A([0], [0], [0]), smoothing=-1), '^smoothing must be >= 0, got -1'),
])
def test_errors_name_the_argument_and_the_row(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_errors_of_a_frame_name_its_column():
    pd = pytest.importorskip('pandas')
    frame = pd.DataFrame({'item': ['a', 'b'], 'annotator': [1, 2], 'label': ['x', None]})
    with pytest.raises(ValueError, match=r"^column 'label' must not be missing, got (None|nan) in row 1"):
        Votes.from_frame(frame)
    with pytest.raises(ValueError, match=r"^frame must have a column 'task', got \['item', 'annotator', 'label'\]"):
        Votes.from_frame(frame, item='task')
    with pytest.raises(ValueError, match=r"^column 'annotator' must not be missing, got <NA> in row 0"):
        Votes.from_frame(frame.assign(label='x', annotator=pd.array([None, 2], dtype='Int64')))


def test_pandas_is_not_needed():
    code = ("import sys; sys.modules['pandas'] = None\nfrom softnce.annotators import Votes, dawid_skene\n"
            "print(dawid_skene(Votes.from_arrays([0, 0], [1, 2], [0, 1])).targets.tolist())")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[[0.5, 0.5]]'
