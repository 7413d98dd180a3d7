"""Random probes: the published generator, values that depend on key and seed alone, moments."""

import math

import pytest
import torch

from pycnf import _ops, reference

F32, F64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
NOISES = pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
MASK = 0xFFFFFFFF
KEYS = torch.tensor([0, 1, -1, 2**32, -(2**63), 2**63 - 1, 0x0123456789ABCDEF])
SEEDS = [0, 1, -1, 2**32 + 5, 2**63 - 1, -(2**63)]

op_sample = torch.ops.pycnf.probe_sample
op_keys = torch.ops.pycnf.probe_keys


def sample(keys, seed, probes, features, noise, dtype):
    return op_sample(keys, seed, probes, features, noise == "gaussian", dtype)


def expected(keys, seed, probes, features, noise, dtype):
    return reference.probe_sample(keys, seed, probes, features, noise == "gaussian", dtype)


# ---- the generator -------------------------------------------------------------------------------


def philox(counter, key):
    """Philox4x32-10 in Python integers, from the paper (Salmon et al., SC 2011)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


# Random123's kat_vectors: counter, key, result.
KNOWN = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


def signed(bits):
    return bits - (1 << 64) if bits >= 1 << 63 else bits


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name):
    counter, key, answer = KNOWN[name]
    assert philox(counter, key) == answer
    block, probe, low, high = counter
    seed, sample_key = signed(key[0] | key[1] << 32), signed(low | high << 32)
    words = reference._philox(
        seed, torch.tensor(sample_key), torch.tensor(probe), torch.tensor(block)
    )
    assert [word.item() for word in words] == answer


def words_of(signs):
    """The words whose bits, lowest first, are Rademacher signs [.., 32 n]; a set bit is -1."""
    bits = (signs < 0).to(torch.int64).unflatten(-1, (-1, 32))
    return (bits << torch.arange(32)).sum(-1)


def test_known_answer_of_the_compiled_generator():
    """The counter of key 0, probe 0, block 0 under seed 0."""
    signs = sample(torch.zeros(1, dtype=torch.int64), 0, 1, 128, "rademacher", F32)
    assert words_of(signs).flatten().tolist() == KNOWN["zeros"][2]


@pytest.mark.parametrize("seed", SEEDS)
def test_bits_of_the_compiled_generator(seed):
    """Seed and key are the halves of Philox' key and counter, low word first."""
    words = words_of(sample(KEYS, seed, 3, 256, "rademacher", F64)).unflatten(-1, (2, 4))
    for b, key in enumerate(KEYS.tolist()):
        for probe in range(3):
            for block in range(2):
                counter = [block, probe, key & MASK, key >> 32 & MASK]
                answer = philox(counter, [seed & MASK, seed >> 32 & MASK])
                assert words[probe, b, block].tolist() == answer


@DTYPES
def test_gaussian_is_box_muller(dtype):
    values = sample(KEYS, 9, 2, 8, "gaussian", dtype)
    for b, key in enumerate(KEYS.tolist()):
        for probe in range(2):
            for block in range(2):
                w = philox([block, probe, key & MASK, key >> 32 & MASK], [9, 0])
                u = [(word + 0.5) / 2**32 for word in w]
                answer = [
                    math.sqrt(-2 * math.log(u[pair])) * wave(2 * math.pi * u[pair + 1])
                    for pair in (0, 2)
                    for wave in (math.cos, math.sin)
                ]
                got = values[probe, b, 4 * block : 4 * block + 4]
                tolerance = 5e-6 if dtype == F32 else 1e-14
                assert got.double().sub(torch.tensor(answer, dtype=F64)).abs().max() < tolerance


# ---- against the reference -----------------------------------------------------------------------

SHAPES = pytest.mark.parametrize(
    ("batch", "probes", "features"),
    [
        (0, 2, 3), (5, 0, 3), (5, 2, 0), (1, 1, 1), (7, 3, 2), (7, 1, 5), (3, 2, 127), (3, 2, 128),
        (3, 2, 129), (2, 1, 1000), (3000, 2, 3),
    ],
)  # fmt: skip


@DTYPES
@SHAPES
@pytest.mark.parametrize("seed", [0, -3, 2**62 + 11])
def test_rademacher_equals_the_reference(batch, probes, features, seed, dtype):
    keys = torch.arange(batch) * 0x9E3779B97F4A7C1 - 5
    probe = sample(keys, seed, probes, features, "rademacher", dtype)
    assert probe.shape == (probes, batch, features)
    assert probe.dtype == dtype
    assert torch.equal(probe, expected(keys, seed, probes, features, "rademacher", dtype))
    assert (probe.abs() == 1).all()


