"""Environments by conversations made by hand."""

from fractions import Fraction

import pytest

from rayllm.environments.arithmetic import evaluate, format_number
from rayllm.environments.base import Environment, MakesPrompts, Response, Turn
from rayllm.environments.calculator import HINT, Calculator
from rayllm.environments.guess_number import GuessNumber
from rayllm.environments.loading import KNOWN, load_environment, make_prompts
from rayllm.errors import InputError


def say(text, *, stopped=True):
    return Response(text=text, token_ids=(), stopped=stopped)


class NoEnvironment:
    pass


class Silent:
    """Makes no prompts."""

    def __init__(self, words="", /):
        self.words = words

    def reset(self, row, *, seed):
        return row["prompt"]

    def step(self, response):
        return Turn(done=True)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3+4", "7"), ("37 + 58", "95"), ("2+3*4", "14"), ("(2+3)*4", "20"), ("10-4-3", "3"), ("24/4/3", "2"),
        ("-3+5", "2"), ("2*-3", "-6"), ("--2", "2"), ("7/2", "3.5"), ("1/3", "0.333333"), ("0.1+0.2", "0.3"),
        ("99*99", "9801"), ("-(2-5)", "3"), ("((((1))))", "1"), ("10000000*10000000", "100000000000000"),
    ],
)  # fmt: skip
def test_values_of_expressions(expression, value):
    assert format_number(evaluate(expression)) == value


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "expected a number, got None"),
        ("3+", "expected a number, got None"),
        ("3 4", "expected an operator, got '4'"),
        ("(3", "a parenthesis is not closed"),
        ("3)", "expected an operator, got '\\)'"),
        ("2**9", "expected a number, got '\\*'"),
        ("1/(2-2)", "division by zero"),
        ("__import__('os')", "expected a number, got '_'"),
        ("1e9", "expected an operator, got 'e'"),
        ("٣+٤", "expected a number"),
        ("²", "expected a number"),
        ("9" * 101, "101 characters, at most 100"),
    ],
)
def test_what_is_no_expression_is_refused(expression, message):
    with pytest.raises(ValueError, match=message):
        evaluate(expression)


def test_the_longest_expressions_are_read():
    assert evaluate("(" * 49 + "11" + ")" * 49) == 11
    assert evaluate("-" * 99 + "1") == -1
    assert evaluate("9" * 100) == Fraction(10) ** 100 - 1


def calculator(answer="95"):
    environment = Calculator()
    row = {"prompt": "What is 37 plus 58?", "answer": answer}
    assert environment.reset(row, seed=0) == [{"role": "user", "content": f"What is 37 plus 58? {HINT}"}]
    return environment


def test_a_call_is_answered_with_its_value_and_the_answer_is_judged():
    environment = calculator()
    assert environment.step(say("<calc>37+58</calc>")) == Turn(observation="The calculator says 95.")
    assert environment.step(say("37 plus 58 is 95.")) == Turn(reward=1.0, done=True)


@pytest.mark.parametrize(
    ("text", "reward"),
    [("95", 1), ("37 plus 58 is 95.", 1), ("It is 9.5", 0), ("-95", 0), ("95 or 96?", 0), ("095", 0), ("I do not know.", 0)],
)
def test_the_last_number_is_the_answer(text, reward):
    assert calculator().step(say(text)) == Turn(reward=reward, done=True)


def test_unreadable_calls_are_told_so_and_several_calls_are_all_answered():
    environment = calculator()
    assert environment.step(say("<calc>exit()</calc>")).observation == "The calculator can not read that."
    two = environment.step(say("<calc>1+1</calc> and <calc>\n4/0</calc>"))
    assert two.observation == "The calculator says 2. The calculator can not read that."
    assert two.reward == 0 and not two.done


def test_a_turn_that_was_cut_is_no_answer():
    assert calculator().step(say("37 plus 58 is 95", stopped=False)) == Turn(done=True)


def test_the_hint_goes_to_the_last_message_only():
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is 1 plus 1?"}]
    said = Calculator().reset({"prompt": turns, "answer": "2"}, seed=0)
    assert [message["content"] for message in said] == ["Be kind.", f"What is 1 plus 1? {HINT}"]
    assert turns[1]["content"] == "What is 1 plus 1?"


