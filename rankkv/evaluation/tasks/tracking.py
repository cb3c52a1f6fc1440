"""Variable tracking: which names hold a value, over several assignments far apart."""

from __future__ import annotations

from ...errors import ConfigError
from .base import Draft, Haystack, Question, SampleSpec


def make_tracking(
    haystack: Haystack, place: SampleSpec, *, chains: int = 2, hops: int = 4, digits: int = 5
) -> Draft:
    """Hide chains of assignments in a text and ask which variables hold the first chain's value.

    A chain gives a variable a number, and ``hops`` times a new variable the one before.  In the blank context the
    same variables stand in the same places, but each holds a number of its own, so naming any of them is a guess.

    Parameters
    ----------
    haystack : Haystack
        Any text.
    place : SampleSpec
        Which sample.
    chains : int, default 2
        Chains; the first is asked for.
    hops : int, default 4
        Assignments that follow the first of a chain.
    digits : int, default 5
        Of a number.

    Raises
    ------
    ConfigError
        If a number is below 1, or there are more variables than three letters name.
    InputError
        If the context is too short for the assignments, or the text for the context.

    References
    ----------
    C.-P. Hsieh et al., arXiv:2404.06654, section 3 (variable tracking); there one chain is the default, and an
    example is solved before the question.
    """
    for name, value in (("chains", chains), ("hops", hops), ("digits", digits)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")
    if chains * (hops + 1) > 1000 or 9**digits < 2 * chains * (hops + 1):
        raise ConfigError(
            f"chains={chains} of {hops + 1} variables are more than the names, or the numbers of {digits} digits, "
            "allow: lower chains or hops."
        )
    draw = place.draw
    names: dict[str, None] = {}
    while len(names) < chains * (hops + 1):
        names["".join(draw.choices("BCDFGHJKLMNPQRSTVWXZ", k=3))] = None
    variables = list(names)
    numbers = ["".join(draw.choices("123456789", k=digits)) for _ in variables]
    facts: list[tuple[str, float]] = []
    unlinked: list[tuple[str, float]] = []
    for chain in range(chains):
        depths = sorted(draw.random() for _ in range(hops + 1))
        for hop, depth in enumerate(depths):
            own = chain * (hops + 1) + hop
            held = variables[own - 1] if hop else numbers[own]
            facts.append((f" VAR {variables[own]} = {held}.", depth))
            unlinked.append((f" VAR {variables[own]} = {numbers[own]}.", depth))
    state = draw.getstate()
    context = haystack.hide(facts, place)
    draw.setstate(state)
    # The number that is asked for is nowhere in the blank one.
    unlinked[0] = (f" VAR {variables[0]} = {numbers[0][::-1]}0.", unlinked[0][1])
    blank = haystack.hide(unlinked, place)
    linked = tuple(variables[: hops + 1])
    question = Question(
        f"\n\nWhich {len(linked)} variables of the text above hold the value {numbers[0]}, directly or through "
        "other variables?",
        f" The variables that hold {numbers[0]} are VAR",
        linked,
        " " + ", VAR ".join(linked),
    )
    return Draft(context, [question], blank)