@DTYPES
@SHAPES
@pytest.mark.parametrize("seed", [0, -3, 2**62 + 11])
def test_gaussian_equals_the_reference_to_rounding(batch, probes, features, seed, dtype):
    """The f32 angle is rounded to 2^-24 of 2 pi, by either."""
    keys = torch.arange(batch) * 0x9E3779B97F4A7C1 - 5
    probe = sample(keys, seed, probes, features, "gaussian", dtype)
    assert probe.shape == (probes, batch, features)
    assert probe.dtype == dtype
    tolerance = 5e-6 if dtype == F32 else 1e-14
    torch.testing.assert_close(
        probe,
        expected(keys, seed, probes, features, "gaussian", dtype),
        rtol=tolerance,
        atol=tolerance,
    )


@NOISES
def test_f32_and_f64_are_the_same_numbers(noise):
    """A flow in either precision sees one probe."""
    single, double = (sample(KEYS, 4, 2, 37, noise, dtype) for dtype in (F32, F64))
    torch.testing.assert_close(single.double(), double, rtol=0.0, atol=5e-6)


# Keys, found by search, of which the first block under seed 0 has an extreme word.
EXTREME = {
    "2^32 in f32: a radius of 0": (50893511, 0, 0xFFFFFFF3),
    "2^32 in f32: an angle of 2 pi": (37084008, 1, 0xFFFFFFD9),
    "1: a radius of 6.6": (84170650, 0, 1),
}


@DTYPES
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_words(name, dtype):
    """The uniform number stays above 0 and does not exceed 1, where logarithm and root end."""
    key, word, value = EXTREME[name]
    block = philox([0, 0, key, 0], [0, 0])
    assert block[word] == value
    radius = math.sqrt(-2 * math.log((block[0] + 0.5) / 2**32))
    angle = 2 * math.pi * (block[1] + 0.5) / 2**32
    answer = torch.tensor([radius * math.cos(angle), radius * math.sin(angle)], dtype=F64)
    got = sample(torch.tensor([key]), 0, 1, 2, "gaussian", dtype)[0, 0].double()
    # Near u = 1 the radius is the root of u's rounding error.
    tolerance = (5e-4 if radius < 1e-3 else 5e-6) if dtype == F32 else 1e-14
    torch.testing.assert_close(got, answer, rtol=tolerance, atol=tolerance)


@NOISES
@DTYPES
def test_a_probe_depends_on_its_key_alone(noise, dtype):
    """Not on the order of the batch, the batch's size, or the other probes and features."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**63), 2**63 - 1, (5000,), generator=generator)
    probes = sample(keys, 12, 2, 6, noise, dtype)
    order = torch.randperm(5000, generator=generator)
    assert torch.equal(sample(keys[order], 12, 2, 6, noise, dtype), probes[:, order])
    for i in (0, 17, 4999):
        assert torch.equal(sample(keys[i : i + 1], 12, 2, 6, noise, dtype), probes[:, i : i + 1])
    assert torch.equal(sample(keys, 12, 5, 6, noise, dtype)[:2], probes)
    assert torch.equal(sample(keys, 12, 2, 300, noise, dtype)[..., :6], probes)


@NOISES
def test_strided_keys(noise):
    keys = torch.arange(40)[::3]
    assert torch.equal(
        sample(keys, 1, 2, 3, noise, F32), sample(keys.contiguous(), 1, 2, 3, noise, F32)
    )


def test_threads_do_not_matter():
    keys, rows_ = torch.arange(50_000), rows(50_000, 4, F32)
    alone = sample(keys, 5, 1, 4, "gaussian", F32), op_keys(rows_)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(sample(keys, 5, 1, 4, "gaussian", F32), alone[0])
        assert torch.equal(op_keys(rows_), alone[1])


# ---- moments -------------------------------------------------------------------------------------
# Seeds are fixed, so nothing here is left to luck; bounds are five standard deviations.

SAMPLES = 100_000
PROBES, FEATURES = 2, 6


def draws(noise, dtype, keys=None, seed=2024):
    """[samples, probes * features]."""
    keys = torch.arange(SAMPLES) if keys is None else keys
    probes = sample(keys, seed, PROBES, FEATURES, noise, dtype)
    return probes.permute(1, 0, 2).reshape(SAMPLES, -1).double()


@NOISES
@DTYPES
def test_mean_and_covariance(noise, dtype):
    """E[probe] = 0 and Cov = I, over features and the probes of a sample; keys are counters."""
    x = draws(noise, dtype)
    assert x.mean(0).abs().max() < 5 / math.sqrt(SAMPLES)
    covariance = x.T @ x / SAMPLES
    identity = torch.eye(PROBES * FEATURES, dtype=F64)
    variance_of_square = 0 if noise == "rademacher" else 2
    assert (covariance - identity).diagonal().abs().max() <= 5 * math.sqrt(
        variance_of_square / SAMPLES
    )
    off_diagonal = covariance - covariance.diagonal().diag()
    assert off_diagonal.abs().max() < 5 / math.sqrt(SAMPLES)


@DTYPES
def test_gaussian_shape(dtype):
    """Skewness 0, kurtosis 3, and the distribution function (Kolmogorov-Smirnov)."""
    x = draws("gaussian", dtype).flatten()
    n = x.numel()
    assert x.pow(3).mean().abs() < 5 * math.sqrt(15 / n)
    assert abs(x.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    uniform = torch.special.ndtr(x.sort().values)
    ranks = (torch.arange(n, dtype=F64) + 0.5) / n
    assert (uniform - ranks).abs().max() < 2.0 / math.sqrt(n)


def largest_correlation(x):
    correlation = torch.corrcoef(x.T)
    return (correlation - torch.eye(len(correlation), dtype=F64)).abs().max()


def test_gaussian_squares_are_uncorrelated():
    """Box and Muller's pairs share a radius, which must not show between features."""
    assert largest_correlation(draws("gaussian", F64).square()) < 5 / math.sqrt(SAMPLES)