def test_generated_questions_have_their_answers():
    rows = Calculator(max_number=12).prompts(200, seed=3)
    assert rows == Calculator(max_number=12).prompts(200, seed=3) != Calculator(max_number=12).prompts(200, seed=4)
    words = {"plus": "+", "minus": "-", "times": "*"}
    for row in rows:
        left, word, right = row["prompt"][0]["content"].removeprefix("What is ").removesuffix("?").split()
        assert 1 <= int(right) <= int(left) <= 12
        assert evaluate(f"{left}{words[word]}{right}") == int(row["answer"]) >= 0


def guess_number(secret=13, **options):
    environment = GuessNumber(**options)
    assert environment.reset({"prompt": "Guess my number.", "secret": secret}, seed=0) == [
        {"role": "user", "content": "Guess my number."}
    ]
    return environment


def test_a_game_is_played_to_its_end():
    environment = guess_number(turn_cost=0.25)
    assert environment.step(say("10")) == Turn(observation="My number is higher than 10.", reward=-0.25)
    assert environment.step(say("Is it 15?")) == Turn(observation="My number is lower than 15.", reward=-0.25)
    assert environment.step(say("13!")) == Turn(reward=0.75, done=True)


@pytest.mark.parametrize("text", ["", "I do not know", "12 13 14", "1-13", "9" * 5000])
def test_a_turn_without_one_number_finds_nothing(text):
    turn = guess_number().step(say(text))
    assert turn == Turn(observation="Please say one number.", reward=-0.05)


def test_a_guess_that_was_cut_finds_nothing():
    assert guess_number().step(say("13", stopped=False)).reward == -0.05


def test_secrets_lie_in_the_range_and_every_number_is_drawn():
    rows = GuessNumber(low=3, high=6).prompts(200, seed=0)
    assert {row["secret"] for row in rows} == {3, 4, 5, 6}
    assert rows[0]["prompt"][0]["content"] == "Guess my number. It is between 3 and 6."
    assert rows == GuessNumber(low=3, high=6).prompts(200, seed=0)


@pytest.mark.parametrize("name", KNOWN)
def test_known_environments_load_and_their_prompts_can_be_played(name):
    make = load_environment(name)
    environment = make()
    assert isinstance(environment, Environment) and isinstance(environment, MakesPrompts)
    assert make() is not environment
    for row in make_prompts(make, 5, seed=0):
        (message,) = environment.reset(row, seed=0)
        assert message["role"] == "user"


def test_an_environment_of_your_own_loads_by_module_and_class():
    make = load_environment(f"{__name__}:Silent")
    assert make().reset({"prompt": "hi"}, seed=0) == "hi"
    with pytest.raises(InputError, match="environment Silent makes no prompts: it needs a prompt file"):
        make_prompts(make, 5, seed=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gues_number", {}, "'gues_number' is unknown; did you mean guess_number?"),
        ("chess", {}, "'chess' is unknown; known: calculator, guess_number; your own: module:Class"),
        (":Chess", {}, "unknown"),
        ("no.such.module:Chess", {}, "cannot import no.such.module: No module named 'no'"),
        (f"{__name__}:Chess", {}, "has no Chess"),
        (f"{__name__}:say", {}, "expected a class, got <function say"),
        (f"{__name__}:NoEnvironment", {}, "NoEnvironment needs the methods reset and step"),
        ("guess_number", {"hihg": 9}, r"unexpected keyword argument 'hihg'; its options are .*high: 'int' = 20"),
        ("guess_number", {"low": 9, "high": 2}, "low=9 and high=2 must be"),
        ("guess_number", {"turn_cost": -1}, "turn_cost is -1"),
        ("calculator", {"max_number": 0}, "max_number is 0"),
    ],
)
def test_what_cannot_be_loaded_is_named(name, options, message):
    with pytest.raises(InputError, match=message):
        load_environment(name, **options)


def test_a_turn_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="reward is nan, must be a finite number"):
        Turn(reward=float("nan"), done=True)
    with pytest.raises(ValueError, match="observation is empty although Turn.done is False"):
        Turn()
