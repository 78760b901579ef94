"""Means with their uncertainty, over a design of concepts, prompts and images. Arrays only, no tables, no files.

A score depends on its concept, its prompt, on how the two go together, and on the noise that the image started
from. Concepts and prompts are drawn from many that might have been, and are crossed: a prompt is drawn of every
concept, so two scores with a prompt in common are no independent evidence. The prompt's k-th image starts from the
same noise for every concept and method; noises are nested in prompts.

An interval is made in three steps:

1. Images are reduced to a mean per cell (concept, prompt). What is left of their noise there is part of the spread
   between cells, so images are not resampled once more within a cell: that would count their noise twice (Davison
   and Hinkley 1997, sec. 3.8). `benchmarks/coverage.py` measures it.
2. How wide: t quantiles times the standard error, from the variance components (Gao and Owen 2017, "Efficient moment
   calculations for variance components in large unbalanced crossed random effects models", unbiased whatever cells
   are missing), with Satterthwaite's degrees of freedom. The percentiles of a bootstrap would have to be 1.6 times as
   far apart for five prompts: it takes the spread of five values for known, and for their own mean's besides.
3. How lopsided: from 10,000 draws of the pigeonhole bootstrap (Owen 2007, "The pigeonhole bootstrap"), which draws
   concepts and prompts anew, each with replacement; their percentiles divide the width between the two sides. With
   one factor and many values this is the percentile bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

DRAWS = 10_000
LEVEL = 0.05  # of an interval that stands alone
FEWEST_CONCEPTS = 3  # for an interval over concepts; one difference between two has a t quantile of 12.7


@dataclass(frozen=True)
class Estimate:
    """A mean and what is known about it. Where nothing was repeated, nothing but the mean."""

    mean: float
    low: float | None = None
    high: float | None = None
    error: float | None = None  # standard error
    freedom: float | None = None  # degrees of freedom of the standard error
    over: str | None = None  # what the interval lets vary; what is not named is held fixed

    def within(self, least: float, most: float) -> Estimate:
        """The interval cut off at what the mean can be: the truth lies there, so it is covered as often as before."""
        if self.low is None or self.high is None:
            return self
        # the mean stays inside, also where rounding has put a cosine beyond 1
        return replace(self, low=max(self.low, min(least, self.mean)), high=min(self.high, max(most, self.mean)))


@dataclass(frozen=True)
class Noise:
    """A variance that the scores cannot show themselves, and the degrees of freedom it was measured with."""

    variance: float
    freedom: float


def estimate(
    concepts: np.ndarray,
    prompts: np.ndarray,
    scores: np.ndarray,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
    noise: Noise | None = None,
    cautious: bool = False,
) -> Estimate:
    """The mean over a prompt's images, then over a concept's prompts, then over concepts, with its interval.

    The interval is over concepts and prompts where there are three concepts and two prompts at least; with one prompt
    it is over concepts. One or two concepts are held fixed: the interval is over prompts, hence about these concepts
    alone, and with one prompt over images, hence about these concepts in this prompt.

    Args:
        concepts, prompts: (N,) labels of each image; equal prompts of several concepts are one prompt.
        scores: (N,), or differences of scores on the same images.
        draws, seed: of the bootstrap. The draws depend on how many concepts and prompts there are, not on the scores.
        level: how often the interval may miss.
        noise: added to the variance.
        cautious: for levels far below 5 %; see `crossed_variance`.
    """
    concept_of, prompt_of, cells = cell_means(concepts, prompts, scores)
    count, several = int(concept_of.max()) + 1, int(prompt_of.max()) + 1
    means = np.bincount(concept_of, cells) / np.bincount(concept_of)  # of each concept
    mean = float(means.mean())
    if count < FEWEST_CONCEPTS:
        over, variance, freedom = "prompts", *prompts_variance(concept_of, prompt_of, cells)
        if not freedom:
            own = [np.asarray(scores, dtype=np.float64)[concepts == concept] for concept in np.unique(concepts)]
            if min(map(len, own)) < 2:
                return Estimate(mean)
            over, terms = "images", [(float(values.var(ddof=1)) / len(values), len(values) - 1.0) for values in own]
            variance, freedom = mean_of(terms)
            drawn = counts(len(own[0]), draws, seed, False) @ own[0] / len(own[0]) if count == 1 else np.empty(0)
        else:
            drawn = crossed_draws(concept_of, prompt_of, cells, draws, seed, of_concepts=False)
    elif several > 1 and len(cells) > several:
        over, variance, freedom = "concepts and prompts", *crossed_variance(concept_of, prompt_of, cells, cautious)
        drawn = crossed_draws(concept_of, prompt_of, cells, draws, seed)
    else:  # prompts that no two concepts share come and go with their concept
        over = "concepts" if several == 1 else "concepts and prompts"
        variance, freedom = float(means.var(ddof=1)) / count, count - 1.0
        drawn = counts(count, draws, seed, True) @ means / count
    return spread_around(mean, variance, freedom, over, level, noise, lean(mean, drawn))


def estimate_unpaired(
    one: tuple[np.ndarray, np.ndarray, np.ndarray],
    other: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    level: float = LEVEL,
    noise: Noise | None = None,
) -> Estimate:
    """The mean of `one` less that of `other`, over the same concepts, each in prompts and from noise of its own.

    Over three concepts or more the variance is that of the concepts' differences, plus what the choice of prompts adds
    on either side where concepts share them; prompts of a single concept are in the first part. Over one or two, which
    are held fixed, it is that of the prompts on both sides, or of the images where a side has one prompt.

    Args:
        one, other: concepts, prompts and scores as `estimate` takes them; both have the same concepts.
    """
    sides = [cell_means(*side) for side in (one, other)]
    means = [np.bincount(concept_of, cells) / np.bincount(concept_of) for concept_of, _, cells in sides]
    differences = means[0] - means[1]
    mean, count = float(differences.mean()), len(differences)
    if count >= FEWEST_CONCEPTS:
        terms = [(float(differences.var(ddof=1)) / count, count - 1.0)]
        terms += [term for side in sides if (term := _shared_prompts(*side))]
        over = "concepts" if len(terms) == 1 else "concepts and prompts"
    else:
        terms = [prompts_variance(*side) for side in sides]
        over = "prompts"
        if not all(freedom for _, freedom in terms):
            over, terms = "images", []
            for concepts, _, scores in (one, other):
                own = [np.asarray(scores, dtype=np.float64)[concepts == concept] for concept in np.unique(concepts)]
                if min(map(len, own)) < 2:
                    return Estimate(mean)
                terms.append(mean_of([(float(x.var(ddof=1)) / len(x), len(x) - 1.0) for x in own]))
    variance = sum(value for value, _ in terms)
    return spread_around(mean, variance, satterthwaite(terms), over, level, noise, 0.5)


def _shared_prompts(concept_of: np.ndarray, prompt_of: np.ndarray, cells: np.ndarray) -> tuple[float, float] | None:
    """What drawing prompts that several concepts share adds to a mean's variance, and its degrees of freedom."""
    several = int(prompt_of.max()) + 1
    if several < 2 or len(cells) <= several:
        return None
    _, of_prompts, _ = components(concept_of, prompt_of, cells)
    per_concept = np.bincount(concept_of)
    w = 1 / (len(per_concept) * per_concept[concept_of])
    added = float(of_prompts * (np.bincount(prompt_of, w) ** 2).sum())
    return (added, several - 1.0) if added > 0 else None


