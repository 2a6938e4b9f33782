"""The running sums are softmax attention over all points, however they come in."""

import inspect
from functools import reduce
from itertools import permutations

import jaxtyping
import pytest
import torch

from cmanp_ros.core import attention
from cmanp_ros.core.attention import AttentionSums, forget, merge, sums

BATCH, BLOCK, HEAD, QUERY, DIM, N = 2, 3, 5, 11, 13, 7
CHUNKINGS = [(7,), (1,) * 7, (3, 0, 4), (0, 7), (7, 0), (0, 0, 5, 0, 2, 0), (2, 5)]
EXACT = {'rtol': 0, 'atol': 1e-12}


@pytest.fixture
def points():
    """Return query, key, value; scores spread over about +-20."""
    shape, options = (BATCH, BLOCK, HEAD, N, DIM), {'dtype': torch.float64}
    query = 1.5 * torch.randn(BLOCK, HEAD, QUERY, DIM, **options)
    return query, torch.randn(shape, **options), torch.randn(shape, **options)


def softmax_attention(query, key, value, weight=None):
    """Return what the sums should be, by torch.softmax over all points at once."""
    scores = torch.einsum('khqd,bkhnd->bkhqn', query, key)
    if weight is not None:
        scores = scores + weight.log()
    mean = torch.einsum('bkhqn,bkhnd->bkhqd', torch.softmax(scores, -1), value)
    return AttentionSums(torch.log(torch.exp(scores).sum(-1)), mean)


def no_points():
    return attention.empty(BATCH, BLOCK, HEAD, QUERY, DIM)


def chunks(points, sizes):
    """Return the sums of consecutive chunks."""
    query, key, value = points
    parts = zip(key.split(sizes, -2), value.split(sizes, -2), strict=True)
    return [sums(query, *part) for part in parts]


def assert_same(found, expected, **tolerance):
    for name in AttentionSums._fields:
        tolerance = tolerance or EXACT
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **tolerance)


@pytest.mark.parametrize('sizes', CHUNKINGS)
def test_every_chunking_equals_softmax_over_all_points(points, sizes):
    parts = chunks(points, sizes)
    expected = softmax_attention(*points)
    assert_same(reduce(merge, parts), expected)
    assert_same(reduce(merge, parts, no_points()), expected)
    assert_same(reduce(lambda a, b: merge(b, a), parts), expected)


@pytest.mark.parametrize('order', list(permutations(range(N)))[::719])
def test_every_order_equals_softmax_over_all_points(points, order):
    query, key, value = points
    order = list(order)
    permuted = query, key[..., order, :], value[..., order, :]
    assert_same(reduce(merge, chunks(permuted, (3, 0, 4))), softmax_attention(*points))


@pytest.mark.parametrize('position', range(4))
def test_no_points_change_nothing_wherever_they_are_merged(points, position):
    parts = chunks(points, (1, 4, 2))
    parts.insert(position, no_points())
    left = reduce(merge, parts)
    right = reduce(lambda a, b: merge(b, a), reversed(parts))
    assert_same(left, softmax_attention(*points))
    assert_same(right, softmax_attention(*points))


def test_no_points_and_no_points_are_no_points():
    both = merge(no_points(), no_points())
    assert (both.logsumexp == -torch.inf).all()
    assert (both.mean_value == 0).all()
    assert_same(merge(both, no_points()), no_points())


def test_sums_of_an_empty_chunk_are_the_empty_sums(points):
    query, key, value = points
    assert_same(sums(query, key[..., :0, :], value[..., :0, :]), no_points())


def ragged():
    """Return which points are there: another number in each row, none in the last."""
    return torch.tensor([[False, True, True, False, True, True, False], [False] * N])


@pytest.mark.parametrize('junk', [0.0, -1e9, 1e30])
def test_masked_points_are_the_same_as_points_left_out(points, junk):
    query, key, value = points
    mask = ragged()
    there = mask[:, None, None, :, None]
    found = sums(query, key.where(there, junk), value.where(there, junk), mask)
    for row in range(BATCH):
        kept = query, *(part[row : row + 1, :, :, mask[row]] for part in (key, value))
        alone = AttentionSums(*(part[row : row + 1] for part in found))
        assert_same(alone, sums(*kept))
        if mask[row].any():
            assert_same(alone, softmax_attention(*kept))


def test_a_mask_that_keeps_all_or_none_gives_the_sums_of_all_or_none(points):
    for keep, expected in ((True, sums(*points)), (False, no_points())):
        found = sums(*points, torch.full((BATCH, N), keep))
        assert_same(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize('sizes', CHUNKINGS)
def test_every_chunking_of_masked_points_equals_all_at_once(points, sizes):
    query, key, value = points
    mask = ragged()
    parts = zip(key.split(sizes, -2), value.split(sizes, -2), mask.split(sizes, 1), strict=True)
    assert_same(reduce(merge, [sums(query, *part) for part in parts]), sums(*points, mask))


@pytest.mark.skipif(not attention.HAS_FUSED, reason='this torch has no fused kernel for the CPU')
@pytest.mark.parametrize('n', [1, 2, 7, 100, 1024, 1025])
@pytest.mark.parametrize('ragged', [False, True])
@pytest.mark.parametrize(('dtype', 'limit'), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_fused_kernel_equals_plain_operations(n, ragged, dtype, limit):
    query = torch.randn(BLOCK, HEAD, QUERY, DIM, dtype=dtype)
    key, value = torch.randn(2, BATCH, BLOCK, HEAD, n, DIM, dtype=dtype)
    mask = torch.rand(BATCH, n) < 0.5 if ragged else None
    if ragged:
        mask[-1] = False  # nothing at all
    found = attention.fused_softmax(query, key, value, mask)
    expected = attention.plain_softmax(query, key, value, mask)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=limit, atol=limit)


def test_sums_learn_by_plain_operations(points):
    query = points[0].clone().requires_grad_()
    assert sums(query, *points[1:]).logsumexp.requires_grad
    with torch.inference_mode():
        assert_same(sums(query, *points[1:]), softmax_attention(*points))


def test_masked_points_have_no_part_in_gradients(points):
    mask, gradients = ragged()[:1], []
    query, key, value = points[0], points[1][:1], points[2][:1]
    for kept in (slice(None), mask[0]):
        leaf = query.clone().requires_grad_()
        arguments = leaf, key[..., kept, :], value[..., kept, :], mask[:, kept]
        found = sums(*arguments)
        (found.logsumexp.sum() + found.mean_value.square().sum()).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, **EXACT)


