"""Checks of responses without a model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rayllm.algorithms import verifiers

WORKED = "Natalia sold 48 / 2 = <<48/2=24>>24 clips in May.\nAltogether 48 + 24 = 72.\n#### 72"


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("The answer is 72.", WORKED, 1), (WORKED, WORKED, 1), ("72", 72, 1), ("72.0", WORKED, 1),
        ("1,000", "1000", 1), ("1000", "#### 1,000", 1), ("$5", "5", 1), ("5.0", "5", 1), (r"\boxed{5}", "5", 1),
        ("The answer is 5.", "5", 1), ("**5**", "5", 1), ("It costs $1,000.00", "1000", 1), ("0.5", "1/2", 1),
        (r"So $\frac{1}{2}$ of it", "0.5", 1), ("-5", "-5", 1), ("First 3, then 4, so the answer is 7 apples.", "7", 1),
        ("I had 9 at first.\n#### 5", "5", 1),
        ("71", WORKED, 0), ("The answer is 72.", "#### 73", 0), ("5", "-5", 0), ("5 or 6", "5", 0), ("1.000", "1000", 0),
        ("", WORKED, 0), ("I do not know.", WORKED, 0), ("####", WORKED, 0), ("five", "5", 0), ("#### 5", "6", 0),
        ("The answer is 5 of 6.\n#### 6", "5", 0),
    ],
)  # fmt: skip
def test_math_compares_values_and_not_their_writing(response, answer, score):
    assert verifiers.math(response, answer) == score


@pytest.mark.parametrize("response", ["9**9**9**9", "$" + "\\frac{1}{" * 3000 + "2" + "}" * 3000 + "$", "(" * 50_000])
def test_an_expression_that_takes_for_ever_is_wrong(response):
    assert verifiers.math(response, "5") == 0


def test_a_right_answer_without_a_number_is_the_datas_mistake():
    with pytest.raises(ValueError, match="no number or expression in the right answer 'none'"):
        verifiers.math("5", "none")


GSM8K = Path(os.environ.get("RAYLLM_GSM8K", "gsm8k_train_2000.parquet"))


@pytest.mark.skipif(not GSM8K.is_file(), reason="RAYLLM_GSM8K names no file of GSM8K rows")
def test_reference_answers_of_gsm8k_pass_and_others_do_not():
    import pyarrow.parquet

    answers = [row["answer"] for row in pyarrow.parquet.read_table(GSM8K).to_pylist()]
    finals = [verifiers.final_answer(answer) for answer in answers]
    assert sum(verifiers.math(answer, answer) for answer in answers) == len(answers)
    for answer, final in list(zip(answers, finals, strict=True))[:300]:
        assert verifiers.math(f"The answer is ${final}.", answer) == verifiers.math(rf"\boxed{{{final}}}", answer) == 1
        wrong = str(int(final.replace(",", "")) + 1)
        assert verifiers.math(f"The answer is {wrong}.", answer) == verifiers.math("", answer) == 0, answer


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [(" Paris\n", "Paris", 1), ("paris", "Paris", 0), ("It is\n#### 42", "worked\n#### 42", 1), ("42", 42, 1), ("", "x", 0)],
)
def test_exact(response, answer, score):
    assert verifiers.exact(response, answer) == score


@pytest.mark.parametrize(
    ("response", "pattern", "score"),
    [
        ("<answer> 42 </answer>", r"<answer>(.*?)</answer>", 1),
        ("<answer>1</answer><answer>42</answer>", r"<answer>(.*?)</answer>", 1),
        ("<answer>42</answer><answer>1</answer>", r"<answer>(.*?)</answer>", 0),
        ("so 42", r"\d+", 1), ("none", r"\d+", 0), ("x", r"(y)?x", 0),
    ],
)  # fmt: skip
def test_regex_compares_its_last_match(response, pattern, score):
    assert verifiers.regex(response, "#### 42", pattern=pattern) == score


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("B", 1), ("B.", 1), ("(B)", 1), ("B) Paris", 1), ("**B**", 1), ("The answer is B.", 1), ("answer: (b)", 1),
        (r"\boxed{B}", 1), (r"\boxed{\text{B}}", 1), ("The correct option is **B**", 1), ("I first chose (A), now (B)", 1),
        ("The answer is A. No: the answer is B.", 1), ("#### B", 1),
        ("**Answer:** B", 1), ("Answer:\n\nB", 1), ("The answer is b", 1), ("The answer is B because option A is wrong.", 1),
        ("I think the best option I see is (B).", 1), ("The answer is **B**.", 1), ("The answer is a B", 0),
        ("The answer is (b) Paris", 1), ("The answer is **b** because", 1), ("The Answer Is B", 1), ("ANSWER IS B", 1),
        ("Of the two options, (B) is right.", 1), ("The answer is b) Paris", 1),
        ("A", 0), ("The answer is A, not B", 0), ("Be careful", 0), ("A Better one", 0), ("", 0), ("Paris", 0),
    ],
)  # fmt: skip
def test_choice_takes_the_letter_that_is_named(response, score):
    assert verifiers.choice(response, "B") == verifiers.choice(response, "(b)") == score


@pytest.mark.parametrize(
    ("response", "letter", "score"),
    [
        ("The answer is a dog.", "A", 0), ("the choice I made", "I", 0), ("Option A is right", "A", 1),
        ("The answer is I.", "I", 1), ("answer: a", "A", 1),
    ],
)
def test_words_of_one_letter_are_no_choice(response, letter, score):
    assert verifiers.choice(response, letter) == score


def test_a_choice_needs_a_letter():
    with pytest.raises(ValueError, match="expected a letter as the right choice, got 'Paris'"):
        verifiers.choice("B", "Paris")


def test_format_is_of_the_whole_response_over_lines():
    pattern = r"<think>.+</think>\s*<answer>.+</answer>"
    assert verifiers.matches_format("<think>a\nb</think>\n<answer>1</answer>\n", pattern=pattern) == 1
    assert verifiers.matches_format("Well. <think>a</think><answer>1</answer>", pattern=pattern) == 0


def test_length_counts_both_bounds_in():
    found = [verifiers.has_length(n, min_tokens=2, max_tokens=4) for n in range(1, 6)]
    assert found == [0, 1, 1, 1, 0] and verifiers.has_length(10**6) == 1


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("x = 1", "x = 1"), ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\na\n```\nbetter:\n```py\nb\n```", "b\n"), ("```python\nx = 1", "x = 1"),
    ],
)  # fmt: skip
def test_the_code_of_a_response_is_its_last_block(response, code):
    assert verifiers.response_code(response) == code