def test_rademacher_products_are_uncorrelated():
    """Bits are not only independent in pairs."""
    x = draws("rademacher", F64)
    pairs = torch.combinations(torch.arange(PROBES * FEATURES))
    assert largest_correlation(x[:, pairs].prod(-1)) < 5 / math.sqrt(SAMPLES)


@NOISES
@pytest.mark.parametrize("other", ["next key", "key from the high word", "next seed", "high seed"])
def test_neighbours_are_independent(noise, other):
    keys = torch.arange(SAMPLES)
    x = draws(noise, F64)
    y = {
        "next key": lambda: draws(noise, F64, keys + SAMPLES),
        "key from the high word": lambda: draws(noise, F64, keys << 32),
        "next seed": lambda: draws(noise, F64, seed=2025),
        "high seed": lambda: draws(noise, F64, seed=2024 + 2**32),
    }[other]()
    # Key 0 is key 0 << 32.
    assert (x[1:] * y[1:]).mean(0).abs().max() < 5 / math.sqrt(SAMPLES)
    cross = x[1:].T @ y[1:] / SAMPLES
    assert cross.abs().max() < 5 / math.sqrt(SAMPLES)


# ---- keys ----------------------------------------------------------------------------------------

WIDTH = {F32: (torch.int32, 32), F64: (torch.int64, 64)}


def rows(count, features, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, dtype=F64, generator=generator).to(dtype)


@DTYPES
@pytest.mark.parametrize(
    "shape", [(0, 3), (3, 0), (1, 1), (7,), (5, 2), (4, 3, 2), (257, 17), (40_000, 2)]
)
def test_keys_equal_the_reference(shape, dtype):
    x = rows(math.prod(shape), 1, dtype).reshape(shape)
    keys = op_keys(x)
    assert keys.dtype == torch.int64
    assert keys.shape == shape[:1]
    assert torch.equal(keys, reference.probe_keys(x))


@DTYPES
def test_keys_of_special_values(dtype):
    x = torch.tensor([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40], dtype=dtype)
    keys = op_keys(x[:, None])
    assert torch.equal(keys, reference.probe_keys(x[:, None]))
    assert keys[0] == keys[1]
    assert keys.unique().numel() == len(x) - 1


@DTYPES
def test_minus_zero_counts_as_zero(dtype):
    x = rows(64, 3, dtype)
    x[:, 1] = 0.0
    minus = x.clone()
    minus[:, 1] = -0.0
    assert minus[:, 1].signbit().all()
    assert torch.equal(op_keys(x), op_keys(minus))


@DTYPES
def test_equal_rows_have_equal_keys(dtype):
    """Whatever the batch, the order and the memory layout around them."""
    x = rows(1000, 5, dtype)
    keys = op_keys(x)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(op_keys(x[order]), keys[order])
    assert torch.equal(op_keys(torch.cat([x, x])), keys.repeat(2))
    assert torch.equal(op_keys(x[10:11]), keys[10:11])
    assert torch.equal(op_keys(x.t().contiguous().t()), keys)
    assert torch.equal(op_keys(x.reshape(1000, 5, 1)), keys)
    wide = torch.zeros(1000, 9, dtype=dtype)
    wide[:, 2:7] = x
    assert torch.equal(op_keys(wide[:, 2:7]), keys)