def test_padded_rows_lie_where_the_mask_says():
    rows = torch.arange(1.0, 9.0).view(4, 2)
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    found = attention.padded(rows, mask)
    assert torch.equal(found[mask], rows) and not found[~mask].any()


def test_merge_is_commutative(points):
    a, b = chunks(points, (3, 4))
    assert_same(merge(a, b), merge(b, a), rtol=0, atol=0)


def test_merge_is_associative(points):
    a, b, c = chunks(points, (3, 2, 2))
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))


def test_merge_leaves_its_arguments_unchanged(points):
    a, b = chunks(points, (3, 4))
    before = [part.clone() for part in (*a, *b)]
    merge(a, b)
    assert all(torch.equal(p, q) for p, q in zip(before, (*a, *b), strict=True))


@pytest.mark.parametrize('shift', [-1e4, -700.0, 700.0, 1e4])
def test_merge_does_not_overflow_for_extreme_scores(points, shift):
    a, b = chunks(points, (3, 4))
    shifted = [AttentionSums(part.logsumexp + shift, part.mean_value) for part in (a, b)]
    expected = merge(a, b)
    expected = AttentionSums(expected.logsumexp + shift, expected.mean_value)
    assert_same(merge(*shifted), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize('gap', [-2000.0, 2000.0])
def test_a_point_that_outweighs_all_others_is_the_average(points, gap):
    a, b = chunks(points, (3, 4))
    b = AttentionSums(b.logsumexp + gap, b.mean_value)
    assert_same(merge(a, b), b if gap > 0 else a)


def test_forget_equals_weighting_the_points(points):
    first, second, third = chunks(points, (3, 2, 2))
    faded = merge(forget(merge(forget(first, 0.5), second), 0.3), third)
    weight = torch.tensor([0.15] * 3 + [0.3] * 2 + [1.0] * 2, dtype=torch.float64)
    assert_same(faded, softmax_attention(*points, weight))


def test_forget_by_one_changes_nothing(points):
    a = chunks(points, (7,))[0]
    assert_same(forget(a, 1.0), a, rtol=0, atol=0)


def test_forgetting_no_points_leaves_no_points():
    assert_same(merge(forget(no_points(), 0.5), no_points()), no_points())


def test_sums_of_float32_scores_are_kept_in_float64(points):
    found = sums(*(part.float() for part in points))
    assert {part.dtype for part in found} == {torch.float64}
    assert_same(found, softmax_attention(*points), rtol=1e-4, atol=1e-4)


def test_sums_refuse_tensors_that_do_not_belong_together(points):
    query, key, value = points
    with pytest.raises(jaxtyping.TypeCheckError):
        sums(query, key, value[..., 1:, :])


@pytest.mark.slow
def test_many_single_points_stay_exact(without_shape_checks):
    count, dim = 200_000, 3
    query = 0.5 * torch.randn(1, 1, 1, dim, dtype=torch.float64)
    key = torch.randn(count, 1, 1, 1, dim, dtype=torch.float64)  # a batch of single points
    value = torch.rand(count, 1, 1, 1, dim, dtype=torch.float64)
    value = value.float().double()  # exact in both precisions: only scores are rounded
    one_batch = softmax_attention(
        query, key.reshape(1, 1, 1, count, dim), value.reshape(1, 1, 1, count, dim)
    )
    singles = [sums(query, key, value), sums(query.float(), key.float(), value.float())]
    # One walk for both precisions: they lie side by side, merge works element by element.
    logsumexp = torch.stack([part.logsumexp.flatten() for part in singles], 1)
    mean_value = torch.stack([part.mean_value.reshape(count, dim) for part in singles], 1)
    bare_merge = inspect.unwrap(merge)  # without the checks of jaxtyping: half the time
    with torch.inference_mode():
        state = AttentionSums(torch.full((2,), -torch.inf).double(), torch.zeros(2, dim).double())
        for point in map(AttentionSums, logsumexp.unbind(), mean_value.unbind()):
            state = bare_merge(state, point)
    for lane, limit in ((0, 1e-9), (1, 1e-6)):
        assert abs(state.logsumexp[lane] - one_batch.logsumexp.squeeze()) < limit
        assert (state.mean_value[lane] - one_batch.mean_value.squeeze()).abs().max() < limit


@pytest.mark.parametrize('num_keys', [1, 25, attention.FEW_KEYS, attention.FEW_KEYS + 1, 130])
@pytest.mark.parametrize('num_queries', [0, 1, 17])
def test_latents_are_read_alike_however_many_they_are(num_keys, num_queries):
    generator = torch.Generator().manual_seed(num_keys)
    query, key, value = (
        torch.randn(3, 4, n, 12, generator=generator) for n in (num_queries, num_keys, num_keys)
    )
    scores = query.double() @ key.double().mT / 12**0.5
    expected = scores.softmax(-1) @ value.double()
    found = attention.attend(query, key, value)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
