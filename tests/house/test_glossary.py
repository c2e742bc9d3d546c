"""Every equation of self-modifying Titans and of the continuum memory system is found from the glossary."""

from __future__ import annotations

from tests.house.glossary import cited, holds, links


def test_numbers_in_a_line():
    assert cited("x = y  # eq 88") == {88}
    assert cited("(eq 70-74), eq 89/91") == {70, 71, 72, 73, 74, 89, 91}
    assert cited("seq 88 is no equation; eq. neither") == set()


def test_every_equation_has_a_link():
    wanted = {*range(70, 75), *range(83, 94)}
    assert wanted <= {number for link in links() for number in link.numbers}


def test_links_point_at_lines_that_carry_the_number():
    wrong = [f"{link.path.name}:{link.line}: eq {link.numbers}" for link in links() if not holds(link)]
    assert not wrong, "run `python -m tests.house.glossary --fix`:\n" + "\n".join(wrong)
