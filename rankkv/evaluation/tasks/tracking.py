"""Variable tracking task: chains of assignments, far apart in a long text."""

from __future__ import annotations

from ...errors import ConfigError
from .base import Draft, Haystack, Question, SampleSpec


def make_tracking(
    haystack: Haystack, place: SampleSpec, *, chains: int = 2, hops: int = 4, digits: int = 5
) -> Draft:
    """Hide chains of assignments in a text and ask which variables hold the first chain's value.

    A chain assigns a number to a variable.  Each of its ``hops`` further assignments copies the previous variable
    into a new one.  The blank context has the same variables in the same places, but each holds a different number.
    To name any of them is then a guess.

    Parameters
    ----------
    haystack : Haystack
        Any text.
    place : SampleSpec
        The sample to make.
    chains : int, default 2
        Number of chains; the question is about the first.
    hops : int, default 4
        Assignments of a chain after its first.
    digits : int, default 5
        Digits of a number.

    Raises
    ------
    ConfigError
        If an option is below 1, or there are more variables than names of three letters or than numbers.
    InputError
        If the context is too short for the assignments, or the text for the context.

    References
    ----------
    C.-P. Hsieh et al., arXiv:2404.06654, section 3 (variable tracking).  The paper's default is one chain, and its
    prompt shows a solved example before the question.
    """
    for name, value in (("chains", chains), ("hops", hops), ("digits", digits)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")
    if chains * (hops + 1) > 1000 or 9**digits < 2 * chains * (hops + 1):
        raise ConfigError(
            f"chains={chains} of {hops + 1} variables each must give at most 1000 variables, and half of the numbers "
            f"of digits={digits} at most: lower chains or hops, or raise digits."
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
    # The blank context must not contain the number in the question.
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