@DTYPES
def test_every_bit_matters(dtype):
    """Flipping one bit of one value changes the key, and about half of its bits."""
    integer, width = WIDTH[dtype]
    x = rows(8, 3, dtype)
    keys = op_keys(x)
    for feature in range(3):
        flipped = x.view(integer).repeat(width, 1, 1)
        one = torch.ones((), dtype=integer)
        flipped[:, :, feature] ^= (one << torch.arange(width, dtype=integer))[:, None]
        other = op_keys(flipped.view(dtype).reshape(-1, 3)).reshape(width, 8)
        changed = other ^ keys
        assert (changed != 0).all()
        bits = changed[..., None] >> torch.arange(64) & 1
        assert abs(bits.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(bits.numel())


@DTYPES
def test_place_of_a_value_matters(dtype):
    x = rows(100, 2, dtype)
    assert (op_keys(x) != op_keys(x.flip(1))).all()
    zeros = [op_keys(torch.zeros(1, d, dtype=dtype)).item() for d in range(6)]
    assert len(set(zeros)) == 6


@DTYPES
@pytest.mark.parametrize("features", [1, 2, 64])
def test_no_collisions(dtype, features):
    """The chance of one among 1e5 random 64-bit keys is 3e-10."""
    x = rows(100_000, features, dtype)
    distinct = x.unique().numel() if features == 1 else len(x)  # f32 scalars do repeat
    assert distinct > 99_000
    assert op_keys(x).unique().numel() == distinct


def test_no_collisions_on_a_grid():
    """Small integers differ in few bits."""
    x = torch.cartesian_prod(torch.arange(320.0), torch.arange(-160.0, 160.0))
    keys = op_keys(x)
    assert keys.unique().numel() == len(x)
    low = keys & MASK  # the chance of n collisions here is Poisson with mean 1.2
    assert low.unique().numel() > len(x) - 10


# ---- the Python face -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, -(2**64) - 1])
def test_seed_is_taken_modulo_2_to_the_64(seed):
    probes = _ops.probe_sample(KEYS, seed, 1, 7, noise="rademacher", dtype=F32)
    assert torch.equal(probes, sample(KEYS, -1, 1, 7, "rademacher", F32))


def test_seed_and_noise_matter():
    def draw(seed, noise):
        return _ops.probe_sample(KEYS, seed, 2, 40, noise=noise, dtype=F64)

    assert not torch.equal(draw(0, "rademacher"), draw(1, "rademacher"))
    assert torch.equal(draw(0, "gaussian"), sample(KEYS, 0, 2, 40, "gaussian", F64))
    assert torch.equal(draw(0, "rademacher"), sample(KEYS, 0, 2, 40, "rademacher", F64))


def test_unknown_noise_is_refused():
    with pytest.raises(ValueError, match=r"noise must be .*got 'uniform'"):
        _ops.probe_sample(KEYS, 0, 1, 1, noise="uniform", dtype=F32)


@NOISES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_without_a_kernel(noise, dtype):
    """Served by the reference: the same numbers, rounded."""
    probes = _ops.probe_sample(KEYS, 3, 2, 130, noise=noise, dtype=dtype)
    assert probes.dtype == dtype
    exact = sample(KEYS, 3, 2, 130, noise, F64)
    torch.testing.assert_close(
        probes.double(), exact, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps / 8
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_keys_of_dtypes_without_a_kernel(dtype):
    x = rows(50, 2, F64).to(dtype)
    keys = _ops.probe_keys(x)
    assert keys.unique().numel() == 50
    assert torch.equal(_ops.probe_keys(x[7:9]), keys[7:9])
    zero = torch.zeros(1, 2, dtype=dtype)
    assert torch.equal(_ops.probe_keys(zero), _ops.probe_keys(-zero))


# ---- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 2, dtype=torch.int64), 0, 1, 1, False, F32), r"keys must be int64 \[B\]"),
        ((torch.zeros(2), 0, 1, 1, False, F32), r"keys must be int64 \[B\], got Float"),
        ((KEYS, 0, -1, 1, False, F32), "probes and features must not be negative, got -1 and 1"),
        ((KEYS, 0, 1, -2, False, F32), "probes and features must not be negative, got 1 and -2"),
        ((KEYS, 0, 1, 1, False, torch.int64), "probe_sample.*not implemented for 'Long'"),
    ],
)
def test_wrong_arguments_of_sample(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        op_sample(*arguments)


def test_wrong_arguments_of_keys():
    with pytest.raises(RuntimeError, match=r"x must be \[B, \.\.\.\], got a 0-dim tensor"):
        op_keys(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"probe_keys.*not implemented for 'Long'"):
        op_keys(torch.ones(2, 2, dtype=torch.int64))