def of_pairs(
    scores: list[np.ndarray], *, across: Sequence[np.ndarray | None] | None = None, level: float = LEVEL
) -> Estimate:
    """The mean over all pairs of a concept's images, then over one or two concepts.

    Two scores share a pair, and every concept image is in several scores: their mean is about twice as uncertain as if
    they were independent. The standard error is the jackknife's, which leaves out a concept image with all its pairs
    (a U-statistic of degree 2; Arvesen 1969). Two concept images make one pair, which has no spread.

    Args:
        scores: an array for each concept; each score is a concept image's mean with the n - 1 others.
        across: for a concept whose images were compared with those of another set, the scores of these with the first:
            a two-sample U-statistic of degree (1, 1), whose jackknife is the sum of both sets' own variances.
    """
    mean, terms = float(np.mean([values.mean() for values in scores])), []
    for values, others in zip(scores, across or [None] * len(scores), strict=True):
        n = len(values)
        if others is not None:
            if min(n, len(others)) < 2:
                return Estimate(mean)
            both = [(float(one.var(ddof=1)) / len(one), len(one) - 1.0) for one in (values, others)]
            terms.append((sum(variance for variance, _ in both), satterthwaite(both)))
            continue
        if n < 3:
            return Estimate(mean)
        without_one = (n * values.mean() - 2 * values) / (n - 2)  # the mean over the pairs of the others
        terms.append(((n - 1) / n * float(((without_one - without_one.mean()) ** 2).sum()), n - 1.0))
    return spread_around(mean, *mean_of(terms), "concept_images", level, None, 0.5)


