"""How many items or seeds does it take to see a difference?

python analysis/power.py difference=0.02 accuracy=0.60 [disagree=0.15] [power=0.8] [alpha=0.05]
python analysis/power.py difference=1.0 std=0.8 [power=0.8] [alpha=0.05]

The first form: items of a task on which two methods are compared in pairs (McNemar); `disagree` is
the share of items that exactly one of them gets right, without it the largest share that
independent answers would give. The second: seeds per method, from the std over seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import math
from collections.abc import Mapping, Sequence

from scipy import stats

from analysis.cli import AnalysisError

KNOWN = ("difference", "accuracy", "disagree", "std", "power", "alpha")


def items_needed(
    difference: float, disagree: float, *, power: float = 0.8, alpha: float = 0.05
) -> int:
    """Paired items that show a difference of two accuracies in McNemar's test.

    Connor (1987), equation 2: with psi = disagree and d = difference,
    n = (z_(1 - alpha/2) sqrt(psi) + z_power sqrt(psi - d^2))^2 / d^2.

    Raises:
        ValueError: the methods cannot differ by more than they disagree.
    """
    d = abs(difference)
    if not 0 < d <= disagree <= 1:
        raise ValueError("0 < difference <= disagree <= 1 must hold")
    z_alpha, z_power = stats.norm.ppf(1 - alpha / 2), stats.norm.ppf(power)
    root = z_alpha * math.sqrt(disagree) + z_power * math.sqrt(disagree - d * d)
    return math.ceil((root / d) ** 2)


def seeds_needed(difference: float, std: float, *, power: float = 0.8, alpha: float = 0.05) -> int:
    """Seeds per method that show a difference of two means in Welch's t test, equal std.

    The smallest n >= 2 whose power, from the non-central t distribution, is high enough.

    Raises:
        ValueError: no difference or a negative std.
    """
    if difference == 0 or std < 0:
        raise ValueError("difference must not be 0 and std not negative")
    n = 2
    while t_power(difference, std, n, alpha=alpha) < power:
        n += 1
    return n


def t_power(difference: float, std: float, n: int, *, alpha: float = 0.05) -> float:
    """Chance that a two-sided t test with n seeds for each method sees the difference."""
    if std == 0:
        return 1.0
    degrees = 2 * n - 2
    shift = abs(difference) / (std * math.sqrt(2 / n))
    critical = stats.t.ppf(1 - alpha / 2, degrees)
    return float(stats.nct.sf(critical, degrees, shift) + stats.nct.cdf(-critical, degrees, shift))


def independent_disagreement(accuracy: float, difference: float) -> float:
    """Share of items that exactly one gets right if the two answer independently: the worst case
    for methods that agree more often than chance, as variants of one model do."""
    other = accuracy - abs(difference)
    return accuracy * (1 - other) + other * (1 - accuracy)


def answer(values: Mapping[str, float]) -> str:
    """The line that the command prints.

    Raises:
        AnalysisError: arguments that do not say enough, or contradict each other.
    """
    test = {"power": values.get("power", 0.8), "alpha": values.get("alpha", 0.05)}
    if "difference" not in values or not ("std" in values or "accuracy" in values):
        raise AnalysisError("give difference= and one of accuracy= (items) or std= (seeds)")
    try:
        if "std" in values:
            n = seeds_needed(values["difference"], values["std"], **test)
            return f"{n} seeds per method"
        worst = independent_disagreement(values["accuracy"], values["difference"])
        share = values.get("disagree", worst)
        return f"{items_needed(values['difference'], share, **test)} items (disagree {share:.3f})"
    except ValueError as error:
        raise AnalysisError(str(error)) from error


def parse(arguments: Sequence[str]) -> dict[str, float]:
    """`key=number` words.

    Raises:
        AnalysisError: an unknown key or no number.
    """
    values = {}
    for word in arguments:
        key, _, text = word.partition("=")
        if key not in KNOWN:
            raise AnalysisError(f"unknown argument {word!r}; known: {', '.join(KNOWN)}")
        try:
            values[key] = float(text)
        except ValueError as error:
            raise AnalysisError(f"{key} must be a number, not {text!r}") from error
    return values


def main() -> None:
    """Print the answer, or one line about what is wrong."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write(f"{__doc__}\n")
        return
    try:
        sys.stdout.write(f"{answer(parse(sys.argv[1:]))}\n")
    except AnalysisError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