def mean_of(terms: list[tuple[float, float]]) -> tuple[float, float]:
    """Variance and degrees of freedom of the mean of independent things (variance, degrees of freedom)."""
    terms = [(variance / len(terms) ** 2, freedom) for variance, freedom in terms]
    return sum(variance for variance, _ in terms), satterthwaite(terms)


def spread_around(
    mean: float, variance: float, freedom: float, over: str, level: float, noise: Noise | None, lean: float
) -> Estimate:
    """The interval: 2 t standard errors wide, of which the share `lean` lies below the mean."""
    if noise and noise.variance > 0:
        terms = [(variance, freedom), (noise.variance, noise.freedom)]
        variance, freedom = variance + noise.variance, satterthwaite(terms)
    error = float(np.sqrt(variance))
    from scipy.special import stdtrit

    width = 2 * float(stdtrit(freedom, 1 - level / 2)) * error
    return Estimate(mean, mean - width * lean, mean + width * (1 - lean), error, float(freedom), over)


def satterthwaite(terms: list[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of independent mean squares (value, its freedom); all zero: the fewest of them."""
    total = sum(value for value, _ in terms)
    below = sum(value**2 / freedom for value, freedom in terms)
    return total**2 / below if below > 0 else min(freedom for _, freedom in terms)


# -- the design ------------------------------------------------------------------------------------------------


def cell_means(concepts: np.ndarray, prompts: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, ...]:
    """(K,) each: concept and prompt of each cell, numbered in the labels' order, and the mean of its images."""
    concept_of = np.unique(concepts, return_inverse=True)[1]
    prompt_of = np.unique(prompts, return_inverse=True)[1]
    width = int(prompt_of.max()) + 1
    code = concept_of * width + prompt_of
    number = np.bincount(code)
    there = np.flatnonzero(number)
    return there // width, there % width, np.bincount(code, scores)[there] / number[there]


def crossed_variance(
    concept_of: np.ndarray, prompt_of: np.ndarray, cells: np.ndarray, cautious: bool = False
) -> tuple[float, float]:
    """Variance of the mean, and its degrees of freedom, where both concepts and prompts are drawn.

    Cells y = mean + a(concept) + b(prompt) + e(cell). The mean with weights w = 1 / (concepts * prompts of the
    concept) has the variance s_a^2 sum w_concept^2 + s_b^2 sum w_prompt^2 + s_e^2 sum w^2, written A + B - E where A
    and B are what concepts and prompts alone would show, the cells' share E in both. The three s^2 solve the moment
    equations of Gao and Owen (2017, sec. 3). With all cells there, A, B and E are the three mean squares of the
    two-way table over the number of cells.

    A + B - E can come out below E, or below 0, where concepts and prompts hardly differ; then it is E, with E's own
    many degrees of freedom. That is right for 95 % intervals, and not for the far tails that simultaneous ones need:
    there it is the few tables whose A and B came out low by luck that miss. So if `cautious`, the degrees of freedom
    stay Satterthwaite's.

    Returns:
        (variance, degrees of freedom)
    """
    n, per_concept, per_prompt = len(cells), np.bincount(concept_of), np.bincount(prompt_of)
    c, p = len(per_concept), len(per_prompt)
    s_a, s_b, s_e = components(concept_of, prompt_of, cells)
    s_e = max(s_e, 0.0)
    w = 1 / (c * per_concept[concept_of])
    e = s_e * (w**2).sum()
    a = max(s_a / c + e, 0.0)
    b = max(s_b * (np.bincount(prompt_of, w) ** 2).sum() + e, 0.0)
    left = n - c - p + blocks(concept_of, prompt_of)  # degrees of freedom of e
    below = a**2 / (c - 1) + b**2 / (p - 1) + (e**2 / left if left > 0 else 0)
    floored = left > 0 and a + b - e <= e
    variance = float(e if floored else max(a + b - e, 0.0))
    if floored and not cautious:
        return variance, float(left)
    return variance, float(max(variance**2 / below, 1.0) if below > 0 else min(c, p) - 1)


def components(concept_of: np.ndarray, prompt_of: np.ndarray, cells: np.ndarray) -> tuple[float, float, float]:
    """The variances of concepts, prompts and cells, s_a^2, s_b^2 and s_e^2; unbiased, so that one may be below 0."""
    n, per_concept, per_prompt = len(cells), np.bincount(concept_of), np.bincount(prompt_of)
    within_concepts = cells - (np.bincount(concept_of, cells) / per_concept)[concept_of]
    within_prompts = cells - (np.bincount(prompt_of, cells) / per_prompt)[prompt_of]
    u = np.array([(within_concepts**2).sum(), (within_prompts**2).sum(), ((cells - cells.mean()) ** 2).sum()])
    c, p = len(per_concept), len(per_prompt)
    expected = np.array(
        [
            [0, n - c, n - c],
            [n - p, 0, n - p],
            [n - (per_concept**2).sum() / n, n - (per_prompt**2).sum() / n, n - 1],
        ]
    )
    found = np.linalg.lstsq(expected, u, rcond=None)[0]  # least norm: a design may not tell them apart
    return float(found[0]), float(found[1]), float(found[2])


def prompts_variance(concept_of: np.ndarray, prompt_of: np.ndarray, cells: np.ndarray) -> tuple[float, float]:
    """Variance of the mean, and its degrees of freedom, where prompts are drawn and the concepts are these.

    From what each prompt adds to the mean over concepts, with all cells there s^2 / p of the prompts' means. 0 degrees
    of freedom: no concept has two prompts.
    """
    per_concept = np.bincount(concept_of)
    deviations = cells - (np.bincount(concept_of, cells) / per_concept)[concept_of]
    added = np.bincount(prompt_of, deviations / (len(per_concept) * per_concept[concept_of]))
    freedom = len(added) - blocks(concept_of, prompt_of)
    return (len(added) / freedom * float((added**2).sum()), float(freedom)) if freedom else (0.0, 0.0)


def blocks(concept_of: np.ndarray, prompt_of: np.ndarray) -> int:
    """Into how many designs a design falls that share neither concepts nor prompts."""
    c, p = int(concept_of.max()) + 1, int(prompt_of.max()) + 1
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    shared = coo_array((np.ones(len(concept_of)), (concept_of, c + prompt_of)), (c + p, c + p))
    return int(connected_components(shared, directed=False, return_labels=False))


# -- the bootstrap ---------------------------------------------------------------------------------------------


def crossed_draws(
    concept_of: np.ndarray, prompt_of: np.ndarray, cells: np.ndarray, draws: int, seed: int, of_concepts: bool = True
) -> np.ndarray:
    """(draws,) means over concepts and prompts that were drawn with replacement; no draw touches an image.

    A concept that has none of the prompts drawn is left out of that draw.

    Args:
        of_concepts: whether concepts are drawn too; else each stands in every draw once.
    """
    c, p = int(concept_of.max()) + 1, int(prompt_of.max()) + 1
    there, sums = np.zeros((c, p)), np.zeros((c, p))
    there[concept_of, prompt_of] = 1
    sums[concept_of, prompt_of] = cells
    of_prompts = counts(p, draws, seed, False)
    number = counts(c, draws, seed, True) if of_concepts else np.ones((draws, c))
    if there.all():
        means = of_prompts @ sums.T / p
    else:
        found = of_prompts @ there.T  # (draws, c)
        means = of_prompts @ sums.T / np.maximum(found, 1)
        number = number * (found > 0)
    total = number.sum(axis=1)
    return np.einsum("dc,dc->d", number, means)[total > 0] / total[total > 0]


@lru_cache(maxsize=4)
def counts(n: int, draws: int, seed: int, concepts: bool) -> np.ndarray:
    """(draws, n): how often each of n things is drawn, when n are drawn with replacement. Same for every variant."""
    generator = np.random.default_rng([seed, int(concepts)])
    drawn = generator.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    drawn.flags.writeable = False
    return drawn


def lean(mean: float, drawn: np.ndarray) -> float:
    """The share of the bootstrap's 95 % that lies below the mean: 1/2 if the draws are symmetric, or all alike."""
    if len(drawn) == 0:
        return 0.5
    low, high = np.quantile(drawn, [LEVEL / 2, 1 - LEVEL / 2])
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        return 0.5
    return float(np.clip((mean - low) / (high - low), 0.0, 1.0))
